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

from typing import TYPE_CHECKING

from lods import lazy

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

__getattr__, __dir__ = lazy.attributes(__name__, _MODULES)
