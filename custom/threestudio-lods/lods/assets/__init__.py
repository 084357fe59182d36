"""Assets of other programs: meshes and Gaussians from their files, and back.

    import lods.assets

    asset = lods.assets.read("chair.glb")  # lods.assets.Mesh, or lods.gaussians.Gaussians
    lods.assets.write("wooden.glb", changed, placement=asset.placement)

What is read is turned, centred and scaled as what is trained here; its ``placement`` puts the
result back into the scene that it came from. Nothing is imported before it is asked for.
"""

from typing import TYPE_CHECKING

from lods import lazy

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

__all__ = ["HALF_SIDE", "Mesh", "Placement", "bake", "read", "simplified", "write"]

__getattr__, __dir__ = lazy.attributes(__name__, _MODULES)
