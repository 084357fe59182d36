"""Validation, test and export with several processes, which divide the views among themselves."""

import functools
import time

import torch
from pytorch_lightning.callbacks import Callback

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

HOOKS = tuple(
    f"on_{stage}_{end}"
    for stage in ("validation", "test", "predict")
    for end in ("epoch_end", "end")
)
_POLL = 0.02  # seconds


class Turn:
    """One run of a hook on all processes: what the first one has written, the others can wait for.

    They wait for it and it never waits for them, so that a hook may do something on one process
    only. What is written is noted in the store of the process group, under the hook's `number`.
    """

    def __init__(self, number: int, first: bool) -> None:
        self.first = first
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._prefix = f"threestudio/turn-{number}"

    def note(self, filename: str) -> None:
        """The first process is done with this file, written or not."""
        self._store.set(f"{self._prefix}/{filename}", "done")

    def finish(self) -> None:
        """The first process is at the end of its hook."""
        self._store.set(self._prefix, "done")

    def wait(self, filename: str) -> None:
        """Wait until the first process is done with this file, or with its hook."""
        keys = f"{self._prefix}/{filename}", self._prefix
        while not any(self._store.check([key]) for key in keys):
            time.sleep(_POLL)


class TogetherAtTheEnds(Callback):
    """Lets the processes begin and end the HOOKS of a system together.

    A system makes its video and its sheets in these hooks, of files that the steps have written on
    all processes. So a hook begins when the steps of all processes are done, and ends when it has
    ended on all of them, with an error on each if there was one on any. In between, ``save_*``
    writes on the first process and waits for it on the others (see :class:`SaverMixin`).

    The hooks are replaced in the instance, since systems override them without calling the ones of
    the base class. With one process nothing is done.
    """

    def __init__(self) -> None:
        self._turns = 0

    def setup(self, trainer, pl_module, stage: str) -> None:
        if trainer.world_size > 1:
            for name in HOOKS:
                if name not in vars(pl_module):
                    setattr(pl_module, name, self._together(trainer, pl_module, name))

    def teardown(self, trainer, pl_module, stage: str) -> None:
        for name in HOOKS:
            if getattr(vars(pl_module).get(name), "together", False):
                delattr(pl_module, name)

    def _together(self, trainer, pl_module, name: str) -> Callable:
        hook = getattr(pl_module, name)

        @functools.wraps(hook)
        def wrapper(*args, **kwargs):
            if pl_module._turn is not None:  # one of these hooks has called another
                return hook(*args, **kwargs)
            trainer.strategy.barrier(name)
            self._turns += 1
            turn = pl_module._turn = Turn(self._turns, trainer.is_global_zero)
            error = result = None
            try:
                result = hook(*args, **kwargs)
            except Exception as raised:
                error = raised
            finally:
                pl_module._turn = None
                if turn.first:
                    turn.finish()
            good = trainer.strategy.reduce_boolean_decision(error is None, all=True)
            if error is not None:
                raise error
            if not good:
                raise UserError(f"{name} has failed in another process, which says why")
            return result

        wrapper.together = True
        return wrapper
