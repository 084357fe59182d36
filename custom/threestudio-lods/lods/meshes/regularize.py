"""What keeps free vertices a surface, and a texture free of noise."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lods.meshes.topology import edges
from torch import Tensor


def laplacian(
    vertices: Float[Tensor, "V 3"], start: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]
) -> Float[Tensor, ""]:
    """How unevenly the vertices have moved from where they started: with d = v - v_start and e the
    mean length of an edge at the start,

        1 / V sum_i |d_i - mean over the neighbours j of d_j|^2 / e^2.

    It is 0 for a mesh that was only shifted, does not depend on the unit of length, and does not
    shrink the mesh as the Laplacian of the vertices themselves would. Vertices without an edge
    count as 0.
    """
    ends = edges(faces)
    if not len(ends):
        return (vertices * 0).sum()
    i, j = ends.unbind(1)
    length = (start[i] - start[j]).norm(dim=-1).mean().clamp_min(torch.finfo(start.dtype).tiny)
    moved = vertices - start
    total = torch.zeros_like(moved).index_add(0, i, moved[j]).index_add(0, j, moved[i])
    count = torch.bincount(ends.flatten(), minlength=len(vertices)).to(moved)[:, None]
    uneven = torch.where(count > 0, moved - total / count.clamp_min(1), torch.zeros_like(moved))
    return (uneven / length).square().sum(-1).mean()


def normal_consistency(
    vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"], neighbours: Int[Tensor, "F 3"]
) -> Float[Tensor, ""]:
    """1 - cos of the angle between the normals of the two triangles at an edge, the mean over the
    edges that two triangles share: 0 for what is flat, 2 for a fold. A triangle without area has
    the normal 0. ``neighbours``: of :func:`lods.meshes.topology.neighbours`; the corners are to go
    around all triangles in the same sense."""
    one, corner = (neighbours > torch.arange(len(faces), device=faces.device)[:, None]).nonzero().T
    if not len(one):
        return (vertices * 0).sum()
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normals = F.normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-20)
    return (1 - (normals[one] * normals[neighbours[one, corner]]).sum(-1)).mean()


def smoothed(
    values: Float[Tensor, "H W D"], sigma: float, charts: Int[Tensor, "H W"] | None = None
) -> Float[Tensor, "H W D"]:
    """A texture, or its gradient, convolved with a Gaussian of the standard deviation ``sigma`` in
    texels, over borders that repeat; or, with the numbers of ``charts`` (-1: of none), within each
    chart, and 0 outside.

    It is K^T K, K being two passes, along rows and along columns, of a Gaussian of sigma / sqrt(2)
    that ends after four of its standard deviations: symmetric and never negative, so that steps
    along a smoothed gradient do not lead away from the optimum. They get there by its coarse parts
    first, where an optimizer that scales each element by itself, as Adam does, would step as far
    along each texel's noise. Texels that are farther from all others with a gradient than K^T K
    reaches have exactly 0, and such an optimizer leaves them alone.
    """
    narrow = sigma / math.sqrt(2)
    reach = max(1, math.ceil(4 * narrow))
    weights = [math.exp(-0.5 * (i / narrow) ** 2) for i in range(reach + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [weight / total for weight in weights]
    result = values.float()
    if charts is not None:
        result = result * (charts >= 0)[..., None]
    for axis in (0, 1, 1, 0):
        result = _passed(result, weights, axis, charts)
    return result.to(values.dtype)


def _passed(
    values: Float[Tensor, "H W D"],
    weights: list[float],
    axis: int,
    charts: Int[Tensor, "H W"] | None,
) -> Float[Tensor, "H W D"]:
    """sum_i weights[|i|] v(x + i) along an axis, over the texels of the same chart."""
    result = weights[0] * values
    side = values.shape[axis]
    for i, weight in enumerate(weights[1:], start=1):
        if charts is None:
            result += weight * (values.roll(i, axis) + values.roll(-i, axis))
            continue
        if i >= side:
            break
        one, other = (values.narrow(axis, at, side - i) for at in (0, i))
        alike = charts.narrow(axis, 0, side - i) == charts.narrow(axis, i, side - i)
        share = weight * alike[..., None]
        result.narrow(axis, 0, side - i).add_(share * other)
        result.narrow(axis, i, side - i).add_(share * one)
    return result
