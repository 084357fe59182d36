"""Textured meshes on a CPU or a GPU, without a host: to read, draw, train and write.

    import lods.meshes

    mesh = lods.meshes.TexturedMesh.file("chair.obj")
    optimizer = torch.optim.Adam(mesh.groups(texture=0.02))
    for step in range(100):
        images, alphas, info = mesh.render(cameras, 128, 128)  # (C, 4, 4), camera to world
        (images - targets).abs().mean().backward()
        optimizer.step()
        mesh.limit_colours()
        optimizer.zero_grad()
    mesh.write("result.glb")

:func:`rasterization` alone draws any triangles, with gradients for texture, colours, vertices and
cameras. Cameras are those of :func:`lods.gaussians.orbit`. Nothing is imported before it is asked
for: the names below are found in their modules when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lods.meshes.initialize import textured
    from lods.meshes.parameters import MeshParameters, TexturedMesh
    from lods.meshes.rasterize import rasterization
    from lods.meshes.regularize import laplacian, normal_consistency, smoothed
    from lods.meshes.topology import neighbours

_MODULES = {
    "initialize": ("textured",),
    "parameters": ("MeshParameters", "TexturedMesh"),
    "rasterize": ("rasterization",),
    "regularize": ("laplacian", "normal_consistency", "smoothed"),
    "topology": ("neighbours",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MeshParameters",
    "TexturedMesh",
    "laplacian",
    "neighbours",
    "normal_consistency",
    "rasterization",
    "smoothed",
    "textured",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
