"""A mesh around 3D Gaussians: a level set of the density that they add up to.

    density(x) = sum_i o_i exp(-1/2 (x - mu_i)^T Sigma_i^-1 (x - mu_i))

with o_i the opacities, as in DreamGaussian (Tang et al., arXiv:2309.16653, section 3.2); colours
are averages with the same weights. The surface itself is scikit-image's marching cubes.
"""

import numpy as np
import torch
import torch.nn.functional as F

from threestudio.models.mesh import Mesh
from threestudio.utils.typing import *

from .kernel_cache import kernel
from .raster_torch import covariances

FAINT = 0.01  # Gaussians of less opacity are left out
REACH = 3.0  # standard deviations, beyond which a Gaussian counts as nothing


def spreads_of(scales: Float[Tensor, "N 3"], quats: Float[Tensor, "N 4"]) -> Float[Tensor, "N 3"]:
    """Standard deviations along the axes of the world, from log standard deviations along a
    Gaussian's own and quaternions (wxyz, of any length)."""
    return covariances(quats, scales.exp()).diagonal(dim1=-2, dim2=-1).sqrt()


@kernel()
def _add(means, matrices, spreads, weights, colors, low, cell, grid):
    size = grid.shape[0]
    for i in range(means.shape[0]):
        first, last = np.empty(3, np.int64), np.empty(3, np.int64)
        for a in range(3):
            reach = REACH * spreads[i, a]
            first[a] = max(0, int(np.ceil((means[i, a] - reach - low[a]) / cell[a])))
            last[a] = min(size - 1, int(np.floor((means[i, a] + reach - low[a]) / cell[a])))
        m = matrices[i]
        for x in range(first[0], last[0] + 1):
            dx = low[0] + x * cell[0] - means[i, 0]
            for y in range(first[1], last[1] + 1):
                dy = low[1] + y * cell[1] - means[i, 1]
                for z in range(first[2], last[2] + 1):
                    dz = low[2] + z * cell[2] - means[i, 2]
                    power = m[0, 0] * dx * dx + m[1, 1] * dy * dy + m[2, 2] * dz * dz
                    power += 2 * (m[0, 1] * dx * dy + m[0, 2] * dx * dz + m[1, 2] * dy * dz)
                    if power < REACH * REACH:
                        w = weights[i] * np.exp(-0.5 * power)
                        grid[x, y, z, 0] += w
                        for c in range(3):
                            grid[x, y, z, 1 + c] += w * colors[i, c]


@torch.no_grad()
def density_grid(
    means: Float[Tensor, "N 3"],
    scales: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    opacities: Float[Tensor, "N"],
    colors: Float[Tensor, "N 3"],
    bbox: Float[Tensor, "2 3"],
    resolution: int,
) -> Float[Tensor, "R R R 4"]:
    """The density, and the density times the colour, at ``resolution``^3 points whose first and
    last lie on the faces of the box (world units), indexed by x, y, z. Opacities are in 0..1."""
    # the inverse of R S^2 R^T is R S^-2 R^T
    matrices = covariances(quats.float(), (-scales.float()).exp())
    spreads = spreads_of(scales.float(), quats.float())
    grid = np.zeros((resolution, resolution, resolution, 4), np.float32)
    low, high = bbox.cpu().double().numpy()
    arrays = (means, matrices, spreads, opacities, colors)
    arrays = [a.detach().float().cpu().contiguous().numpy() for a in arrays]
    _add(*arrays, low, (high - low) / (resolution - 1), grid)
    return torch.from_numpy(grid)


def marching_cubes(level: Float[Tensor, "R R R"], bbox: Float[Tensor, "2 3"]) -> Mesh:
    """The mesh where ``level``, negative inside, is zero, with normals outward, by
    ``skimage.measure.marching_cubes``."""
    from skimage import measure

    # "descent" is the winding of skimage's left-handed axes; ours are right-handed
    vertices, faces, _, _ = measure.marching_cubes(
        level.numpy(), 0.0, gradient_direction="descent", spacing=(1.0 / (len(level) - 1),) * 3
    )
    unit = torch.from_numpy(vertices.copy()).to(bbox)
    return Mesh(torch.lerp(bbox[0], bbox[1], unit), torch.from_numpy(faces.astype(np.int64)))


def surface(geometry, resolution: int, threshold: float) -> Mesh:
    """The coloured mesh where the Gaussians' density is ``threshold``, without pieces of less than
    a hundredth of the faces. Raises ValueError if there is none."""
    kept = geometry.opacities.detach().sigmoid() > FAINT
    for parameter in (geometry.means, geometry.scales, geometry.quats):
        kept &= torch.isfinite(parameter.detach()).all(-1)
    if not kept.any():
        raise ValueError("there are no Gaussians to mesh: none is opaque enough")
    means, scales, quats = (
        parameter.detach()[kept].float()
        for parameter in (geometry.means, geometry.scales, geometry.quats)
    )
    opacities, colors = geometry.opacities.detach()[kept].sigmoid(), geometry.base_colors()[kept]
    reach = REACH * spreads_of(scales, quats)
    low, high = (means - reach).amin(0), (means + reach).amax(0)
    margin = (high - low) / resolution  # more than a cell, so that the surface is closed
    bbox = torch.stack([low - margin, high + margin]).cpu()
    grid = density_grid(means, scales, quats, opacities, colors, bbox, resolution)
    level = threshold - grid[..., 0]
    if not level.min() < 0 < level.max():
        raise ValueError(
            f"there is no surface at density {threshold:.4g}: the Gaussians' lies between 0 and "
            f"{grid[..., 0].max():.4g}; set system.exporter.mesh_threshold in that range"
        )
    mesh = marching_cubes(level, bbox).remove_outlier(0.01)
    where = 2 * (mesh.v_pos - bbox[0]) / (bbox[1] - bbox[0]) - 1
    # grid_sample reads x as the last axis of the grid
    sampled = F.grid_sample(
        grid.permute(3, 2, 1, 0)[None], where[None, :, None, None], align_corners=True
    )[0, :, :, 0, 0].T
    mesh.set_vertex_color((sampled[:, 1:] / sampled[:, :1].clamp_min(1e-8)).clamp(0, 1))
    return mesh
