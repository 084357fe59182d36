"""Standard output and error."""

import sys


def print_anything() -> None:
    """Let standard output and error write what their encoding lacks, such as an accent in ASCII, as
    ``\\xe9``, where it would end the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
