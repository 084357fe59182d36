"""Assets of other programs: meshes and Gaussians from their files, and back.

    import lods.assets

    asset = lods.assets.read("chair.glb")  # lods.assets.Mesh, or lods.gaussians.Gaussians
    lods.assets.write("wooden.glb", changed, placement=asset.placement)

What is read is turned, centred and scaled as what is trained here; its ``placement`` puts the
result back into the scene that it came from. Nothing is imported before it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lods.assets.baking import bake, simplified
    from lods.assets.mesh import Mesh
    from lods.assets.placement import HALF_SIDE, Placement
    from lods.assets.reading import read
    from lods.assets.writing import write

_MODULES = {
    "baking": ("bake", "simplified"),
    "mesh": ("Mesh",),
    "placement": ("HALF_SIDE", "Placement"),
    "reading": ("read",),
    "writing": ("write",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["HALF_SIDE", "Mesh", "Placement", "bake", "read", "simplified", "write"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
