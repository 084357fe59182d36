"""A resumed run continues bit for bit, whatever hooks a system or data module overrides."""

import contextlib
import random
from collections import deque

import numpy as np
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset

from threestudio.utils.base import update_if_possible
from threestudio.utils.misc import capture_rng_state, restore_rng_state
from threestudio.utils.typing import *

AHEAD = 2  # batch i is drawn before batch i - 1 starts: it sees updates up to batch i - 2's


class ExactResume(Callback):
    """Keeps the states of the global random generators in checkpoints and brings them back at the
    first step; undoes what a validation has drawn; and makes endless training data repeatable, see
    :class:`RepeatableLoader`.

    A callback and not hooks of the system: extensions override those, ``on_load_checkpoint`` above
    all, without calling the ones of the base class.
    """

    def __init__(self) -> None:
        self._to_restore: Optional[dict] = None
        self._after_step: Optional[dict] = None
        self._steps: deque = deque(maxlen=AHEAD)  # at which the last batches started

    def setup(self, trainer, pl_module, stage: str) -> None:
        data = trainer.datamodule
        if stage != "fit" or data is None or hasattr(data, "_loader_before_resume"):
            return
        make = data._loader_before_resume = data.train_dataloader

        def train_dataloader():
            loader = make()
            endless = isinstance(getattr(loader, "dataset", None), IterableDataset)
            if not (endless and isinstance(loader, DataLoader) and loader.num_workers == 0):
                return loader
            return RepeatableLoader(loader, data.trainer, list(self._steps))

        data.train_dataloader = train_dataloader

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self._to_restore is not None:
            restore_rng_state(self._to_restore)
            self._to_restore = None
            if trainer.global_rank:  # the file holds the first process's, and no two shall be alike
                _seed(torch.initial_seed(), trainer.global_rank, pl_module.global_step)
                if torch.cuda.is_available():
                    torch.cuda.manual_seed(torch.initial_seed())
        self._steps.append(pl_module.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        # here and not when a validation starts: by then its loaders have drawn their seeds
        self._after_step = capture_rng_state()

    def on_validation_end(self, trainer, pl_module) -> None:
        if self._after_step is not None:
            restore_rng_state(self._after_step)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: Dict[str, Any]) -> None:
        # a validation can write a checkpoint, and training must not see what it has drawn
        validating = self._after_step is not None and trainer.validating
        checkpoint["rng_state"] = self._after_step if validating else capture_rng_state()
        checkpoint["batch_steps"] = list(self._steps)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: Dict[str, Any]) -> None:
        # restored at the first step: until then, setting up still draws random numbers
        self._to_restore = checkpoint.get("rng_state")
        self._steps = deque(checkpoint.get("batch_steps", ()), maxlen=AHEAD)


class RepeatableLoader:
    """`loader`, of an endless dataset, made such that batch i depends on the seed of the run, on i
    and on the steps at which earlier batches started, and on nothing else: a resumed run sees the
    batches of the uninterrupted one.

    Batch i is drawn with global generators seeded for it, which are put back afterwards. It begins
    at the number of batches that the trainer has processed. `steps`: those of the last two batches
    before, which the dataset is updated to as it was then.
    """

    def __init__(self, loader: DataLoader, trainer, steps: List[int]) -> None:
        self.loader, self.trainer, self.seed = loader, trainer, torch.initial_seed()
        self.steps = [None] * (AHEAD - len(steps)) + steps

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while an instance is made by copying
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self):
        index = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        steps, self.steps = self.steps, []
        with own_random_numbers(self.seed, index):
            batches = iter(self.loader)  # draws a seed, which must not count as the first batch's
        while True:
            if steps and (step := steps.pop(0)) is not None:
                update_if_possible(self.loader.dataset, self.trainer.current_epoch, step)
            with own_random_numbers(self.seed, index):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            index += 1
            yield batch


def _seed(*key: int) -> None:
    """Seed the global generators of torch's CPU, numpy and Python by `key`."""
    a, b, c = (int(s) for s in np.random.SeedSequence(key).generate_state(3))
    torch.default_generator.manual_seed(a)
    np.random.seed(b)  # noqa: NPY002
    random.seed(c)


@contextlib.contextmanager
def own_random_numbers(seed: int, index: int):
    """Within this, the global generators of torch's CPU, numpy and Python give numbers that depend
    on `seed` and `index` only; afterwards they are as before."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        _seed(seed, index)
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
