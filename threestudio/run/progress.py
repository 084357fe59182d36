"""How far a run is: a line for a person, and a file for a program."""

import contextlib
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from threestudio.run import terminal
from threestudio.run.pace import Pace, clock, paused_seconds, rate
from threestudio.utils.files import whole_file

TRAINING = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {said}{postfix}]"
ENDLESS = "{desc}: {n_fmt} [{elapsed}, {said}{postfix}]"
FIRST = "first step, which is slower"
COMPILING = "first step: compiling kernels, which are kept for later runs"
WATCH_EVERY = 0.5  # seconds
PAUSED = "paused in the live view"
LONG = 5.0  # seconds of a first step that are worth a word


class _Bar(tqdm):
    """With ``said`` in its ``bar_format``."""

    said = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "said": self.said}


class _FirstStep(threading.Thread):
    """Looks, while the first step is under way, whether numba compiles, and tells it once."""

    def __init__(self, tell) -> None:
        super().__init__(daemon=True)
        self._tell = tell
        self._over = threading.Event()
        self.compiled = False

    def run(self) -> None:
        while not self._over.wait(WATCH_EVERY):
            self.compiled |= numba_compiles()
            with contextlib.suppress(Exception):  # what is drawn is worth no run
                self._tell(self.compiled)

    def end(self) -> None:
        self._over.set()
        self.join()


def numba_compiles() -> bool:
    """Whether a kernel is being compiled now, in any thread. numba is not imported for it."""
    locks = sys.modules.get("numba.core.compiler_lock")
    return locks is not None and locks.global_compiler_lock.is_locked()


class CustomProgressBar(ProgressBar):
    """One line for the whole training, however long an epoch is: step, pace, time left, loss.
    Evaluation on its own gets a line too; of the validations between training steps the path of a
    picture is printed.

    On a terminal the line is redrawn in place, at most every 0.1 s; in a log file a line is
    written every 10 s. `refresh_rate`: consider it only every so many steps. `pictures`: also draw
    the pictures, in a terminal that can; "auto" or one of ``terminal.PROTOCOLS``. The time left is
    that of the training (see :class:`.Pace`), without the views that are rendered after it.
    """

    def __init__(self, refresh_rate: int = 1, pictures: str | None = None) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self._bar: _Bar | None = None
        self._enabled = True
        self._terminal = sys.stderr.isatty()
        self._interval = 0.1 if self._terminal else 10.0
        self._drawn_at = 0.0
        self._pictures = pictures
        self._pace = Pace()
        self._step_end = self._validated_at = 0.0
        self._validated_for = 0.0  # seconds, since the last step
        self._paused_for = 0.0  # seconds, since the training began
        self._validated_since = 0.0  # time.time()
        self._first_step: _FirstStep | None = None

    def disable(self) -> None:
        """Called by Lightning on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of :meth:`disable`."""
        self._enabled = True

    def _open(
        self, description: str, total, initial: int = 0, unit: str = "step", paced: bool = False
    ) -> None:
        self._close()
        total = total if total and 0 < total < float("inf") else None
        self._bar = _Bar(
            desc=description,
            total=total,
            initial=initial,
            unit=unit,
            disable=not self._enabled,
            dynamic_ncols=True,
            mininterval=0,  # the throttling is done here, where reading the loss is saved too
            bar_format=(TRAINING if total else ENDLESS) if paced else None,
        )
        self._drawn_at = time.monotonic()

    def _advance(self, n: int, outputs=None, final: bool = False, said: str = "") -> None:
        now = time.monotonic()
        if self._bar is None or n <= self._bar.n:
            return
        if not final and (now - self._drawn_at < self._interval or n % self.refresh_rate):
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._bar.set_postfix_str(f"loss={float(loss):.4g}", refresh=False)
        self._bar.said = said
        self._bar.update(n - self._bar.n)
        self._drawn_at = now

    def _close(self) -> None:
        if self._first_step is not None:
            self._first_step.end()
            self._first_step = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def print(self, *args, sep: str = " ", **kwargs) -> None:
        """Print above the bar."""
        tqdm.write(sep.join(str(arg) for arg in args), file=sys.stderr)

    # --- training -------------------------------------------------------------------------------

    def on_train_start(self, trainer, pl_module) -> None:
        self._pace = Pace()
        self._open("training", trainer.max_steps, trainer.global_step, paced=True)
        self._step_end, self._validated_for = time.monotonic(), 0.0
        self._paused_for = paused_seconds(trainer)
        if self._enabled:
            self._say(FIRST)
            self._first_step = _FirstStep(self._tell_first)
            self._first_step.start()

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.said = text
            self._bar.refresh()

    def _tell_first(self, compiling: bool) -> None:
        text = COMPILING if compiling else FIRST
        if self._bar is not None and (self._terminal or self._bar.said != text):
            self._say(text)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now, paused = time.monotonic(), paused_seconds(trainer) - self._paused_for
        self._pace.step(max(0.0, now - self._step_end - self._validated_for - paused))
        if paused and self._bar is not None:
            self._bar.start_t += paused  # what it shows as elapsed
        self._paused_for += paused
        self._step_end, self._validated_for = now, 0.0
        if self._first_step is not None:
            self._first_step.end()
            if self._first_step.compiled and self._pace.first > LONG:
                self.print(
                    f"the first step took {self._pace.first:.0f} s: kernels were compiled, which "
                    "later runs find ready"
                )
            self._first_step = None
        last = trainer.global_step == trainer.max_steps
        said = self._how_long(trainer)
        self._advance(trainer.global_step, outputs, final=last, said=said)

    def _how_long(self, trainer) -> str:
        """Pace and time left, in words."""
        typical = self._pace.typical
        if typical is None:
            return "first step done"
        steps = trainer.max_steps - trainer.global_step
        if trainer.max_steps < 0:
            return rate(typical)
        left = self._pace.left(steps, validations_left(trainer))
        return f"{clock(left or 0.0)} left, {rate(typical)}"

    def note_pause(self, paused: bool) -> None:
        """Say that the training waits for a visitor of the live view, or goes on."""
        self._say(PAUSED if paused else "goes on")

    def on_train_end(self, trainer, pl_module) -> None:
        self._close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        if trainer.state.fn == "fit":
            self._advance(trainer.global_step, final=True, said="stopped")
        self._close()

    # --- validation between steps ---------------------------------------------------------------

    def _show_preview(self, trainer, pl_module) -> None:
        """Print where the validation's picture is, and draw it if that was asked for."""
        path = preview_of(pl_module, self._validated_since)
        if path is None or not self._enabled:
            return
        self.print(f"preview: {path}")
        kind = self._pictures
        if kind == "auto":
            kind = terminal.protocol_of(sys.stderr)
            if kind is None and self._pictures:
                self._pictures = None  # said once
                self.print("--show-previews: this terminal is not known to show pictures")
        if kind is not None and self._terminal:
            try:
                text = terminal.drawn(path, kind)
            except (OSError, ValueError):  # a picture that cannot be read costs no run
                return
            with tqdm.external_write_mode(file=sys.stderr):
                sys.stderr.write(text)
                sys.stderr.flush()

    # --- evaluation -----------------------------------------------------------------------------

    def on_validation_start(self, trainer, pl_module) -> None:
        self._validated_at, self._validated_since = time.monotonic(), time.time()
        if trainer.state.fn == "validate":
            self._open("validating", sum(trainer.num_val_batches), unit="view")

    def on_test_start(self, trainer, pl_module) -> None:
        self._open("rendering", sum(trainer.num_test_batches), unit="view")

    def on_predict_start(self, trainer, pl_module) -> None:
        self._open("exporting", sum(trainer.num_predict_batches), unit="view")

    def _on_eval_batch_end(self, trainer, batch_idx: int) -> None:
        if trainer.state.fn != "fit" and self._bar is not None:
            self._advance(batch_idx + 1, final=batch_idx + 1 == self._bar.total)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, loader=0) -> None:
        self._on_eval_batch_end(trainer, batch_idx)

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, loader=0) -> None:
        self._on_eval_batch_end(trainer, batch_idx)

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, loader=0) -> None:
        self._on_eval_batch_end(trainer, batch_idx)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.state.fn == "validate":
            self._close()
        elif not trainer.sanity_checking:
            self._show_preview(trainer, pl_module)
            seconds = time.monotonic() - self._validated_at
            self._pace.validation(seconds)
            self._validated_for += seconds

    def on_test_end(self, trainer, pl_module) -> None:
        self._close()

    def on_predict_end(self, trainer, pl_module) -> None:
        self._close()


def validations_left(trainer) -> int:
    """How many validations come until the last step."""
    every = getattr(trainer, "val_check_batch", None)
    if not isinstance(every, int) or every < 1 or not any(trainer.num_val_batches or [0]):
        return 0
    every = max(1, every // trainer.accumulate_grad_batches)
    return trainer.max_steps // every - trainer.global_step // every


def preview_of(module, since: float) -> str | None:
    """The first picture that a validation of this step has written since a time (``time.time()``),
    ``it<step>-<view>.png`` in the folder ``save``; None if it wrote none."""
    try:
        folder, step = Path(module.get_save_dir()), module.true_global_step
        found = {}
        for path in folder.glob(f"it{step}-*.png"):
            view = re.fullmatch(r"it\d+-(\d+)", path.stem)
            if view and path.stat().st_mtime >= since - 1.0:  # disks round times
                found[int(view[1])] = str(path)
    except (AttributeError, ValueError, OSError):  # a system of another kind
        return None
    return found[min(found)] if found else None


class ProgressCallback(Callback):
    """Keeps one line about the run's progress in the file `save_path`, for a program that watches
    it (``launch.py --gradio``)."""

    def __init__(self, save_path) -> None:
        super().__init__()
        self.save_path = Path(save_path)
        self._written_at = 0.0

    @rank_zero_only
    def write(self, message: str) -> None:
        """Replace the line. A disk that is full costs a line, not the run."""
        with contextlib.suppress(OSError):
            self.save_path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.save_path) as tmp:  # not through a link
                tmp.write_text(message)
        self._written_at = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        done = trainer.global_step / max(trainer.max_steps, 1)
        if done >= 1 or time.monotonic() - self._written_at > 0.2:
            self.write(f"Generation progress: {100 * min(done, 1):.2f}%")

    def on_validation_start(self, trainer, pl_module) -> None:
        self.write("Rendering validation image ...")

    def on_test_start(self, trainer, pl_module) -> None:
        self.write("Rendering video ...")

    def on_predict_start(self, trainer, pl_module) -> None:
        self.write("Exporting mesh assets ...")
