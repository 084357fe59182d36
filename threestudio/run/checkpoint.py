"""Checkpoints that are whole or absent, and a last checkpoint that is the last step."""

import os
import time
from pathlib import Path

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

import threestudio
from threestudio.run.interrupt import Interrupted, InterruptGuard
from threestudio.utils.checkpoint_files import is_checkpoint_of, read_checkpoint
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file


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
        guard: InterruptGuard | None = None,
        every_n_train_steps: int | None = None,
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
