"""What the commands of the study have in common: how they are called, and how they end."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from threestudio.utils.errors import UserError


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m evaluation.NAME``, described by the last paragraph of its module's
    docstring."""
    description = (doc or "").split("\n\n")[-1]
    return argparse.ArgumentParser(prog=f"python -m evaluation.{name}", description=description)


def write_files(make: Callable[[], Sequence[Path]]) -> int:
    """Call ``make`` and say which files it returns. Returns the exit status: 0, or 2 after one line
    that says what was wrong, where it raised :class:`UserError` or a file failed."""
    try:
        files = make()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    print("wrote " + " and ".join(map(str, files)))
    return 0
