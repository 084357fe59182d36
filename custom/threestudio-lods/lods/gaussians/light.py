"""How much light 3D Gaussians stop: what makes them look solid.

Trained Gaussians are soft: most have an opacity of a few hundredths, and only many of them behind
each other look solid. No level of their density is therefore a surface everywhere. What makes an
object solid is that light does not pass it, and this is what a surface can be taken from:

    A_d(x) = 1 - exp(-sum_i tau_i(x, d)),      O(x) = min over directions d of A_d(x)

where tau_i is how much the i-th Gaussian stops of the light that comes along d, up to x. O is the
share that is stopped before x from wherever one looks, and the surface is one of its levels (as in
Gaussian Opacity Fields, Yu et al., arXiv:2404.10772, there with the training cameras). Its inside
is solid, its outline is that of the renders, and thin parts stay: what lets at most a share s of
the light through has an inside for every level below 1 - sqrt(s).
"""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.gaussians.kernel_cache import kernel
from torch import Tensor

REACH = 3.0  # standard deviations, beyond which a Gaussian counts as nothing
BLUR = 0.3  # cells^2 added to the projected variances, as a rasteriser does with pixels


@kernel(nogil=True)
def _stop_light(means, covs, opacities, low, cell, grid):
    """Add to ``grid[x, y, z]`` the optical depth that Gaussians put between the planes of the
    points z - 1 and z, for light along z."""
    size = grid.shape[0]
    for i in range(means.shape[0]):
        c = covs[i]
        xx, yy = c[0, 0] + BLUR * cell * cell, c[1, 1] + BLUR * cell * cell
        det = xx * yy - c[0, 1] * c[0, 1]
        p, q, r = yy / det, -c[0, 1] / det, xx / det
        # along a ray a Gaussian is one again, about a point that depends linearly on the ray
        sx = p * c[0, 2] + q * c[1, 2]
        sy = q * c[0, 2] + r * c[1, 2]
        # no thinner than half a cell, which the grid could not tell
        thick = max(c[2, 2] - sx * c[0, 2] - sy * c[1, 2], 0.25 * cell * cell) ** 0.5
        reach_x, reach_y = REACH * xx**0.5, REACH * yy**0.5
        x0 = max(0, int(np.ceil((means[i, 0] - reach_x - low) / cell)))
        x1 = min(size - 1, int(np.floor((means[i, 0] + reach_x - low) / cell)))
        y0 = max(0, int(np.ceil((means[i, 1] - reach_y - low) / cell)))
        y1 = min(size - 1, int(np.floor((means[i, 1] + reach_y - low) / cell)))
        for x in range(x0, x1 + 1):
            dx = low + x * cell - means[i, 0]
            for y in range(y0, y1 + 1):
                dy = low + y * cell - means[i, 1]
                power = p * dx * dx + 2 * q * dx * dy + r * dy * dy
                if power > REACH * REACH:
                    continue
                tau = -np.log(1 - min(0.999, opacities[i] * np.exp(-0.5 * power)))
                middle = means[i, 2] + sx * dx + sy * dy
                z0 = max(1, int(np.floor((middle - REACH * thick - low) / cell)) + 1)
                z1 = min(size - 1, int(np.ceil((middle + REACH * thick - low) / cell)))
                at = (low + (z0 - 1) * cell - middle) / (thick * 2**0.5)
                before = math.erf(at)
                for z in range(z0, z1 + 1):
                    at += cell / (thick * 2**0.5)
                    after = math.erf(at)
                    grid[x, y, z] += 0.5 * tau * (after - before)
                    before = after


def directions(n: int) -> Float[np.ndarray, "N 3"]:
    """Unit vectors spread evenly over the half sphere z > 0, along a spiral."""
    i = np.arange(n)
    z, angle = 1 - (i + 0.5) / n, i * math.pi * (3 - math.sqrt(5))
    flat = np.sqrt(1 - z * z)
    return np.stack([flat * np.cos(angle), flat * np.sin(angle), z], axis=1)


def frame(direction: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """A rotation whose third row is ``direction``, a unit vector."""
    other = np.eye(3)[np.abs(direction).argmin()]
    first = np.cross(other, direction)
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(direction, first), direction])


@torch.no_grad()
def stopped_light(
    gaussians: tuple[Float[Tensor, "N 3"], Float[Tensor, "N 3 3"], Float[Tensor, " N"]],
    points: Float[Tensor, "*R 3"],
    along: Float[np.ndarray, "D 3"],
    center: Float[np.ndarray, "3"],
    radius: float,
    resolution: int,
) -> Iterable[Float[Tensor, " 2 *R"]]:
    """For each direction in turn, A at ``points`` for light along it and against it.

    ``gaussians``: means, covariances and opacities (0..1). Light starts on the faces of a cube
    that contains the ball about ``center``, in which the points are: what is in front of it does
    not count.
    """
    means, covs, opacities = (value.double().cpu().numpy() for value in gaussians)
    cell = 2 * radius / (resolution - 1)

    def one(direction):
        turn = frame(direction)
        grid = np.zeros((resolution,) * 3, np.float32)
        turned = np.ascontiguousarray((means - center) @ turn.T)
        _stop_light(turned, turn @ covs @ turn.T, opacities, -radius, cell, grid)
        depth = torch.from_numpy(grid).cumsum(2)
        both = torch.stack([depth, depth[..., -1:] - depth])
        where = (points - torch.from_numpy(center)) @ torch.from_numpy(turn.T) / radius
        # grid_sample reads x as the last axis of the grid
        where = where.flip(-1).float().reshape(1, -1, 1, 1, 3)
        sampled = F.grid_sample(both[None], where, align_corners=True, padding_mode="border")
        return 1 - torch.exp(-sampled.reshape(2, *points.shape[:-1]))

    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        yield from pool.map(one, along)


def opacity_grid(gaussians, bbox: Float[Tensor, "2 3"], resolution: int, along) -> Tensor:
    """O at ``resolution``^3 points whose first and last lie on the faces of the box, indexed by x,
    y, z."""
    ends = bbox.T.tolist()
    axes = [torch.linspace(low, high, resolution, dtype=torch.float64) for low, high in ends]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    center, radius = ball_of(bbox)
    least = torch.ones(points.shape[:-1])
    for both in stopped_light(gaussians, points, along, center, radius, resolution):
        least = torch.minimum(least, both.amin(0))
    return least


def ball_of(bbox: Float[Tensor, "2 3"]) -> tuple[Float[np.ndarray, "3"], float]:
    """Centre and radius of the ball around a box."""
    low, high = bbox.double().cpu().numpy()
    return (low + high) / 2, float(np.linalg.norm(high - low)) / 2
