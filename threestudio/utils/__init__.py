"""Helpers shared by the data, models and systems."""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """A module of this package at its first use, ``threestudio.utils.misc`` for example."""
    full = f"{__name__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
