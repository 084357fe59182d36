"""Signals that ask a run to stop, and standard streams whose other end goes away.

Light: imported before torch is.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
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


class _Steady:
    """A text stream that goes on as if nothing had happened when it cannot be written any more:
    its reader is gone, its terminal closed, its disk full."""

    def __init__(self, stream) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self):
        return iter(self._stream)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines) -> None:
        self._try(self._stream.writelines, lines)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, method, *args) -> None:
        try:
            method(*args)
        except OSError:
            # what is still in the buffers of Python, or of a library in C, goes nowhere
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()
        except ValueError:  # it was closed
            if not self._stream.closed:
                raise


def _open_missing() -> None:
    """A standard stream that is closed gets the null device: or the next file that is opened takes
    its number, and whatever a library in C prints goes into that file."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            os.set_inheritable(number, True)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Within this, nothing that happens to standard output or standard error ends the program, or
    reaches another file."""
    _open_missing()
    before = sys.stdout, sys.stderr
    steady = []
    for name, stream in zip(("stdout", "stderr"), before):
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (libraries may keep it)
        steady.append(_Steady(stream))
        setattr(sys, name, steady[-1])
    try:
        yield
    finally:
        for stream in steady:
            stream.flush()  # here, where a failure is not the exit status of Python
        for name, stream, mine in zip(("stdout", "stderr"), before, steady):
            if getattr(sys, name) is mine:
                setattr(sys, name, stream)
