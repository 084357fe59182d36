"""Checkpoints that are whole or absent, and a last checkpoint that is the last step."""

import os
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *


def _is_whole(path: Path) -> bool:
    """Whether the checkpoint's archive is complete and its checksums agree, at which torch does
    not look; one that is compressed is not torch's, and could be of any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
            return stored and archive.testzip() is None
    except Exception:  # whatever the reader stumbles over
        return False


def _newest_good_sibling(path: Path) -> Optional[Path]:
    others = [p for p in path.parent.glob("*.ckpt") if p.name != path.name]
    by_age = sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)
    return next((p for p in by_age if _is_whole(p)), None)


def read_checkpoint(path, map_location=None) -> dict:
    """Load a checkpoint: tensors and plain values only, never code (``weights_only``).

    Raises :class:`UserError`, one line, for a missing or unreadable file; it names the newest
    readable checkpoint of the same folder, if there is one.
    """
    path = Path(path)
    if not path.is_file():
        problem = f"checkpoint {path} not found"
    elif not _is_whole(path):
        problem = f"checkpoint {path} is truncated or damaged"
    else:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds; it is the contents that are refused
            detail = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {path} cannot be loaded: {detail}") from error
    good = _newest_good_sibling(path) if path.parent.is_dir() else None
    raise UserError(problem + (f": the newest good one beside it is {good}" if good else ""))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's file access, such that a checkpoint is never half written and never executes
    code when it is read.

    A file is written beside its place, flushed to the disk and then renamed over it: a crash or a
    full disk leaves the old one. What could not be read back is refused when it is written.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options is not supported")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(tmp, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            self._refuse_unsafe(tmp, path)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
        if os.name == "posix":  # the rename is on the disk only once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

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
    """The user (SIGINT) or the system (SIGTERM) asked to stop. `step`: the step in last.ckpt, or
    None if none was saved."""

    def __init__(self, step: Optional[int] = None) -> None:
        super().__init__(step)
        self.step = step


class InterruptGuard:
    """Context in which the first SIGINT or SIGTERM during training only sets `requested`, so that
    the step can be finished and saved; a second one, or one outside training, raises
    :class:`Interrupted` where the program is."""

    def __init__(self) -> None:
        self.training = False
        self.requested = False
        self._before: Dict[int, Any] = {}

    def _handle(self, signum, frame) -> None:
        if self.training and not self.requested:
            self.requested = True
            print("\nstopping after this step (once more: at once)", file=sys.stderr, flush=True)
            return
        raise Interrupted

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():  # Python allows it only there
            for signum in (signal.SIGINT, signal.SIGTERM):
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
        # processes must agree; asking at every step would cost more than it saves
        return step % 50 == 0 and trainer.strategy.broadcast(late)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        stop = trainer.strategy.reduce_boolean_decision(self.guard.requested, all=False)
        if stop or self._due(trainer):
            self._save(trainer)
        if stop:
            raise Interrupted(trainer.global_step)

    def on_train_end(self, trainer, pl_module) -> None:
        self.guard.training = False
        self._save(trainer)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.guard.training = False
