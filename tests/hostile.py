"""Files that would run code if they were unpickled, for the tests that they are not."""

import io
import os
import pickle
from pathlib import Path

import torch


class Bomb:
    """An object whose unpickling creates the file ``marker``."""

    def __init__(self, marker):
        self.marker = Path(marker).resolve()

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)

    def exploded(self) -> bool:
        """Whether the marker is there; it is removed."""
        there = self.marker.exists()
        self.marker.unlink(missing_ok=True)
        return there

    def save(self, path, **content) -> Path:
        """A file of ``torch.save`` with `content` and the bomb in it; it is first read the naive
        way, to see that it goes off."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**content, "bomb": self}, path)
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
        assert self.exploded(), "the bomb is a dud: the test would notice nothing"
        return path

    def pickle(self, path) -> Path:
        """The bomb as a bare pickle; also tried first."""
        path = Path(path)
        path.write_bytes(pickle.dumps({"bomb": self}))
        pickle.loads(path.read_bytes())
        assert self.exploded(), "the bomb is a dud: the test would notice nothing"
        return path


def one_line(info) -> str:
    """The message of a caught error, which must be one line of a readable length."""
    text = str(info.value)
    assert text and "\n" not in text and len(text) < 900, text
    return text
