"""The torch twin: the formulas over whole tensors, on any device and in any float dtype.

It is the oracle that the compiled kernels are tested against. Where no kernel fits, it is also
what runs, so it works through the rays in pieces of bounded memory.
"""

import torch

from threestudio.utils.typing import *

FLAT = 1e-12  # a smaller component of a direction never crosses a cell
MAX_STEPS = 1 << 24  # beyond, float32 no longer tells k from k + 1
MAX_DEPTH = 80.0  # exp(-80) = 2e-35; keeps a dense sample from swamping the running sums
PIECE = 1 << 20  # candidate samples looked at together


def ray_box(
    rays_o: Float[Tensor, "R 3"], rays_d: Float[Tensor, "R 3"], aabb: Float[Tensor, "6"]
) -> Tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
    """Where the lines o + t d enter and leave the box: ``t_in > t_out`` for one that misses it (or
    has the direction 0). By slabs: the largest entry and the smallest exit of the three axes.
    """
    flat = rays_d.abs() < FLAT
    inverse = 1 / rays_d.masked_fill(flat, 1)
    a, b = (aabb[:3] - rays_o) * inverse, (aabb[3:] - rays_o) * inverse
    inf = float("inf")
    outside = flat & ((rays_o < aabb[:3]) | (rays_o > aabb[3:]))
    t_in = torch.minimum(a, b).masked_fill(flat, -inf).masked_fill(outside, inf).amax(-1)
    t_out = torch.maximum(a, b).masked_fill(flat, inf).amin(-1)
    return t_in, t_out.masked_fill(flat.all(-1), -inf)


def traverse(
    rays_o: Float[Tensor, "R 3"],
    rays_d: Float[Tensor, "R 3"],
    occupied: Bool[Tensor, "X Y Z"],
    aabb: Float[Tensor, "6"],
    starts: Float[Tensor, "R"],
    far_plane: float,
    step: float,
) -> Tuple[Int[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """See ``march.traverse``. The box only narrows the k that are looked at: whether a midpoint is
    taken is decided by its cell alone."""
    size = torch.tensor(occupied.shape, dtype=aabb.dtype, device=aabb.device)
    scale = size / (aabb[3:] - aabb[:3])
    t_in, t_out = ray_box(rays_o, rays_d, aabb)
    t_out = t_out.clamp(max=far_plane)
    first = ((t_in - starts) / step - 0.5).floor().clamp(0, MAX_STEPS)
    last = (((t_out - starts) / step - 0.5).ceil() + 1).clamp(0, MAX_STEPS)
    rays = ((t_in <= t_out) & (first < last)).nonzero()[:, 0]
    first, last = first[rays], last[rays]
    span = int((last - first).max()) if len(rays) else 1

    found = []
    for piece in torch.arange(len(rays), device=rays.device).split(max(1, PIECE // span)):
        r = rays[piece]
        k = first[piece, None] + torch.arange(span, dtype=aabb.dtype, device=rays.device)
        t = starts[r, None] + (k + 0.5) * step
        cell = (rays_o[r, None] + t[..., None] * rays_d[r, None] - aabb[:3]) * scale
        inside = ((cell >= 0) & (cell < size)).all(-1)
        x, y, z = cell.where(inside[..., None], torch.zeros_like(cell)).long().unbind(-1)
        taken = inside & occupied[x, y, z] & (k < last[piece, None]) & (t <= far_plane)
        i, j = taken.nonzero().unbind(-1)
        found.append((r[i], k[i, j]))
    r, k = (torch.cat(x) for x in zip(*found))
    return r, starts[r] + k * step, starts[r] + (k + 1) * step


def ray_offsets(ray_indices: Int[Tensor, "N"], n_rays: int) -> Int[Tensor, "R+1"]:
    """The samples of ray r are those from ``offsets[r]`` to ``offsets[r + 1] - 1``."""
    return torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=ray_indices.device))


def render_weights(
    sigmas: Float[Tensor, "N"],
    t_starts: Float[Tensor, "N"],
    t_ends: Float[Tensor, "N"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
) -> Tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """See ``march.render_weights``. T_i = exp(-(S_i - S_first)), with S the sum of sigma dt over
    all samples before, of whatever ray; it runs over millions of samples, hence in double."""
    depth = (sigmas * (t_ends - t_starts)).clamp(max=MAX_DEPTH)
    before = depth.double().cumsum(0) - depth.double()
    first = ray_offsets(ray_indices, n_rays)[ray_indices]
    trans = torch.exp(before[first] - before).to(sigmas.dtype)
    alphas = -torch.expm1(-depth)
    return trans * alphas, trans, alphas


def accumulate(
    weights: Float[Tensor, "N"],
    values: Float[Tensor, "N C"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
) -> Float[Tensor, "R C"]:
    """See ``march.accumulate_along_rays``."""
    total = values.new_zeros(n_rays, values.shape[1])
    return total.index_add(0, ray_indices, weights[:, None] * values)
