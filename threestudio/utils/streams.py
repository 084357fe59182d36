"""Standard output and error."""

import contextlib
import sys


def print_anything() -> None:
    """Let standard output and error write what their encoding lacks, such as an accent in ASCII, as
    ``\\xe9``, where it would end the run."""
    for stream in (sys.stdout, sys.stderr):
        # one that is closed, or whose reader is gone, fails here, and is looked after elsewhere
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")
