"""3D Gaussians on a CPU or a GPU, without a host: to make, draw, train, densify, write and mesh.

    import lods.gaussians as gs

    gaussians = gs.Gaussians.ball(2000)
    optimizer = torch.optim.Adam(gaussians.groups(), eps=1e-15)
    densifier = gs.Densifier("default", {"refine_start_iter": 100})
    for step in range(500):
        images, alphas, info = gaussians.render(cameras, 128, 128)  # (C, 4, 4), camera to world
        densifier.before_backward(info)
        (images - targets).abs().mean().backward()
        optimizer.step()
        densifier.after_step(gaussians, optimizer, step, info)
        optimizer.zero_grad()
    gaussians.write_ply("result.ply")
    gaussians.mesh().write("result.glb")

:func:`rasterization` alone has the signature of gsplat's. Nothing is imported before it is asked
for: the names below are found in their modules when they are first used.
"""

from typing import TYPE_CHECKING

from lods import lazy

if TYPE_CHECKING:
    from lods.gaussians.backends import backend_names, register_backend, resolve_backend
    from lods.gaussians.cameras import intrinsics, orbit, world_to_camera
    from lods.gaussians.densify import Densifier
    from lods.gaussians.harmonics import spherical_harmonics, view_colors
    from lods.gaussians.initialize import Points, from_points, initial_gaussians
    from lods.gaussians.mesh import Mesh
    from lods.gaussians.mesh_file import read_mesh, write_mesh
    from lods.gaussians.parameters import GaussianParameters, Gaussians
    from lods.gaussians.ply import read_ply, write_ply, write_points
    from lods.gaussians.rasterize import rasterization
    from lods.gaussians.strategies import default_strategy, mcmc_strategy

_MODULES = {
    "backends": ("backend_names", "register_backend", "resolve_backend"),
    "cameras": ("intrinsics", "orbit", "world_to_camera"),
    "densify": ("Densifier",),
    "harmonics": ("spherical_harmonics", "view_colors"),
    "initialize": ("Points", "from_points", "initial_gaussians"),
    "mesh": ("Mesh",),
    "mesh_file": ("read_mesh", "write_mesh"),
    "parameters": ("GaussianParameters", "Gaussians"),
    "ply": ("read_ply", "write_ply", "write_points"),
    "rasterize": ("rasterization",),
    "strategies": ("default_strategy", "mcmc_strategy"),
}

__all__ = [
    "Densifier",
    "GaussianParameters",
    "Gaussians",
    "Mesh",
    "Points",
    "backend_names",
    "default_strategy",
    "from_points",
    "initial_gaussians",
    "intrinsics",
    "mcmc_strategy",
    "orbit",
    "rasterization",
    "read_mesh",
    "read_ply",
    "register_backend",
    "resolve_backend",
    "spherical_harmonics",
    "view_colors",
    "world_to_camera",
    "write_mesh",
    "write_ply",
    "write_points",
]

__getattr__, __dir__ = lazy.attributes(__name__, _MODULES)
