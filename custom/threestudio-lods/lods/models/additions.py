"""What a user adds to a frozen model: LoRA files (``model_lora``) and textual inversions
(``model_embeddings``). They are part of the model from then on: weights W of a LoRA's layers become
W + scale B A, and a method's own learned part stands on top of that, in a file of its own.

This file only reads the settings; importing it is light, and so is everything until weights are
wanted.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lods.models import checkpoint

LORA_FILE = "pytorch_lora_weights.safetensors"  # in a folder, as diffusers saves it
MAX_SCALE = 100.0
EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth")
_TOKEN = re.compile(r"\S{1,100}")


class Lora(NamedTuple):
    """A LoRA file, and the factor of its updates."""

    path: str
    scale: float

    def __str__(self) -> str:
        return f"{os.path.basename(self.path)}@{self.scale:g}"


class Inversion(NamedTuple):
    """The file of a textual inversion, and the word that means it; None: the file's own."""

    path: str
    token: str | None

    def __str__(self) -> str:
        return os.path.basename(self.path) + (f"@{self.token}" if self.token else "")


@dataclass(frozen=True)
class Additions:
    """All that is added to a model."""

    loras: tuple[Lora, ...] = ()
    inversions: tuple[Inversion, ...] = ()

    @classmethod
    def of(cls, loras: Any = None, inversions: Any = None, where: str = "") -> "Additions":
        """From the settings, each one entry or a list of them: ``path@scale`` and ``path@token``.
        ``where`` stands before their names ("system.guidance."). Raises ``ValueError``, one line,
        for what is no such entry, and for a file that is missing."""
        given = _entries(loras, f"{where}model_lora", "path@scale")
        words = _entries(inversions, f"{where}model_embeddings", "path@token")
        return cls(
            tuple(_lora(entry, f"{where}model_lora") for entry in given),
            tuple(_inversion(entry, f"{where}model_embeddings") for entry in words),
        )

    def __bool__(self) -> bool:
        return bool(self.loras or self.inversions)

    def __str__(self) -> str:
        return ", ".join(map(str, (*self.loras, *self.inversions)))

    def note(self) -> str:
        """A short text that is another one for other files, scales or words; "" for none."""
        if not self:
            return ""
        found = [
            {**checkpoint.identity(each.path), "as": each[1]}
            for each in (*self.loras, *self.inversions)
        ]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    def fuse(self, network: Any, part: str) -> None:
        """Add the LoRA files to a network that a pipeline of diffusers calls ``part``. Raises
        ``ValueError``, one line, for a file that does not fit."""
        if self.loras:
            from lods.models.frozen_lora import fuse

            for lora in self.loras:
                fuse(network, part, lora)

    def loader(self, load: Callable[..., Any], network: dict[str, Any]) -> Callable[..., Any]:
        """``load(cls, part, **options)`` of text parts, with what is added. ``network``: the
        configuration of the model's network."""
        from lods.models.added_text import AddedText

        return AddedText(self, load, network)

    def spelt_out(self, texts: Sequence[str]) -> list[str]:
        """The texts with a word of several vectors as so many words."""
        if not self.inversions:
            return list(texts)
        from lods.models.added_text import spelt_out

        return spelt_out(self, texts)


def _entries(given: Any, name: str, form: str) -> list[str]:
    if given is None:
        return []
    entries = [given] if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(entries, (list, tuple)) and type(entries).__name__ != "ListConfig":
        raise ValueError(f"{name} is {form}, or a list of such texts, not {str(given)[:60]!r}")
    for entry in entries:
        if not isinstance(entry, (str, os.PathLike)) or not os.fspath(entry):
            raise ValueError(f"an entry of {name} is {form}, not {str(entry)[:60]!r}")
    return [os.fspath(entry) for entry in entries]


def _lora(entry: str, name: str) -> Lora:
    path, _, number = entry.rpartition("@")
    scale = 1.0
    if path:
        try:
            scale = float(number)
        except ValueError:
            path = entry
        if not (math.isfinite(scale) and abs(scale) <= MAX_SCALE):
            raise ValueError(f"{name}: the scale of {entry!r} is not in [-100, 100]")
    else:
        path = entry
    if os.path.isdir(path):
        path = os.path.join(path, LORA_FILE)
    if path.lower().endswith(checkpoint.PICKLES):
        raise ValueError(f"{name}: {checkpoint.refuse_pickle(path)}")
    return Lora(_present(path, name), scale)


def _inversion(entry: str, name: str) -> Inversion:
    path, _, token = entry.rpartition("@")
    if not path or os.path.sep in token or os.path.isfile(entry):
        path, token = entry, ""
    if token and not _TOKEN.fullmatch(token):
        raise ValueError(f"{name}: {token[:60]!r} is not a word without spaces")
    if not path.lower().endswith(EMBEDDING_SUFFIXES):
        raise ValueError(f"{name}: {path!r} is none of {', '.join(EMBEDDING_SUFFIXES)}")
    return Inversion(_present(path, name), token or None)


def _present(path: str, name: str) -> str:
    if not os.path.isfile(path):
        raise ValueError(f"{name}: there is no file {path!r}, seen from {os.getcwd()}")
    return path
