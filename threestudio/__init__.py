"""A compact implementation of threestudio's public API: registry, configs, systems, data, models.

Written from the behaviour of https://github.com/threestudio-project/threestudio (0.2.3), so that
extensions written for it load here, on CPU and CUDA, with packages from PyPI only.

Importing it is light: torch, Lightning and the built-in classes are imported at the first use of
what needs them.
"""

import importlib
import logging
from typing import Any

from threestudio.utils import extensions
from threestudio.utils.errors import UnknownNameError, nearest

__version__ = "0.2.3"

_registered: dict = {}
_BUILT_IN = ("data", "models", "systems")
_OF_LIGHTNING = {
    "debug": "rank_zero_debug",
    "info": "rank_zero_info",
    "rank_zero_only": "rank_zero_only",
}


def _register_built_in() -> None:
    for package in _BUILT_IN:
        importlib.import_module(f"{__name__}.{package}")


def _modules() -> dict:
    """The registry as it is now: another one may have been put into ``__modules__``."""
    return globals().get("__modules__", _registered)


def __getattr__(name: str) -> Any:
    """What is made at its first use: ``__modules__`` with the built-in classes in it, the
    subpackages, and what logs (only Lightning's import sets its logger up, and knows the rank)."""
    if name in _BUILT_IN:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__modules__":
        _register_built_in()
        value: Any = _registered
    elif name in _OF_LIGHTNING or name == "logger":
        lightning = importlib.import_module("pytorch_lightning.utilities.rank_zero")
        if name == "logger":
            value = logging.getLogger("pytorch_lightning")
        else:
            value = getattr(lightning, _OF_LIGHTNING[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def warn(*args, **kwargs) -> None:
    """Log a warning, on the first process only."""
    from threestudio import logger, rank_zero_only

    if rank_zero_only.rank == 0:
        logger.warning(*args, **kwargs)


def register(name: str):
    """Class decorator: enter the class under `name` in the one registry of all kinds.

    Raises ``ValueError`` if the name is taken: two extensions would shadow each other silently.
    """

    def decorator(cls):
        if not getattr(cls, "__module__", "").startswith(f"{__name__}."):
            _register_built_in()  # first, so that their names are taken
        modules = _modules()
        if name in modules:
            raise ValueError(
                f"a module named {name!r} exists already, from {modules[name].__module__}, and "
                f"{cls.__module__} registers it too: rename one of them, or add _disabled to the "
                "name of one extension's folder"
            )
        modules[name] = cls
        return cls

    return decorator


def find(name: str):
    """The class registered as `name`.

    ``"main:a,b"`` composes a new class with the bases ``(a, b, main)``: the mixins `a` and `b`
    come first in the method resolution order. Raises :class:`UnknownNameError`, a ``KeyError``,
    which names the nearest registered name and the extensions that failed to load.
    """
    if ":" in name:
        main, mixins = name.split(":", 1)
        bases = tuple(find(mixin.strip()) for mixin in mixins.split(",")) + (find(main.strip()),)
        return type(f"{main}.{mixins}", bases, {})
    if not name:
        raise UnknownNameError("no name to look up: a *_type option of the config is empty")
    _register_built_in()
    modules = _modules()
    if name not in modules:
        message = f"no module is registered as {name!r}{nearest(name, modules)}"
        message += extensions.what_failed()
        if all(cls.__module__.startswith(f"{__name__}.") for cls in modules.values()):
            message += (
                " (no extension is loaded; those in custom/ are by "
                "threestudio.utils.extensions.load_custom_modules('custom'))"
            )
        raise UnknownNameError(message)
    return modules[name]


__all__ = [
    "__modules__",
    "__version__",
    "data",
    "debug",
    "find",
    "info",
    "logger",
    "models",
    "rank_zero_only",
    "register",
    "systems",
    "warn",
]
