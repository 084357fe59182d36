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


def smoothed(values: Float[Tensor, "H W D"], sigma: float) -> Float[Tensor, "H W D"]:
    """A texture, or its gradient, convolved with a Gaussian of the standard deviation ``sigma`` in
    texels, over borders that repeat: in frequencies f (cycles a texel) times exp(-2 pi^2 sigma^2
    |f|^2).

    That is symmetric and positive definite, so that steps along a smoothed gradient lead to the
    same optimum. They get there by its coarse parts first, where an optimizer that scales each
    element by itself, as Adam does, would step as far along each texel's noise.
    """
    height, width = values.shape[:2]
    rows = torch.fft.fftfreq(height, device=values.device)
    columns = torch.fft.rfftfreq(width, device=values.device)
    squares = rows[:, None].square() + columns.square()
    transfer = (-2 * (math.pi * sigma) ** 2 * squares).exp()[..., None]
    spectrum = torch.fft.rfft2(values.float(), dim=(0, 1)) * transfer
    return torch.fft.irfft2(spectrum, s=(height, width), dim=(0, 1)).to(values.dtype)
