"""A mesh around 3D Gaussians: where they stop light (:mod:`.light`), or a level of their density

    density(x) = sum_i o_i exp(-1/2 (x - mu_i)^T Sigma_i^-1 (x - mu_i))

with o_i the opacities, as in DreamGaussian (Tang et al., arXiv:2309.16653, section 3.2). The
second fits Gaussians that are nearly opaque, and leaves soft ones in pieces. The surface itself is
scikit-image's marching cubes.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.gaussians.cameras import intrinsics, world_to_camera
from lods.gaussians.harmonics import view_colors
from lods.gaussians.kernel_cache import kernel
from lods.gaussians.light import REACH, ball_of, directions, frame, opacity_grid, stopped_light
from lods.gaussians.mesh import Mesh
from lods.gaussians.parameters import GaussianParameters
from lods.gaussians.rasterize import rasterization
from lods.gaussians.reference import covariances
from scipy.spatial import cKDTree  # type: ignore[attr-defined]
from torch import Tensor

FAINT = 0.01  # Gaussians of less opacity are left out
DIRECTIONS = 20  # from which light comes, and their opposites
COARSE = 48  # points along each axis of the grid that finds where the object is
PICTURE = 256  # pixels along each side of the renders that colours at vertices are of
CRUMB = 0.01  # of the faces of the largest part: smaller ones are left out
FAR = 20.0  # radii of the object from which it is drawn: the rays are then nearly parallel


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
    opacities: Float[Tensor, " N"],
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
    """The mesh where ``level``, negative inside, is zero, by
    ``skimage.measure.marching_cubes``."""
    from skimage import measure

    # "descent" is the winding of skimage's left-handed axes; ours are right-handed
    vertices, faces, _, _ = measure.marching_cubes(
        level.numpy(), 0.0, gradient_direction="descent", spacing=(1.0 / (len(level) - 1),) * 3
    )
    unit = torch.from_numpy(vertices.copy()).to(bbox)
    return Mesh(torch.lerp(bbox[0], bbox[1], unit), torch.from_numpy(faces.astype(np.int64)))


ColoursAt = Callable[[Tensor, Tensor], Tensor]  # points (N, 3), unit normals there -> (N, 3)


@torch.no_grad()
def surface(
    geometry: GaussianParameters,
    resolution: int,
    opacity: float = 0.15,
    density: float | None = None,
) -> Mesh:
    """The coloured mesh where Gaussians stop the share ``opacity`` of the light from wherever it
    comes, or, if ``density`` is given, where their density is that, on a grid of ``resolution``
    points along each axis. Pieces of less than a hundredth of the faces of the largest are left
    out. Raises ValueError if there is no surface."""
    mesh, colours_at = shape(geometry, resolution, opacity, density)
    mesh.rgb = colours_at(mesh.vertices, mesh.normals())
    return mesh


@torch.no_grad()
def shape(
    geometry: GaussianParameters,
    resolution: int,
    opacity: float = 0.15,
    density: float | None = None,
    pixels: int = PICTURE,
) -> tuple[Mesh, ColoursAt]:
    """The mesh of :func:`surface` without its colours, and what tells them at any points on it or
    near it: of renders of ``pixels`` x ``pixels``, where the light decides."""
    kept = geometry.opacities.detach().sigmoid() > FAINT
    for parameter in (geometry.means, geometry.scales, geometry.quats):
        kept &= torch.isfinite(parameter.detach()).all(-1)
    if not kept.any():
        raise ValueError("there are no Gaussians to mesh: none is opaque enough")
    gaussians = {name: value.detach()[kept].float() for name, value in geometry.gaussians().items()}
    reach = REACH * spreads_of(gaussians["scales"], gaussians["quats"])
    low, high = (gaussians["means"] - reach).amin(0), (gaussians["means"] + reach).amax(0)
    if density is None:
        bbox = torch.stack([low, high]).cpu()
        return _where_light_stops(gaussians, bbox, resolution, opacity, pixels)
    margin = (high - low) / resolution  # more than a cell, so that the surface is closed
    bbox = torch.stack([low - margin, high + margin]).cpu()
    return _where_density_is(gaussians, bbox, resolution, density)


def _where_density_is(gaussians, bbox, resolution: int, threshold: float) -> tuple[Mesh, ColoursAt]:
    means, scales, quats = (gaussians[name] for name in ("means", "scales", "quats"))
    colors, opacities = view_colors(gaussians["sh0"]), gaussians["opacities"].sigmoid()
    grid = density_grid(means, scales, quats, opacities, colors, bbox, resolution)
    level = threshold - grid[..., 0]
    if not level.min() < 0 < level.max():
        raise ValueError(
            f"there is no surface at density {threshold:.4g}: the Gaussians' lies between 0 and "
            f"{grid[..., 0].max():.4g}; set system.exporter.mesh_threshold in that range"
        )

    def colours_at(points: Tensor, normals: Tensor) -> Tensor:
        where = 2 * (points - bbox[0]) / (bbox[1] - bbox[0]) - 1
        # grid_sample reads x as the last axis of the grid
        sampled = F.grid_sample(
            grid.permute(3, 2, 1, 0)[None], where[None, :, None, None], align_corners=True
        )[0, :, :, 0, 0].T
        return (sampled[:, 1:] / sampled[:, :1].clamp_min(1e-8)).clamp(0, 1)

    return marching_cubes(level, bbox).without_crumbs(CRUMB), colours_at


def _where_light_stops(
    gaussians, bbox, resolution: int, opacity: float, pixels: int
) -> tuple[Mesh, ColoursAt]:
    covs = covariances(gaussians["quats"], gaussians["scales"].exp())
    blobs = gaussians["means"], covs, gaussians["opacities"].sigmoid()
    # light along few directions stops less far out: the object is within what these find
    for _ in range(3):
        grid = opacity_grid(blobs, bbox, COARSE, np.eye(3))
        inside = (grid > opacity).nonzero()
        if len(inside) == 0:
            raise ValueError(
                f"there is no surface: from some side, {1 - grid.max():.4g} of the light or more "
                f"passes everywhere; set system.exporter.mesh_opacity below {grid.max():.4g} "
                f"(it is {opacity:.4g})"
            )
        cell = (bbox[1] - bbox[0]) / (COARSE - 1)
        found = torch.stack([inside.amin(0) - 2, inside.amax(0) + 2])
        bbox = bbox[0] + found.clamp(0, COARSE - 1) * cell
    grid = opacity_grid(blobs, bbox, resolution, directions(DIRECTIONS))
    for axis in range(3):  # closed, should it reach the box
        grid.select(axis, 0).zero_()
        grid.select(axis, -1).zero_()
    if not grid.max() > opacity:
        raise ValueError(
            f"there is no surface: at most {grid.max():.4g} of the light is stopped on all sides; "
            f"set system.exporter.mesh_opacity below that (it is {opacity:.4g})"
        )

    def colours_at(points: Tensor, normals: Tensor) -> Tensor:
        return _rendered_colors(gaussians, blobs, points, normals, bbox, opacity, pixels)

    return marching_cubes(opacity - grid, bbox).without_crumbs(CRUMB), colours_at


@torch.no_grad()
def _rendered_colors(
    gaussians, blobs, points, normals, bbox, opacity: float, pixels: int
) -> Float[Tensor, "V 3"]:
    """What renders show at points of the surface: the mean over the directions from which they are
    seen, weighted by how much the surface faces one and by how little light is stopped before
    it."""
    center, radius = ball_of(bbox)
    total = torch.zeros(len(points), 4)
    along = directions(DIRECTIONS)
    light = stopped_light(blobs, points.double(), along, center, radius, COARSE * 2)
    for direction, stopped in zip(along, light):
        for sign, before in zip((1.0, -1.0), stopped):
            view = sign * direction
            rgb, alpha = _picture(gaussians, points, view, center, radius, pixels)
            facing = (normals @ torch.from_numpy(-view).float()).clamp_min(0)
            seen = ((1 - before) / (1 - opacity)).clamp(0, 1) ** 2
            weight = (facing**2 * seen * (alpha > opacity))[:, None]
            total += weight * torch.cat(
                [rgb / alpha[:, None].clamp_min(1e-6), torch.ones_like(weight)], 1
            )
    colored = total[:, 3] > 1e-3
    if not colored.any():
        return torch.full_like(points, 0.5)
    colors = total[:, :3] / total[:, 3:].clamp_min(1e-3)
    # in deep folds that nothing sees, the colour of the nearest point that is seen
    _, nearest = cKDTree(points[colored].numpy()).query(points[~colored].numpy())
    colors[~colored] = colors[colored][torch.from_numpy(np.asarray(nearest))]
    return colors.clamp(0, 1)


def _picture(
    gaussians, points: Float[Tensor, "V 3"], direction, center, radius: float, pixels: int
) -> tuple[Float[Tensor, "V 3"], Float[Tensor, " V"]]:
    """Colour, weighted with alpha, and alpha that a render along ``direction`` has at points."""
    c2w = torch.eye(4)[None]
    right = frame(direction)[0]
    c2w[0, :3, :3] = torch.from_numpy(
        np.stack([right, np.cross(right, direction), -direction], axis=1)
    )
    c2w[0, :3, 3] = torch.from_numpy(center - FAR * radius * direction)
    fovy = torch.tensor([2 * np.arctan(1.0 / (FAR - 1))])
    K, view = intrinsics(fovy, pixels, pixels), world_to_camera(c2w)
    device = gaussians["means"].device
    near = (gaussians["means"] - torch.from_numpy(center).to(device)).norm(dim=1) < radius
    g = {name: value[near] for name, value in gaussians.items()}
    rgb, alpha, _ = rasterization(
        g["means"],
        g["quats"],
        g["scales"].exp(),
        g["opacities"].sigmoid(),
        view_colors(g["sh0"], g.get("shN"), g["means"], c2w[:, :3, 3].to(device)),
        view.to(device),
        K.to(device),
        pixels,
        pixels,
        packed=False,
    )
    seen = points @ view[0, :3, :3].T + view[0, :3, 3]
    pixel = seen[:, :2] / seen[:, 2:] * K[0, 0, 0] / (pixels / 2)
    image = torch.cat([rgb, alpha], dim=-1).permute(0, 3, 1, 2).float().cpu()
    sampled = F.grid_sample(image, pixel[None, None].float(), align_corners=False)[0, :, 0].T
    return sampled[:, :3], sampled[:, 3]
