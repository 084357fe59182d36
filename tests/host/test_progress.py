"""The progress bar: pace, time left, what a slow first step is said to be, pictures."""

import io
import re
import sys
import types

import pytest
from PIL import Image

from threestudio.run import progress, terminal
from threestudio.run.pace import Pace, clock, rate
from threestudio.run.progress import COMPILING, FIRST, CustomProgressBar


def test_the_first_step_is_not_taken_for_the_pace():
    pace = Pace()
    pace.step(60.0)
    assert pace.typical is None and pace.left(100) is None and pace.first == 60.0
    pace.step(0.5)
    assert pace.typical == 0.5 and pace.left(100) == 50.0


def test_the_pace_is_the_median_of_recent_steps():
    pace = Pace()
    for seconds in [9.0, *[1.0] * 200, *[2.0] * 30]:
        pace.step(seconds)
    assert pace.typical == 2.0  # of the last 50


def test_steps_that_do_something_else_too_count_in_the_time_left():
    """Every 10th step takes 11 s, the others 1 s: 20 s per ten steps, of which the pace alone would
    say 10 s. Beyond three medians are 8 s."""
    pace = Pace()
    pace.step(5.0)
    for i in range(200):
        pace.step(11.0 if i % 10 == 9 else 1.0)
    assert pace.typical == 1.0
    assert pace.left(100) == pytest.approx(100 * (1 + 0.8))


def test_validations_that_are_to_come_count_as_long_as_those_seen():
    pace = Pace()
    for _ in range(5):
        pace.step(1.0)
    assert pace.left(10, validations=3) == 10
    for seconds in (4.0, 30.0, 6.0):
        pace.validation(seconds)
    assert pace.left(10, validations=3) == 10 + 3 * 6


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (190_000, "2 d 4 h")],
)
def test_times_are_short(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize("seconds, text", [(0.25, "4 step/s"), (2.5, "2.5 s/step"), (0, "fast")])
def test_rates_say_what_is_more_than_one(seconds, text):
    assert rate(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def bar(self, **options):
        """A progress bar on it. (pytest puts its own stream in place of one of a fixture.)"""
        sys.stderr = self
        return CustomProgressBar(**options)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 0.0


class Trainer(types.SimpleNamespace):
    """What the bar asks of Lightning's."""

    def __init__(self, steps=100, every=25):
        super().__init__(
            max_steps=steps,
            global_step=0,
            val_check_batch=every,
            num_val_batches=[1],
            accumulate_grad_batches=1,
            sanity_checking=False,
            state=types.SimpleNamespace(fn="fit"),
        )


class Module:
    def __init__(self, folder, trainer):
        self.folder, self.trainer = folder, trainer

    def get_save_dir(self):
        return str(self.folder)

    @property
    def true_global_step(self):
        return self.trainer.global_step


@pytest.fixture
def screen(monkeypatch):
    """What is written to a terminal, and a clock that stands still."""
    stream, watch = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "time", watch)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("TMUX", "STY", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream.clock = watch
    return stream


def steps(bar, trainer, clock, durations, module=None):
    for seconds in durations:
        clock.now += seconds
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, module, {"loss": 1.5}, None, 0)


def last_line(stream):
    return stream.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]


def test_the_time_left_is_told_from_the_second_step_on(screen):
    bar, trainer = screen.bar(), Trainer(every=float("inf"))
    bar.on_train_start(trainer, None)
    steps(bar, trainer, screen.clock, [40.0])
    assert "first step done" in last_line(screen)
    steps(bar, trainer, screen.clock, [2.0])
    line = last_line(screen)
    assert "2/100" in line and "3:16 left, 2 s/step, loss=1.5" in line  # 98 steps of 2 s
    bar.on_train_end(trainer, None)


def test_a_validation_is_not_taken_for_a_slow_step(screen, tmp_path):
    bar, trainer = screen.bar(), Trainer()
    module = Module(tmp_path, trainer)
    bar.on_train_start(trainer, module)
    steps(bar, trainer, screen.clock, [9.0, *[1.0] * 24])
    bar.on_validation_start(trainer, module)
    screen.clock.now += 30.0
    bar.on_validation_end(trainer, module)
    steps(bar, trainer, screen.clock, [1.0])
    # 74 steps of 1 s, and the validations of steps 50, 75 and 100
    assert f"{clock(74 + 3 * 30)} left, 1 s/step" in last_line(screen)
    bar.on_train_end(trainer, module)


def test_a_pause_is_not_taken_for_a_slow_step(screen):
    bar, trainer, view = screen.bar(), Trainer(every=float("inf")), types.SimpleNamespace()
    trainer.callbacks, view.paused_seconds = [bar, view], 0.0
    bar.on_train_start(trainer, None)
    steps(bar, trainer, screen.clock, [9.0, 1.0, 1.0])
    bar._bar.start_t = began = bar._bar.start_t - 600.0  # its own clock does not stand still
    bar.note_pause(True)
    assert "paused in the live view" in last_line(screen)
    view.paused_seconds = 500.0
    bar.note_pause(False)
    steps(bar, trainer, screen.clock, [501.0, 1.0])
    assert "paused" not in last_line(screen)
    assert f"{clock(95)} left, 1 s/step" in last_line(screen)
    assert bar._bar.start_t == began + 500.0  # nor does what has elapsed count it
    bar.on_train_end(trainer, None)


def test_a_run_without_an_end_has_a_rate_only(screen):
    bar, trainer = screen.bar(), Trainer(steps=-1)
    bar.on_train_start(trainer, None)
    steps(bar, trainer, screen.clock, [1.0, 0.5, 0.5])
    assert "2 step/s" in last_line(screen) and "left" not in last_line(screen)
    bar.on_train_end(trainer, None)


def test_a_first_step_that_compiles_is_said_to_be_that(screen, monkeypatch):
    monkeypatch.setattr(progress, "WATCH_EVERY", 0.01)
    held = types.SimpleNamespace(is_locked=lambda: True)
    locks = types.SimpleNamespace(global_compiler_lock=held)
    bar, trainer = screen.bar(), Trainer()
    bar.on_train_start(trainer, None)
    assert FIRST in last_line(screen)
    monkeypatch.setitem(sys.modules, "numba.core.compiler_lock", locks)
    while not bar._first_step.compiled or COMPILING not in screen.getvalue():
        pass
    steps(bar, trainer, screen.clock, [70.0])
    assert "the first step took 70 s: kernels were compiled" in screen.getvalue()
    bar.on_train_end(trainer, None)


def test_compiling_is_what_numbas_own_lock_says():
    import numba.core.compiler_lock as locks

    assert not progress.numba_compiles()
    with locks.global_compiler_lock:
        assert progress.numba_compiles()


def validated(bar, trainer, module, names):
    bar.on_train_start(trainer, module)
    trainer.global_step = 50
    bar.on_validation_start(trainer, module)
    for name in names:
        Image.new("RGB", (8, 8), "red").save(module.folder / name)
    bar.on_validation_end(trainer, module)
    bar.on_train_end(trainer, module)


def test_the_path_of_a_preview_is_printed_when_it_is_there(screen, tmp_path):
    trainer = Trainer()
    names = ["it50-10.png", "it50-2.png", "it40-0.png", "it50-train.png"]
    validated(screen.bar(), trainer, Module(tmp_path, trainer), names)
    printed = [line for line in screen.getvalue().split("\n") if "preview" in line]
    assert [line.rpartition("\r")[2] for line in printed] == [f"preview: {tmp_path}/it50-2.png"]
    assert "\x1b_G" not in screen.getvalue()  # not asked for


def test_a_picture_is_drawn_where_the_terminal_shows_them(screen, tmp_path, monkeypatch):
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    trainer = Trainer()
    bar = screen.bar(pictures="auto")
    validated(bar, trainer, Module(tmp_path, trainer), ["it50-0.png"])
    assert terminal.drawn(tmp_path / "it50-0.png", "kitty") in screen.getvalue()


def test_another_terminal_is_told_once_that_it_shows_none(screen, tmp_path):
    trainer, bar = Trainer(), screen.bar(pictures="auto")
    for _ in range(2):
        validated(bar, trainer, Module(tmp_path, trainer), ["it50-0.png"])
    assert screen.getvalue().count("not known to show pictures") == 1


@pytest.mark.parametrize("asked", ["auto", "kitty", "iterm2", "sixel"])
def test_no_picture_is_written_into_a_log(asked, screen, tmp_path, monkeypatch):
    screen.isatty = lambda: False
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    trainer, bar = Trainer(), screen.bar(pictures=asked)
    validated(bar, trainer, Module(tmp_path, trainer), ["it50-0.png"])
    text = screen.getvalue()
    assert "preview: " in text and not set(re.findall("\x1b.", text)) & {"\x1b_", "\x1b]", "\x1bP"}
