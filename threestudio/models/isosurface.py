"""From a field on a regular grid to the mesh of one of its level sets."""

import numpy as np
import torch

from threestudio.models.mesh import Mesh
from threestudio.utils.typing import *

DEFAULT_CHUNK = 2**18  # points; a hash grid and its network need about 200 MB for that many


def sample_grid(
    function: Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 1"]],
    resolution: int,
    bbox: Float[Tensor, "2 3"],
    chunk: int = 0,
) -> Float[Tensor, "R R R"]:
    """``function`` at ``resolution``^3 points, indexed by x, y, z, whose first and last lie on the
    faces of the box. At most ``chunk`` points at a time (0: ``DEFAULT_CHUNK``), which are made as
    they are needed: only the values are kept."""
    axes = [
        torch.linspace(lo, hi, resolution, device=bbox.device, dtype=bbox.dtype)
        for lo, hi in zip(bbox[0].tolist(), bbox[1].tolist())
    ]
    n, chunk = resolution**3, chunk if chunk > 0 else DEFAULT_CHUNK
    values = []
    for start in range(0, n, chunk):
        i = torch.arange(start, min(start + chunk, n), device=bbox.device)
        x, y, z = i // resolution**2, i // resolution % resolution, i % resolution
        points = torch.stack([axes[0][x], axes[1][y], axes[2][z]], dim=-1)
        values.append(function(points).detach().float().reshape(-1))
    return torch.cat(values).reshape(resolution, resolution, resolution)


def marching_cubes(level: Float[Tensor, "R R R"], bbox: Float[Tensor, "2 3"]) -> Mesh:
    """The mesh where ``level``, negative inside, is zero; its normals point outside. Grid points
    are those of :func:`sample_grid`. It is closed unless the surface leaves the box, and does not
    pass gradients on.

    By ``skimage.measure.marching_cubes`` (Lewiner et al., Journal of Graphics Tools 8(2), 2003),
    which wants both signs in ``level``.
    """
    from skimage.measure import marching_cubes as run

    grid = level.detach().cpu().float().numpy()
    # "descent" is the winding of skimage's left-handed axes; ours are right-handed
    vertices, faces, _, _ = run(grid, 0.0, gradient_direction="descent")
    v_pos = torch.from_numpy(np.ascontiguousarray(vertices)).to(bbox)
    v_pos = bbox[0] + v_pos / (level.shape[0] - 1) * (bbox[1] - bbox[0])
    t_pos_idx = torch.from_numpy(faces.astype(np.int64)).to(bbox.device)
    return Mesh(v_pos, t_pos_idx)
