"""A compact implementation of threestudio's public API: registry, configs, systems, data, models.

Written from the behaviour of https://github.com/threestudio-project/threestudio (0.2.3), so that
extensions written for it load here, on CPU and CUDA, with packages from PyPI only.
"""

import logging

from pytorch_lightning.utilities.rank_zero import (
    rank_zero_debug,
    rank_zero_info,
    rank_zero_only,
)

from threestudio.utils import extensions
from threestudio.utils.errors import UnknownNameError, nearest

__version__ = "0.2.3"
__modules__: dict = {}

logger = logging.getLogger("pytorch_lightning")
debug = rank_zero_debug
info = rank_zero_info


@rank_zero_only
def warn(*args, **kwargs) -> None:
    """Log a warning, on the first process only."""
    logger.warning(*args, **kwargs)


def register(name: str):
    """Class decorator: enter the class under `name` in the one registry of all kinds.

    Raises ``ValueError`` if the name is taken: two extensions would shadow each other silently.
    """

    def decorator(cls):
        if name in __modules__:
            raise ValueError(
                f"a module named {name!r} exists already, from {__modules__[name].__module__}, and "
                f"{cls.__module__} registers it too: rename one of them, or add _disabled to the "
                "name of one extension's folder"
            )
        __modules__[name] = cls
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
    if name not in __modules__:
        message = f"no module is registered as {name!r}{nearest(name, __modules__)}"
        for extension, error in extensions.failed.items():
            message += f" (extension {extension!r} failed to load: {extensions.last_line(error)})"
        raise UnknownNameError(message)
    return __modules__[name]


# Last: the subpackages register their classes with the names above.
from threestudio import data, models, systems  # noqa: E402

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
