"""Files that are whole or absent, and what is said of those that cannot be written."""

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_NAME = 300  # characters of a path in a line of text
# a run that goes on in the folder removes what killed processes of this host have left
_OWNER = f"{re.sub(r'[^A-Za-z0-9_]', '_', socket.gethostname())[:40]}-{os.getpid()}"


@contextlib.contextmanager
def whole_file(path) -> Iterator[Path]:
    """A temporary path beside ``path``, with its ending, to write to. It replaces ``path`` when the
    block ends; when the block fails it is removed, and ``path`` is as it was. Folders above it are
    made. The file has the permissions that the umask gives, whatever its writer makes of them.

    Raises:
        OSError: which names ``path``, where the disk is full, or the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{secrets.token_hex(4)}.{_OWNER}"
    partial = path.with_name(f".{path.stem[:60]}.{owner}.tmp{path.suffix}")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
        finally:
            os.close(handle)
        yield partial
        if stat.S_IMODE(os.stat(partial).st_mode) != mode:  # safetensors makes 0600 of it
            os.chmod(partial, mode)
        os.replace(partial, path)
    except Exception as error:
        known = _of_writing(error, partial)
        if known is None:
            raise
        raise OSError(*known, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # there is none, or the disk can only be read
            partial.unlink()


def _of_writing(error: Exception, partial: Path) -> tuple[int, str] | None:
    """The number and the text of an error in writing ``partial``; None for any other error."""
    if isinstance(error, OSError):
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if named and str(partial) not in named:
            return None
        # numpy's has no number: "20 requested and 7 written"
        return error.errno or errno.EIO, error.strerror or f"it cannot be written ({error})"
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has a kind of its own
    return (int(number[1]), os.strerror(int(number[1]))) if number else None


def told(error: OSError) -> str:
    """What went wrong with which file, for a line of text."""
    text = error.strerror or str(error) or type(error).__name__
    name = error.filename if isinstance(error.filename, str) else ""
    shown = name if len(name) <= MAX_NAME else f"{name[:60]}...{name[-60:]}"
    return f"{shown}: {text}" if name else text
