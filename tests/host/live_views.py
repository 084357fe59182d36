"""Live views of runs and who visits them, for the tests beside this file."""

import time
from pathlib import Path

from pytorch_lightning.callbacks import Callback

from tests.view_client import Client
from threestudio.run.interrupt import InterruptGuard
from threestudio.run.interventions import Interventions
from threestudio.run.viewer import options, server
from threestudio.run.viewer.callback import ViewerCallback
from threestudio.utils.misc import capture_rng_state


def viewer(folder="run", guard=None, interventions=None, host=options.LOCAL):
    chosen = options.ViewerOptions(0, host)
    Path(folder).mkdir(exist_ok=True)
    guard = guard or InterruptGuard()
    changes = interventions or Interventions(folder)
    return ViewerCallback(chosen, server.listen(chosen), folder, guard, changes)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def arrived(view, count=1):
    """So many visitors, who look from where a camera begins, once they are there."""
    clients = [Client(view.server.port) for _ in range(count)]
    for client in clients:
        client.look()
    until(lambda: len(view.live.visitors) == count)
    return clients


class At(Callback):
    """Calls functions at the ends of steps."""

    def __init__(self, *done):
        self.done = done

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step <= len(self.done) and self.done[trainer.global_step - 1]:
            self.done[trainer.global_step - 1]()


class Heard(Callback):
    """Keeps what it is told of pauses."""

    def __init__(self, said):
        self.said, self.seconds = said, 0.0

    def on_train_start(self, trainer, pl_module):
        self.seconds = -time.monotonic()

    def on_train_end(self, trainer, pl_module):
        self.seconds += time.monotonic()

    def note_pause(self, paused):
        self.said.append(paused)


def state(system, trainer):
    found = {"system": system.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    return found | {"random": capture_rng_state()}
