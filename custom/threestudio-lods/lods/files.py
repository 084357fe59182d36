"""Files that are whole or absent."""

import contextlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

# a run that goes on in the folder removes what killed processes of this host have left
_OWNER = f"{re.sub(r'[^A-Za-z0-9_]', '_', socket.gethostname())[:40]}-{os.getpid()}"


@contextlib.contextmanager
def whole_file(path) -> Iterator[Path]:
    """A temporary path beside ``path``, with its ending, to write to. It replaces ``path`` when the
    block ends; when the block fails it is removed, and ``path`` is as it was. Folders above it are
    made. The file has the permissions that the umask gives, whatever its writer makes of them."""
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
    finally:
        partial.unlink(missing_ok=True)
