"""A run's folder, which may be somebody else's: only its plain files are read, and no more of them
than a page can use."""

import os
from pathlib import Path

from threestudio.run.snapshot import PlainFiles

MAX_TEXT = 1 << 20
MAX_NAMES = 100_000


class Folder:
    """The folder ``path``. Names in it are relative, with slashes."""

    def __init__(self, path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether it is a regular file, reached through no link, that can be read."""
        return name in PlainFiles(self.path)

    def names(self, inner: str) -> list[str]:
        """The plain files in a folder in it; none if that is missing or a link."""
        place = self.path / inner
        if place.is_symlink() or not place.is_dir():
            return []
        with os.scandir(place) as found:
            every = [entry.name for entry, _ in zip(found, range(MAX_NAMES))]
        return sorted(name for name in every if self.has(f"{inner}/{name}"))

    def folders(self, inner: str) -> list[str]:
        """The folders in a folder in it that are no links."""
        place = self.path / inner
        if place.is_symlink() or not place.is_dir():
            return []
        with os.scandir(place) as found:
            every = [
                e.name for e, _ in zip(found, range(MAX_NAMES)) if e.is_dir(follow_symlinks=False)
            ]
        return sorted(every)

    def text(self, name: str, most: int = MAX_TEXT) -> str:
        """The text of a file, at most ``most`` bytes of it; "" if it cannot be read."""
        if not self.has(name):
            return ""
        try:
            with open(self.path / name, "rb") as file:
                return file.read(most).decode("utf-8", "replace")
        except OSError:
            return ""
