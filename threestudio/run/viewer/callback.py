"""The live view as a callback, and the loop that shows a run that is not trained."""

import contextlib
import socket
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

import threestudio
from threestudio.run.interrupt import InterruptGuard
from threestudio.run.interventions import Interventions
from threestudio.run.viewer import server as servers
from threestudio.run.viewer.live import MAX_FAILURES, Live
from threestudio.run.viewer.options import ViewerOptions
from threestudio.utils.errors import UserError


class ViewerCallback(Callback):
    """Offers the view from the beginning of a training to its end. Of the training's time it takes
    what :class:`.budget.Budget` allows, between steps; nothing is drawn at random, and no state of
    the training is touched.

    It is among the callbacks before those that write checkpoints: a run that is stopped while it is
    paused is saved at the step it has waited at.
    """

    def __init__(
        self,
        options: ViewerOptions,
        listening: socket.socket,
        folder,
        guard: InterruptGuard,
        interventions: Interventions,
    ) -> None:
        self.options, self.folder, self.guard = options, Path(folder), guard
        self.listening = listening
        self.interventions = interventions
        self.server: servers.Server | None = None
        self.live: Live | None = None
        self._told: Path | None = None
        self._failures = 0
        self._paused_before = 0.0  # of a view that has been closed

    def _open(self, trainer: Any, system: Any, **options: Any) -> Live:
        self.server = servers.Server(self.options, self.listening, label="Live view")
        self.live = Live(self.server, system, trainer, self.folder, **options)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._told = servers.announce(self.folder, self.server)
        with tqdm.external_write_mode(file=sys.stdout):  # not at the end of a bar's line
            print(f"view: {self.server.url}", flush=True)
        if self.options.open:
            webbrowser.open(self.server.url)
        return self.live

    def _serve(self, call: Callable[[], None]) -> bool:
        """Let the view do what is due. What fails in it, whatever visitors have done, must not cost
        the run: it is a warning, and after MAX_FAILURES the end of the view. Whether it is open."""
        try:
            call()
        except Exception as error:
            self._failures += 1
            text = " ".join(str(error).split())[:200] or type(error).__name__
            threestudio.warn(f"the view failed: {text}")
            if self._failures >= MAX_FAILURES:
                self.close()
        return self.live is not None

    @property
    def paused_seconds(self) -> float:
        """How long the training has waited so far, because a visitor has paused it."""
        return self._paused_before + (self.live.paused_seconds if self.live is not None else 0.0)

    def _note_pause(self, trainer: Any, paused: bool) -> None:
        """Other programs, such as a studio, show that the run waits, and so does a progress bar. A
        full disk costs them that, and the run nothing."""
        for each in trainer.callbacks:
            if callable(note := getattr(each, "note_pause", None)):
                note(paused)
        if self.server is not None and self._told is not None:
            with contextlib.suppress(OSError):
                servers.announce(self.folder, self.server, paused)

    def close(self) -> None:
        """Stop serving, and remove ``viewer.json``; a second call changes nothing."""
        if self.live is not None:
            self.live.end()
            self._paused_before = self.paused_seconds
            self.live = None
        if self._told is not None:
            servers.withdraw(self._told)
            self._told = None
        if self.server is not None:
            self.server.stop()
            self.server = None

    # --- training ---------------------------------------------------------------------------------

    def on_train_start(self, trainer, pl_module) -> None:
        self._open(
            trainer,
            pl_module,
            interventions=self.interventions,
            stop=self.guard.request,
            must_end=lambda: self.guard.requested,
            note_pause=lambda paused: self._note_pause(trainer, paused),
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        taken = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # a step
        if self.live is not None and taken and not self._serve(self.live.between):
            threestudio.warn("the view is closed; the training goes on")

    def on_train_end(self, trainer, pl_module) -> None:
        if self.live is not None:
            self.live.finish()
        self.close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.close()

    def teardown(self, trainer, pl_module, stage: str) -> None:
        self.close()


class ShowCallback(ViewerCallback):
    """Serves a run that is not trained, from when its checkpoint is loaded until the process is
    asked to stop."""

    def on_predict_start(self, trainer, pl_module) -> None:
        live = self._open(trainer, pl_module)
        print("Ctrl-C ends it", flush=True)
        while self._serve(live.idle):  # until a signal raises Interrupted
            pass
        raise UserError("the view has failed again and again: the warnings above say why")
