"""Signals that ask a run to stop. Light: imported before torch is."""

import contextlib
import os
import signal
import threading
from typing import Any

# Ctrl-C; kill; a closed terminal; what schedulers send before they kill (SLURM, Grid Engine)
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # asked twice, these do not wait for the end of a step


def stop_signals() -> list[int]:
    """The signals that ask a run to stop, as far as this system has them. Those that the process
    was started to ignore stay ignored (``nohup``), but for the first two, which shells make a
    background job ignore without being asked."""
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [n for n in numbers if n in AT_ONCE or signal.getsignal(n) != signal.SIG_IGN]


class EarlySignal:
    """Context in which each of these signals, like SIGINT, raises KeyboardInterrupt: for the time
    when nothing is trained. `status` is the exit status that goes with the signal."""

    status = 128 + signal.SIGINT

    def _handle(self, signum, frame):
        self.status = 128 + signum
        raise KeyboardInterrupt

    def __enter__(self) -> "EarlySignal":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in stop_signals():
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def tell(line: str) -> None:
    """Write a line to standard error out of a signal handler, where the streams of Python may be in
    the middle of a write."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
