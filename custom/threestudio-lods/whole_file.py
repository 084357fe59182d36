"""Files that are whole or absent."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

# a run that goes on in the folder removes what killed processes of this host have left
_OWNER = f"{re.sub(r'[^A-Za-z0-9_]', '_', socket.gethostname())[:40]}-{os.getpid()}"


@contextlib.contextmanager
def whole_file(path) -> Iterator[Path]:
    """A temporary path beside ``path``, with its ending, to write to. It replaces ``path`` when the
    block ends; when the block fails it is removed, and ``path`` is as it was. Folders above it are
    made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem[:60]}.{_OWNER}.tmp{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
