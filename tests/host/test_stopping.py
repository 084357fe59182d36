"""What asks a run to stop, and what must not: signals, vanished readers, closed streams."""

import io
import os
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.host.test_launch import cli, last, train  # noqa: F401 (a fixture)
from tests.runs import read
from threestudio.run.callbacks import SharedFolder
from threestudio.run.checkpoint import LastCheckpoint
from threestudio.run.interrupt import Interrupted, InterruptGuard
from threestudio.run.signals import EarlySignal, stop_signals
from threestudio.run.streams import steady_streams

ASKED = (signal.SIGINT, signal.SIGTERM)
SOFT = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def send(signum):
    os.kill(os.getpid(), signum)


# --- signals ---


def test_what_is_ignored_at_the_start_stays_ignored():
    assert set(stop_signals()) == {*ASKED, *SOFT}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(stop_signals()) == {*ASKED, *SOFT[1:]}
        with EarlySignal(), InterruptGuard():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first, second", [(n, n) for n in SOFT] + [(SOFT[1], ASKED[1])])
def test_signals_that_come_in_twos_wait_for_the_step(first, second, capfd):
    """A terminal that is closed sends SIGHUP twice; SLURM sends SIGUSR1, later SIGTERM."""
    with InterruptGuard() as guard:
        guard.training = True
        send(first), send(second)
        assert guard.requested and guard.signum == first
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.mark.parametrize("signum", SOFT)
def test_outside_of_training_they_stop_at_once(signum):
    with InterruptGuard():
        with pytest.raises(Interrupted) as caught:
            send(signum)
        assert caught.value.status == 128 + signum
        send(signum)  # what follows it does not disturb the end
    with EarlySignal() as early, pytest.raises(KeyboardInterrupt):
        send(signum)
    assert early.status == 128 + signum


def test_the_handler_may_come_in_the_middle_of_a_print(capfd, monkeypatch):
    """Python refuses to write to a buffered stream that it is writing to."""

    class Buffer(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if not guard.requested:
                send(signal.SIGTERM)
            return len(data)

    stream = io.TextIOWrapper(io.BufferedWriter(Buffer()), write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with InterruptGuard() as guard:
        guard.training = True
        print("x", file=sys.stderr, flush=True)
        assert guard.requested
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_they_save_in_training_as_sigterm_does(cli, name):  # noqa: F811
    status, out, _ = train(cli, "system.signal_at=1", f"system.signal={name}")
    assert status == 128 + getattr(signal, name) and "interrupted at step 2; resume with" in out
    assert read(last())["global_step"] == 2


def test_a_signal_in_the_last_save_does_not_lose_it(tmp_path):
    guard = InterruptGuard()
    guard.training = True
    saved = []

    def save(path):
        assert guard.training, "a signal now has to wait"
        saved.append(path)

    callback = LastCheckpoint(tmp_path / "last.ckpt", guard)
    callback.on_train_end(SimpleNamespace(global_step=3, save_checkpoint=save), None)
    assert saved and not guard.training


def struck(monkeypatch, method):
    """The toy sends SIGINT the first time that it is in `method`."""
    toy, times = sys.modules["toy_extension"].ToySystem, []
    wrapped = getattr(toy, method)

    def strike(self, *args):
        times.append(1)
        if len(times) == 1:
            send(signal.SIGINT)
        return wrapped(self, *args)

    monkeypatch.setattr(toy, method, strike)


def test_ctrl_c_in_the_final_rendering_says_how_to_go_on(cli, monkeypatch):  # noqa: F811
    train(cli, "trainer.max_steps=1", prompt="first")  # loads the toy
    struck(monkeypatch, "test_step")
    status, out, _ = train(cli, prompt="a b")
    assert status == 130
    head, command = out.splitlines()[-1].split("; continue with: python launch.py ")
    assert head == "interrupted; in the final rendering" and "--test" in command
    assert not Path("outputs/toy/a_b/save").exists()
    assert cli(*shlex.split(command))[0] == 0
    assert Path("outputs/toy/a_b/save/it4-test.json").exists()


@pytest.mark.parametrize(
    "mode, method",
    [
        ("--test", "test_step"),
        ("--validate", "validation_step"),
        ("--export", "predict_step"),
        ("--test", "configure"),
    ],
)
def test_ctrl_c_in_a_command_that_renders_names_it(cli, monkeypatch, mode, method):  # noqa: F811
    train(cli)
    struck(monkeypatch, method)
    parsed = "outputs/toy/p/configs/parsed.yaml"
    status, out, _ = cli("--config", parsed, mode, f"resume={last()}")
    line = out.splitlines()[-1]
    assert status == 130 and line.startswith("interrupted; start again with: python launch.py ")
    assert cli(*shlex.split(line.split("launch.py ")[1])[2:])[0] == 0  # the fixture adds two


def test_ctrl_c_in_the_set_up_of_a_resumed_run_names_it(cli, monkeypatch):  # noqa: F811
    train(cli, "trainer.max_steps=2")
    struck(monkeypatch, "configure")
    status, out, _ = train(cli, f"resume={last()}")
    line = out.splitlines()[-1]
    assert status == 130 and "continue with: python launch.py" in line
    assert cli(*shlex.split(line.split("launch.py ")[1]))[0] == 0


# --- streams ---


def broken(number=None):
    """A text stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_without_a_reader_ends_nothing(monkeypatch, name):
    stream = broken()
    with pytest.raises(BrokenPipeError):
        print("x", file=broken(), flush=True)
    monkeypatch.setattr(sys, name, stream)
    with steady_streams():
        steady = getattr(sys, name)
        for _ in range(3):
            print("x" * 100_000, file=steady, flush=True)
        steady.writelines(["a", "b"])
        assert steady.isatty() is False and steady.encoding == stream.encoding
        print("in the buffer at the end", file=steady)
    assert getattr(sys, name) is stream
    stream.close()  # as Python does when it ends: nothing is left that could fail


def test_a_full_disk_behind_a_stream_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with steady_streams():
            print("x", flush=True)


def test_what_is_written_to_a_whole_stream_arrives(capsys):
    with steady_streams():
        print("out", flush=True)
        print("err", file=sys.stderr)
    assert capsys.readouterr() == ("out\n", "err\n")


def test_a_closed_stream_gives_its_number_to_no_file(tmp_path):
    """What a library in C prints would go into that file."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(0), os.close(1), os.close(2)
            sys.stdout = sys.stderr = None
            with steady_streams():
                handle = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
                os.write(1, b"printed"), os.write(2, b"printed")
                print("printed", flush=True), print("printed", file=sys.stderr, flush=True)
                sys.stderr.isatty()
                status = 0 if handle > 2 else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_run_whose_reader_is_gone_ends_well(cli, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "stdout", broken())
    monkeypatch.setattr(sys, "stderr", broken())
    status, _, _ = train(cli)
    assert status == 0 and read(last())["global_step"] == 4
    assert Path("outputs/toy/p/save/it4-test.json").exists()


# --- several processes ---


def test_processes_agree_on_the_folder_that_the_first_has_made():
    cfg = SimpleNamespace(trial_dir="outputs/x/t", checkpoint={})
    told = ("outputs/x/t-002", "outputs/x/t-002/ckpts")
    kept, folders = LastCheckpoint("outputs/x/t/ckpts/last.ckpt"), []
    strategy = SimpleNamespace(broadcast=lambda mine: told)
    trainer = SimpleNamespace(world_size=2, strategy=strategy, callbacks=[kept])
    SharedFolder(cfg).setup(trainer, SimpleNamespace(set_save_dir=folders.append), "fit")
    assert cfg.trial_dir == told[0] and folders == ["outputs/x/t-002/save"]
    assert str(kept.path) == "outputs/x/t-002/ckpts/last.ckpt"
