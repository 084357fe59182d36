"""Files that are whole or absent, and the errors of a disk that takes no more."""

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from threestudio.utils.typing import *

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM}
NO_FOLDER = {errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_HOST = re.sub(r"\W", "_", socket.gethostname())[:40]  # a pid means nothing on another
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>\w*)-(?P<pid>\d+)\.tmp(\.\w+)?")


@contextlib.contextmanager
def whole_file(
    path, sync: bool = False, keep_suffix: bool = False, allowed: int = 0o777
) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It replaces `path` when the block ends, and is
    removed when the block fails, so that a crash or a full disk leaves the old file.

    ``sync``: the contents are on the disk before the name is. ``keep_suffix``: the temporary name
    ends like `path`, for writers that choose the format by it. The file is one that no other
    process has, and has the permissions that the umask gives, whatever its writer makes of them;
    of these only the bits in ``allowed``.
    Errors of the disk get the name of `path`, which those of a write lack.
    """
    path = Path(path)
    suffix = path.suffix if keep_suffix else ""
    name = (path.stem if keep_suffix else path.name).encode(errors="replace")
    name = name[:180].decode(errors="ignore")
    owner = f"{secrets.token_hex(4)}.{_HOST}-{os.getpid()}"
    tmp = path.with_name(f".{name}.{owner}.tmp{suffix}")
    try:
        handle = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 & allowed)
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
        finally:
            os.close(handle)
        yield tmp
        if stat.S_IMODE(os.stat(tmp).st_mode) != mode:  # safetensors makes 0600 of it
            os.chmod(tmp, mode)
        if sync:
            _flush(tmp, os.O_RDWR)
        os.replace(tmp, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            tmp.unlink()
        known = disk_error(error) if isinstance(error, Exception) else None
        named = [str(n) for n in (known and known.filename, known and known.filename2) if n]
        if known is not None and (not named or str(tmp) in named):
            raise OSError(known.errno, os.strerror(known.errno), str(path)) from error
        raise
    if sync and os.name == "posix":  # the rename is on the disk only once its folder is
        _flush(path.parent, os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder, size: int = 1 << 16) -> None:
    """Raise the ``OSError`` of writing `size` bytes in `folder`, if it cannot be done: for writers
    that fail without a reason."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
        file.flush()


def remove_leftovers(folder) -> None:
    """Remove the temporary files that killed processes of this host have left under `folder`."""
    for path in Path(folder).rglob(".*.tmp*"):
        found = _LEFTOVER.fullmatch(path.name)
        if found and found["host"] == _HOST and not _is_running(int(found["pid"])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a number that was used before: nothing is being written yet
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def disk_error(error: Optional[BaseException]) -> Optional[OSError]:
    """The full, read-only or failing disk behind `error`: itself, what it came from (torch and
    imageio raise a RuntimeError of their own on top), or what its text tells (safetensors)."""
    kinds, seen = FULL | FORBIDDEN | {errno.EROFS, errno.EIO}, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in kinds:
            return error
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number and int(number[1]) in kinds:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def disk_advice(error: OSError) -> str:
    """What went wrong with which file, and what to do, in one line."""
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{os.strerror(error.errno) if error.errno else error}"
    if error.errno in FULL:
        return f"{text}: free some space, or write to another disk with exp_root_dir=..."
    if error.errno in FORBIDDEN:
        return f"{text}: change its permissions, or use another (for the output: exp_root_dir=...)"
    if error.errno in NO_FOLDER:
        return f"{text}: choose a folder that can be written, with exp_root_dir=..."
    return f"{text}: look after this disk, or write to another one with exp_root_dir=..."
