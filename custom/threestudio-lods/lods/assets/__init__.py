"""Assets of other programs: meshes and Gaussians from their files, and back."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lods.assets.mesh import Mesh

_HOMES = {"Mesh": "mesh"}

__all__ = ["Mesh"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
