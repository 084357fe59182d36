"""Standard output and error: what they cannot write, and their other end, which may go away.

Light: imported before torch is.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def print_anything() -> None:
    """Let standard output and error write what their encoding lacks, such as an accent in ASCII, as
    ``\\xe9``, where it would end the run."""
    for stream in (sys.stdout, sys.stderr):
        # one that is closed, or whose reader is gone, fails here, and is looked after elsewhere
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")


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
