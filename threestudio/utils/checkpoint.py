"""Checkpoints that are whole or absent, and a last checkpoint that is the last step."""

import os
import signal
import stat
import threading
import time
import zipfile
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

import threestudio
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file
from threestudio.utils.signals import AT_ONCE, stop_signals, tell
from threestudio.utils.typing import *


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


_PARTS = {"state_dict": _is_state, "epoch": _is_count, "global_step": _is_count}


def _fits(content: Any, key: str, fits: Callable) -> bool:
    return isinstance(content, dict) and fits(content.get(key))


def is_whole(path) -> bool:
    """Whether the checkpoint's archive is complete and its checksums agree (``torch.load`` does
    not look at them, and would hand out the values of a flipped bit)."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(
                i.compress_type == zipfile.ZIP_STORED and i.file_size == i.compress_size
                for i in archive.infolist()
            )
            return stored and archive.testzip() is None
    except Exception:  # whatever the reader stumbles over, the file is not what was written
        return False


def _step_of(path: Path) -> Optional[int]:
    """The ``global_step`` in a checkpoint, read without its tensors; None if that fails."""
    try:
        return int(torch.load(path, "cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:
        return None


def newest_checkpoint(folder, exclude: str = "") -> Optional[Tuple[Path, int, str]]:
    """The good checkpoint of the most steps in `folder` (a run's, or its ``ckpts``), its step, and
    why it was chosen; None if there is none. `exclude`: the name of a file that is not asked.

    Of two of the same step the one written last is taken.
    """
    folder = Path(folder)
    folder = folder / "ckpts" if (folder / "ckpts").is_dir() else folder
    steps = {p: _step_of(p) for p in folder.glob("*.ckpt") if p.is_file() and p.name != exclude}
    damaged = [p.name for p, step in steps.items() if step is None]
    readable = [p for p, step in steps.items() if step is not None]
    for path in sorted(readable, key=lambda p: (steps[p], p.stat().st_mtime_ns), reverse=True):
        if is_whole(path):
            reason = f"the newest of {len(steps)}" if len(steps) > 1 else "the only checkpoint"
            if damaged:
                verb = "is" if len(damaged) == 1 else "are"
                reason += f"; {', '.join(sorted(damaged))} {verb} truncated or damaged"
            return path, steps[path], reason
        damaged.append(path.name)
    return None


def find_checkpoint(path) -> str:
    """The checkpoint that ``resume=`` means: a file is itself; of a run's folder, or of its
    ``ckpts``, the newest good one, which one printed line names.

    Raises :class:`UserError` for a folder without any.
    """
    if not Path(path).is_dir():
        return str(path)
    found = newest_checkpoint(path)
    if found is None:
        raise UserError(
            f"no checkpoint can be read in {path}: start the run anew, without resume=, or name "
            "another folder"
        )
    print(f"using {found[0]} (step {found[1]}: {found[2]})", flush=True)
    return str(found[0])


def read_checkpoint(path, map_location=None) -> dict:
    """Load a checkpoint: tensors and plain values only, never code (``weights_only``), and only
    if its checksums agree.

    Raises :class:`UserError`, one line, for a missing or unreadable file; it names the newest
    readable checkpoint of the same folder, if there is one.
    """
    path = Path(path)
    if not path.is_file():
        problem = f"checkpoint {path} not found"
    elif not is_whole(path):
        problem = f"checkpoint {path} is truncated or damaged"
    else:
        try:
            content = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # the archive is as it was written: the contents are refused
            detail = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {path} cannot be loaded: {detail}") from error
        bad = [key for key, fits in _PARTS.items() if not _fits(content, key, fits)]
        if not bad:
            return content
        problem = f"{path} is no checkpoint of a run: it has no good {', '.join(bad)}"
    # of another folder than a run's the files are not looked at: it may be anyone's
    run = path.suffix == ".ckpt" and path.parent.is_dir()
    good = newest_checkpoint(path.parent, exclude=path.name) if run else None
    raise UserError(problem + (f": the newest good one beside it is {good[0]}" if good else ""))


def is_checkpoint_of(path, folder) -> bool:
    """Whether `path` is a regular ``.ckpt`` file, and no link, whose real path is in `folder`."""
    path, folder = Path(path), os.path.realpath(folder)
    try:
        regular = stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False
    inside = Path(os.path.realpath(path)).is_relative_to(folder)
    return regular and inside and path.suffix == ".ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's file access, such that a checkpoint is never half written, never executes code
    when it is read, and nothing but a checkpoint in `folder` (None: nothing at all) is removed.

    A file is written beside its place, flushed to the disk and then renamed over it: a crash or a
    full disk (``OSError``) leaves the old one. What could not be read back is refused when it is
    written.
    """

    def __init__(self, folder=None) -> None:
        super().__init__()
        self.folder = folder

    def remove_checkpoint(self, path) -> None:
        """Lightning removes whatever has this path, whole folders too."""
        if self.folder is not None and is_checkpoint_of(path, self.folder):
            os.unlink(path)
        else:
            threestudio.warn(f"{path} is not removed: it is no checkpoint in {self.folder}")

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options is not supported")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, sync=True) as tmp:
            with open(tmp, "wb") as file:
                torch.save(checkpoint, file)
            self._refuse_unsafe(tmp, path)

    @staticmethod
    def _refuse_unsafe(tmp: Path, path: Path) -> None:
        find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
        unsafe = find(tmp) if find is not None else []  # torch < 2.6 cannot tell
        if unsafe:
            raise UserError(
                f"{path.name} would hold {', '.join(unsafe)}, which cannot be read back safely: "
                "put only tensors, numbers, strings, lists and dicts in on_save_checkpoint"
            )

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        return read_checkpoint(path, map_location=map_location)


class Interrupted(BaseException):
    """The user (SIGINT) or the system (SIGTERM and others) asked to stop. `step`: the step in
    last.ckpt, or None if none was saved for this. `status`: the exit status, 128 + the signal's
    number, as shells and schedulers know it (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, step: Optional[int] = None, signum: int = signal.SIGINT) -> None:
        super().__init__(step, signum)
        self.step = step
        self.status = 128 + signum
        self.trained = False  # whether the training had ended before


class InterruptGuard:
    """Context in which the first signal that asks to stop (see :func:`.signals.stop_signals`)
    during training only sets `requested`, so that the step can be finished and saved. Outside
    training it raises :class:`Interrupted` where the program is, and so does a second SIGINT or
    SIGTERM; the others come more than once by themselves, as when a terminal is closed."""

    def __init__(self) -> None:
        self.training = False
        self.requested = False
        self.signum: int = signal.SIGINT  # the first one that came
        self._insisted = self._raised = False
        self._before: Dict[int, Any] = {}

    def _handle(self, signum, frame) -> None:
        asked = signum in AT_ONCE
        if self.training and not (asked and self._insisted):
            self._insisted |= asked
            if not self.requested:
                self.requested, self.signum = True, signum
                tell("\nstopping after this step (once more: at once)")
            return
        if self._raised and not asked:
            return  # it is being stopped
        self._raised = True
        raise Interrupted(signum=signum)

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():  # Python allows it only there
            for signum in stop_signals():
                self._before[signum] = signal.getsignal(signum)
        self.take_over()
        return self

    def take_over(self) -> None:
        """Handle the signals again, inside the context: Lightning puts a handler of its own for
        SIGTERM before it trains, which ends the run after a validation without saving."""
        for signum in self._before:
            signal.signal(signum, self._handle)

    def __exit__(self, *exc) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class LastCheckpoint(Checkpoint):
    """``last.ckpt`` is the last step when training ends or is interrupted, whatever the intervals
    of other checkpoints. It is also refreshed every `every_n_train_steps`, and after `minutes`, so
    that little is lost if the machine goes down.

    It is written at the end of a step, inside its epoch: a run resumed from it goes on exactly as
    if it had not stopped.
    """

    def __init__(
        self,
        path,
        guard: Optional[InterruptGuard] = None,
        every_n_train_steps: Optional[int] = None,
        minutes: float = 5.0,
    ) -> None:
        self.path = Path(path)
        self.guard = guard or InterruptGuard()
        self.every_n_train_steps = every_n_train_steps
        self.minutes = minutes
        self._saved_step = 0  # nothing to save before the first step
        self._saved_at = time.monotonic()

    def _save(self, trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        trainer.save_checkpoint(self.path)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_start(self, trainer, pl_module) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self.guard.take_over()
        self.guard.training = True

    def _due(self, trainer) -> bool:
        step = trainer.global_step
        if trainer.max_steps != -1 and step >= trainer.max_steps:
            return True
        if self.every_n_train_steps and step % self.every_n_train_steps == 0:
            return True
        late = time.monotonic() - self._saved_at > 60 * self.minutes
        if trainer.world_size == 1:
            return late
        # processes must agree; asking at every step would cost more than it saves
        return step % 50 == 0 and trainer.strategy.broadcast(late)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        stop = trainer.strategy.reduce_boolean_decision(self.guard.requested, all=False)
        if stop or self._due(trainer):
            self._save(trainer)
        if stop:
            raise Interrupted(trainer.global_step, self.guard.signum)

    def on_train_end(self, trainer, pl_module) -> None:
        try:
            self._save(trainer)
        finally:
            self.guard.training = False

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.guard.training = False
