"""``kernel``: ``numba.njit`` whose compiled code is kept in a private folder of the user.

Compiling the kernels takes about a minute, so what was compiled is kept. numba's own cache is a
pickle beside the source: whoever can write there runs code, and a damaged file ends the program.
Here the code is in ``threestudio-lods/kernels`` below ``$NUMBA_CACHE_DIR`` if that is set, else
below ``$XDG_CACHE_HOME`` or ``~/.cache``, one file for each function, types and processor:

* The two folders are made with mode 0700. Either is refused if it is a link, belongs to someone
  else, or can be written by others: that is what keeps others' code out.
* A file starts with a keyed checksum (HMAC-SHA256) of its name and content, and is unpickled only
  if that fits. The key lies in the same folder, so it tells damage and files from elsewhere, not
  somebody who can already write as this user.
* Whatever is wrong with a file, it is compiled and written anew. Where nothing can be kept, one
  warning says so, and the kernels are compiled at each start.

The name of a file has a digest of the function's source file and of those in its package that
this imports, so a changed helper or constant is compiled anew. What was not used for 90 days is
removed.

A threestudio extension must stand alone, so threestudio-lods has this file too; a test keeps the
two alike.
"""

import ast
import contextlib
import errno
import functools
import hashlib
import hmac
import inspect
import os
import pickle
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import compiler, serialize
from numba.core.caching import NullCache

import threestudio

FOLDERS = ("threestudio-lods", "kernels")
KEY, KEY_BYTES, MAC_BYTES = "key", 32, 32
ENDING = ".kernel"
MAX_BYTES = 1 << 26  # a kernel has some 100 KB
MAX_AGE = 90 * 24 * 3600.0  # seconds


def kernel(**options) -> Callable[[Callable], Callable]:
    """A decorator: ``numba.njit(**options)``, with :class:`KernelCache` for a cache."""

    def decorate(function: Callable) -> Callable:
        compiled = numba.njit(**options)(function)
        if hasattr(compiled, "_cache"):  # with NUMBA_DISABLE_JIT it is the function itself
            compiled._cache = KernelCache(function)  # type: ignore
        return compiled

    return decorate


def are_kept(kernels: Iterable[Any]) -> bool:
    """Whether each of these kernels need not be compiled, at least for some argument types."""
    return all(
        isinstance(cache := getattr(each, "_cache", None), KernelCache)
        and cache.holds(each.targetctx)
        for each in kernels
    )


class KernelCache(NullCache):
    """The cache of one function. Nothing that happens to its files raises."""

    def __init__(self, function: Callable) -> None:
        self._function = function

    def load_overload(self, sig, target_context):
        """numba's compile result for the argument types `sig`, or None: then numba compiles."""
        target_context.refresh()
        try:
            data = _fetch(self._name(sig, target_context.codegen()))
            if data is not None:
                return compiler.CompileResult._rebuild(target_context, *pickle.loads(data))
        except Exception as error:
            _tell(error)
        return None

    def save_overload(self, sig, result) -> None:
        """Keep the compile result for the argument types `sig`."""
        if result.library.has_dynamic_globals or result.lifted:  # of this process alone
            return
        try:
            _store(self._name(sig, result.codegen), serialize.dumps(result._reduce()))
        except Exception as error:
            _tell(error)

    def _name(self, sig, codegen) -> str:
        """A file name, different for everything that the machine code depends on."""
        types = hashlib.sha256(repr(sig).encode()).hexdigest()
        return f"{self._beginning(codegen)}{types[:20]}{ENDING}"

    def _beginning(self, codegen) -> str:
        """What the names have in common for all argument types."""
        function = self._function
        about = (
            *(function.__module__, function.__qualname__, _digest(inspect.getfile(function))),
            *(codegen.magic_tuple(), sys.implementation.cache_tag),
            *(numba.__version__, llvmlite.__version__),
        )
        digest = hashlib.sha256(repr(about).encode()).hexdigest()
        return f"{function.__name__[:60]}-{digest[:40]}-"

    def holds(self, target_context) -> bool:
        """Whether the code for any argument types is kept, as far as the names of files tell."""
        try:
            beginning = self._beginning(target_context.codegen())
            with _folder() as folder:
                return any(name.startswith(beginning) for name in os.listdir(folder))
        except Exception:  # told when the code is loaded or kept
            return False


# --- what a kernel is made of -------------------------------------------------------------------


@functools.cache
def _digest(file: str) -> str:
    """Of a source file and of those in its package that it imports, directly or through others."""
    found, waiting = {}, [Path(file)]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            text = path.read_bytes()
            found[path] = hashlib.sha256(text).hexdigest()
            waiting += _imported(text, path)
    each = sorted((path.name, sha) for path, sha in found.items())
    return hashlib.sha256(repr(each).encode()).hexdigest()


@functools.cache
def _imported(text: bytes, path: Path) -> list[Path]:
    """The files of the same package that the source file `path`, of this content, may import."""
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom))
    return [found for node in imports for found in _neighbours(node, path)]


def _neighbours(node: ast.ImportFrom, path: Path) -> list[Path]:
    """The files of the same package that an import of a source file may mean."""
    words = node.module.split(".") if node.module else []
    folder = path.parent
    if node.level == 0:
        while (folder / "__init__.py").is_file() and words[:1] != [folder.name]:
            folder = folder.parent
        if words[:1] != [folder.name]:
            return []  # of another package
        folder = folder.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    module = folder.joinpath(*words)
    return [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]


# --- the folder ---------------------------------------------------------------------------------


def _base() -> str:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return os.path.abspath(chosen)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # its specification says to ignore others
        return xdg
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise OSError(errno.ENOENT, "there is no home folder")
    return os.path.join(home, ".cache")


@contextlib.contextmanager
def _folder() -> Iterator[int]:
    """A handle of the private folder, which is made if need be; ``OSError`` if none is to be had.
    All that follows goes through the handle: what was checked is what is used."""
    if os.name != "posix":
        raise OSError(errno.ENOTSUP, "folders have no owners and modes on this system")
    path = _base()
    os.makedirs(path, mode=0o700, exist_ok=True)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in FOLDERS:
            path = os.path.join(path, name)
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=handle)
            outer, handle = handle, _open_private(name, handle, path)
            os.close(outer)
        yield handle
    finally:
        os.close(handle)


def _open_private(name: str, outer: int, path: str) -> int:
    try:
        handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise OSError(error.errno, "it is a link or a file, not a folder", path) from None
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    found = os.fstat(handle)
    reason = "it belongs to another user" if found.st_uid != os.geteuid() else ""
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = reason or "others can write to it (chmod go-w helps)"
    if reason:
        os.close(handle)
        raise OSError(errno.EPERM, reason, path)
    return handle


# --- files --------------------------------------------------------------------------------------


def _read(folder: int, name: str) -> bytes | None:
    """A regular file's content, up to MAX_BYTES; None if there is none that can be read."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        with open(handle, "rb", closefd=False) as file:
            return file.read(MAX_BYTES)
    except OSError:
        return None
    finally:
        os.close(handle)


def _write(folder: int, name: str, data: bytes) -> None:
    """Replace a file by a whole one."""
    partial = f".{name}-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(os.open(partial, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(data)
        try:
            os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
        except IsADirectoryError:  # which is put aside
            os.rename(name, f"{partial}-found", src_dir_fd=folder, dst_dir_fd=folder)
            os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise


def _mac(key: bytes, name: str, data: bytes) -> bytes:
    return hmac.digest(key, name.encode() + b"\0" + data, "sha256")


def _fetch(name: str) -> bytes | None:
    """What was stored under `name`; None if it is not there or not whole."""
    with _folder() as folder:
        key, content = _read(folder, KEY), _read(folder, name)
        if key is None or content is None or len(key) != KEY_BYTES:
            return None
        mac, data = content[:MAC_BYTES], content[MAC_BYTES:]
        if not hmac.compare_digest(mac, _mac(key, name, data)):
            return None
        with contextlib.suppress(OSError):  # for _sweep: it is in use
            os.utime(name, dir_fd=folder, follow_symlinks=False)
        return data


def _store(name: str, data: bytes) -> None:
    with _folder() as folder:
        key = _read(folder, KEY)
        if key is None or len(key) != KEY_BYTES:
            _write(folder, KEY, secrets.token_bytes(KEY_BYTES))
            key = _read(folder, KEY) or b""  # another process may have made one at the same time
        _write(folder, name, _mac(key, name, data) + data)
        _sweep(folder)


def _sweep(folder: int) -> None:
    """Remove what was not used for long, and what killed processes have left."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            ours = entry.name.endswith(ENDING) or entry.name.startswith(".")
            with contextlib.suppress(OSError):
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if ours and age > MAX_AGE:
                    os.unlink(entry.name, dir_fd=folder)


def missing() -> str:
    """Why compiled kernels cannot be kept, and what to do; empty if they can."""
    try:
        with _folder():
            return ""
    except OSError as error:
        return _why(error)


_told = False


def _tell(error: Exception) -> None:
    """One warning in the life of a process."""
    global _told
    if not _told:
        _told = True
        threestudio.warn(_why(error))


def _why(error: Exception) -> str:
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    return (
        f"compiled kernels are not kept ({where}{reason}), so each start compiles them anew, "
        "which takes about a minute; NUMBA_CACHE_DIR=... chooses another folder"
    )
