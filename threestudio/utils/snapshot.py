"""Copies of the code that a run is made with: of what git tracks, and of the loaded extensions.

The folder of a run is shared, so what is not code stays out of it: untracked files (keys, ``.env``)
and whatever a link points to. Nothing is written through a link either: a run's folder may be
somebody else's.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from threestudio.utils.files import whole_file
from threestudio.utils.git import NoGit, tracked_files

MAX_BYTES = 1_000_000  # larger files are weights or pictures
# what an extension that git does not track consists of; not what may hold keys, such as YAML
CODE = {".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".glsl"}


def is_plain(folder, name: str) -> bool:
    """Whether ``folder/name`` is a regular file that can be read, and neither it nor a folder
    between the two is a link."""
    path = Path(folder, name)
    try:
        between = [p for p in path.parents if Path(folder) in p.parents]
        linked = any(stat.S_ISLNK(p.lstat().st_mode) for p in between)
        regular = stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
    return regular and not linked and os.access(path, os.R_OK)


def is_linked(extension: Path) -> bool:
    """Whether an extension is reached through a link: itself, or the folder of extensions."""
    return extension.is_symlink() or extension.parent.is_symlink()


def extension_files(path: Path) -> Iterator[str]:
    """The files of an extension, relative to its folder (of one that is a file, its name): those
    that git tracks, and code. None of one that is a link."""
    if is_linked(path):
        return
    if path.is_file():
        yield path.name
        return
    found = set()
    with contextlib.suppress(NoGit):
        found.update(tracked_files(path))
    for folder, inner, names in os.walk(path):  # which does not follow links
        inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
        code = [name for name in names if Path(name).suffix in CODE and not name.startswith(".")]
        found.update(os.path.relpath(os.path.join(folder, name), path) for name in code)
    yield from sorted(found)


def copy_files(source, names: Iterable[str], target, part="") -> None:
    """Copy the plain files ``source/name`` that are not large to ``target/part/name``.

    One that cannot be read is left out. Raises ``OSError`` where `target`, or a folder in it, is a
    link.
    """
    for name in names:
        if not is_plain(source, name):
            continue
        try:
            with open(Path(source, name), "rb", opener=_open_plain) as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(MAX_BYTES + 1)
        except OSError:
            continue
        if len(data) > MAX_BYTES:
            continue
        path = Path(target, part, name)
        make_plain_folder(target, path.parent)
        with whole_file(path) as tmp:
            tmp.write_bytes(data)
            if not mode & stat.S_IROTH:
                tmp.chmod(stat.S_IMODE(mode) & 0o770)  # what is not for all stays so


def _open_plain(path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def make_plain_folder(root, folder) -> None:
    """Make `folder`, which is `root` or in it. Raises ``OSError`` where one of these is a link."""
    root, folder = Path(root), Path(folder)
    for path in reversed([p for p in (folder, *folder.parents) if p == root or root in p.parents]):
        if path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "it is a link", str(path))
    os.makedirs(folder, exist_ok=True)
