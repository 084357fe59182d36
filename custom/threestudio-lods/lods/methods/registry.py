"""Methods by name, ours and those from outside."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from lods.settings import nearest

if TYPE_CHECKING:
    from lods.methods.base import Method

M = TypeVar("M", bound="type[Method]")

_methods: dict[str, "type[Method]"] = {}
_listeners: list[Callable[[str, "type[Method]"], None]] = []


def register(name: str) -> Callable[[M], M]:
    """Class decorator: enter a method under ``name``, for ``lods.load(name, ...)``; in a
    threestudio run it is ``guidance_type: <name>-guidance``. Raises ``ValueError`` if another
    class has the name; the same class anew, as when a notebook's cell is run again, replaces the
    old one."""

    def enter(cls: M) -> M:
        if not is_ours(cls):
            _import_ours()  # so that their names are known to be taken
            _check(name, cls)
        if name in _methods and not _is_anew(cls, _methods[name]):
            raise ValueError(
                f"there is a method {name!r} already, in {_methods[name].__module__}: choose "
                "another name"
            )
        _methods[name] = cls
        for listener in _listeners:
            listener(name, cls)
        return cls

    return enter


def _check(name: str, cls: type) -> None:
    """Refuse what ``lods.load`` could not find, or what could not be configured."""
    from lods.methods.base import Method
    from lods.models.memory import ModelSettings
    from lods.prompts import TextSettings

    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{name!r} is no name of a method: it has letters, digits, - _ . and +")
    if name.endswith("-guidance"):
        raise ValueError(f"the name of a method does not end in -guidance, as {name!r} does")
    if f"lods-{name}" in _methods:
        raise ValueError(f"{name!r} is a short name of 'lods-{name}': choose another name")
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"the method {name!r} is no subclass of lods.Method")
    config = cls.Config
    if not issubclass(config, Method.Config) or (
        inspect.get_annotations(config) and "__dataclass_fields__" not in vars(config)
    ):
        raise ValueError(
            f"the Config of {cls.__name__} must be a @dataclass that extends lods.Method.Config"
        )
    taken = {f.name for part in (ModelSettings, TextSettings) for f in dataclasses.fields(part)}
    for field in dataclasses.fields(config):
        if field.name in taken:
            raise ValueError(
                f"{cls.__name__} has a setting {field.name!r}, which is one of the model's or of "
                "the texts' already: choose another name"
            )


def _is_anew(cls: type, before: type) -> bool:
    """Whether a class from outside is defined a second time."""
    same = (cls.__module__, cls.__qualname__) == (before.__module__, before.__qualname__)
    return same and not is_ours(cls)


def is_ours(cls: type) -> bool:
    """Whether a method is of this package."""
    return cls.__module__.startswith("lods.methods.")


@functools.cache
def _import_ours() -> None:
    """Import every file of this folder: one that holds a method registers it."""
    for module in pkgutil.iter_modules(importlib.import_module("lods.methods").__path__):
        importlib.import_module(f"lods.methods.{module.name}")


def find(name: str) -> "type[Method]":
    """The method of this name; the ``lods-`` before ours may be left out, and an ending
    ``-guidance`` (of threestudio's registry) is ignored. Raises ``ValueError``, which names the
    nearest."""
    _import_ours()
    if not isinstance(name, str):
        raise ValueError(f"a method is named by a text, not by {name!r}: {', '.join(names())}")
    name = name.removesuffix("-guidance")
    for full in (name, f"lods-{name}"):
        if full in _methods:
            return _methods[full]
    known = [*names(), *(full.removeprefix("lods-") for full in names())]
    raise ValueError(f"there is no method {name!r}{nearest(name, known)}: {', '.join(names())}")


def names() -> list[str]:
    """The names of all methods, those from outside last."""
    _import_ours()
    return sorted(_methods, key=lambda name: (not is_ours(_methods[name]), name))


def ours() -> "dict[str, type[Method]]":
    """The methods of this package by name."""
    _import_ours()
    return {name: cls for name, cls in _methods.items() if is_ours(cls)}


def on_register(listener: Callable[[str, "type[Method]"], None]) -> None:
    """Call ``listener(name, cls)`` for all methods, now and whenever one is registered."""
    for name in names():
        listener(name, find(name))
    _listeners.append(listener)
