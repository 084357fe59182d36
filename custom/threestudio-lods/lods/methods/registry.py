"""Methods by name, ours and those from outside."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from lods.settings import nearest

if TYPE_CHECKING:
    from lods.methods.base import Method

M = TypeVar("M", bound="type[Method]")

# the module of each method of this package, which is imported when it is asked for
BUILT_IN = {
    "lods-embedding": "lods_embedding",
    "lods-lora": "lods_lora",
    "lods-sds": "sds",
    "lods-csd": "csd",
    "lods-nfsd": "nfsd",
    "lods-vsd": "vsd",
    "lods-bridge": "bridge",
    "lods-sdi": "sdi",
    "lods-ism": "ism",
}
_methods: dict[str, "type[Method]"] = {}
_listeners: list[Callable[[str, "type[Method]"], None]] = []


def register(name: str) -> Callable[[M], M]:
    """Class decorator: enter a method under ``name``, for ``lods.load(name, ...)``; in a
    threestudio run it is ``guidance_type: <name>-guidance``. Raises ``ValueError`` if the name is
    taken."""

    def enter(cls: M) -> M:
        own = f"lods.methods.{BUILT_IN.get(name)}" == cls.__module__
        if name in _methods or (name in BUILT_IN and not own):
            raise ValueError(f"there is a method {name!r} already: choose another name")
        _methods[name] = cls
        for listener in _listeners:
            listener(name, cls)
        return cls

    return enter


def find(name: str) -> "type[Method]":
    """The method of this name; the ``lods-`` before ours may be left out, and an ending
    ``-guidance`` (of threestudio's registry) is ignored. Raises ``ValueError``, which names the
    nearest."""
    name = name.removesuffix("-guidance")
    for full in (name, f"lods-{name}"):
        if full in BUILT_IN:
            importlib.import_module(f"lods.methods.{BUILT_IN[full]}")
        if full in _methods:
            return _methods[full]
    raise ValueError(f"there is no method {name!r}{nearest(name, names())}: {', '.join(names())}")


def names() -> list[str]:
    """The names of all methods, those from outside last."""
    return list(dict.fromkeys([*BUILT_IN, *_methods]))


def on_register(listener: Callable[[str, "type[Method]"], None]) -> None:
    """Call ``listener(name, cls)`` for all methods, now and whenever one is registered."""
    for name in names():
        listener(name, find(name))
    _listeners.append(listener)
