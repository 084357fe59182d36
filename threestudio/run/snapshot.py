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

from threestudio.run.git import NoGit, tracked_files
from threestudio.utils.files import whole_file

MAX_BYTES = 1_000_000  # larger files are weights or pictures
# what an extension that git does not track consists of; not what may hold keys, such as YAML
CODE = {".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".glsl"}


class PlainFiles:
    """Tells the plain files in `folder` from links and the rest; each folder between the two is
    looked at once."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self._linked = {"": False}  # a folder in `folder` -> whether it is a link, or behind one

    def __contains__(self, name: str) -> bool:
        """Whether ``folder/name`` is a regular file that can be read, and neither it nor a folder
        between the two is a link. One that leads out of `folder`, or to what git keeps for itself,
        is none: the list of a repository from somebody else can hold such names."""
        if os.path.isabs(name) or {"..", ".git"} & {p.lower() for p in Path(name).parts}:
            return False
        path = os.path.join(self.folder, name)
        try:
            linked = self._is_linked(os.path.dirname(name))
            regular = stat.S_ISREG(os.lstat(path).st_mode)
        except (OSError, ValueError):
            return False
        return regular and not linked and os.access(path, os.R_OK)

    def _is_linked(self, inner: str) -> bool:
        if inner not in self._linked:
            own = stat.S_ISLNK(os.lstat(os.path.join(self.folder, inner)).st_mode)
            self._linked[inner] = own or self._is_linked(os.path.dirname(inner))
        return self._linked[inner]


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
    plain, made = PlainFiles(source), set()
    for name in names:
        if name not in plain:
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
        if path.parent not in made:
            make_plain_folder(target, path.parent)
            made.add(path.parent)
        # what is not for all stays so
        allowed = 0o777 if mode & stat.S_IROTH else stat.S_IMODE(mode) & 0o770
        if not is_copy(path, data, allowed):
            with whole_file(path, allowed=allowed) as tmp:
                tmp.write_bytes(data)


def is_copy(path: Path, data: bytes, allowed: int) -> bool:
    """Whether ``path`` is a regular file, no link, of this content and no further permissions."""
    try:
        found = path.lstat()
        plain = stat.S_ISREG(found.st_mode) and not stat.S_IMODE(found.st_mode) & ~allowed
        return plain and found.st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _open_plain(path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def make_plain_folder(root, folder) -> None:
    """Make `folder`, which is `root` or in it. Raises ``OSError`` where one of these is a link."""
    root, folder = Path(root), Path(folder)
    for path in reversed([p for p in (folder, *folder.parents) if p == root or root in p.parents]):
        if path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "it is a link", str(path))
    os.makedirs(folder, exist_ok=True)
