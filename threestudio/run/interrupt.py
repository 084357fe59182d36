"""A run that is asked to stop: it ends with a checkpoint where that can be written."""

import signal
import threading
from typing import Any

from threestudio.run.signals import AT_ONCE, stop_signals, tell


class Interrupted(BaseException):
    """The user (SIGINT) or the system (SIGTERM and others) asked to stop. `step`: the step in
    last.ckpt, or None if none was saved for this. `status`: the exit status, 128 + the signal's
    number, as shells and schedulers know it (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, step: int | None = None, signum: int = signal.SIGINT) -> None:
        super().__init__(step, signum)
        self.step = step
        self.status = 128 + signum
        self.trained = False  # whether the training had ended before


class InterruptGuard:
    """Context in which the first signal that asks to stop (see
    :func:`threestudio.run.signals.stop_signals`) during training only sets `requested`, so that the
    step can be finished and saved. Outside training it raises :class:`Interrupted` where the
    program is, and so does a second SIGINT or SIGTERM; the others come more than once by
    themselves, as when a terminal is closed."""

    def __init__(self) -> None:
        self.training = False
        self.requested = False
        self.signum: int = signal.SIGINT  # the first one that came
        self._insisted = self._raised = False
        self._before: dict[int, Any] = {}

    def request(self) -> None:
        """Ask the training to stop after this step, as the first Ctrl-C does."""
        if self.training and not self.requested:
            self.requested, self.signum = True, signal.SIGINT

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
