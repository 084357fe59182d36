"""Two rounds of samples: evenly spread ones find out where the density is, the others go there."""

import torch

from threestudio.utils.typing import *

from .march_torch import MAX_DEPTH, ray_box

UNIFORM = 0.01  # share of the second round that is spread evenly, whatever the first has seen


@torch.no_grad()
def importance_sampling(
    rays_o: Float[Tensor, "R 3"],
    rays_d: Float[Tensor, "R 3"],
    aabb: Float[Tensor, "6"],
    sigma_fn: Callable,
    n_coarse: int,
    n_fine: int,
    near_plane: float = 0.0,
    far_plane: float = 1e10,
    stratified: bool = False,
) -> Tuple[Int[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """``n_fine`` packed intervals for every ray that meets the box, end to end from where it
    enters to where it leaves, short where much light comes from (NeRF, arXiv:2003.08934, sec. 5.2).

    The weights w of ``n_coarse`` equal intervals, plus a little everywhere, make a piecewise linear
    distribution along the ray. The fine edges are its quantiles u = 0, 1/n, ..., 1;
    ``stratified`` moves each u but the first and last by up to 1/(2n) either way.

    ``sigma_fn(t_starts, t_ends, ray_indices) -> densities``, all (N,). Memory grows with rays
    times samples.
    """
    t_in, t_out = ray_box(rays_o, rays_d, aabb.to(rays_o))
    t_in, t_out = t_in.clamp(min=near_plane), t_out.clamp(max=far_plane)
    rays = (t_in < t_out).nonzero()[:, 0]
    if len(rays) == 0:
        return rays, t_in[rays], t_out[rays]
    t_in, t_out = t_in[rays, None], t_out[rays, None]
    even = torch.linspace(0, 1, n_coarse + 1, dtype=rays_o.dtype, device=rays_o.device)
    edges = t_in + (t_out - t_in) * even

    lows, highs = edges[:, :-1], edges[:, 1:]
    sigmas = sigma_fn(lows.flatten(), highs.flatten(), rays.repeat_interleave(n_coarse))
    depths = (sigmas.reshape(-1, n_coarse) * (highs - lows)).clamp(max=MAX_DEPTH)
    weights = torch.exp(depths - depths.cumsum(-1)) * -torch.expm1(-depths)
    weights = weights + UNIFORM * weights.sum(-1, keepdim=True).clamp(min=1e-3) / n_coarse
    cdf = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    cdf = cdf / cdf[:, -1:]

    u = torch.linspace(0, 1, n_fine + 1, dtype=rays_o.dtype, device=rays_o.device)
    u = u.repeat(len(rays), 1)
    if stratified:
        u[:, 1:-1] += (torch.rand_like(u[:, 1:-1]) - 0.5) / n_fine
    fine = quantiles(edges, cdf, u)
    return rays.repeat_interleave(n_fine), fine[:, :-1].flatten(), fine[:, 1:].flatten()


def quantiles(
    edges: Float[Tensor, "R E"], cdf: Float[Tensor, "R E"], u: Float[Tensor, "R N"]
) -> Float[Tensor, "R N"]:
    """Where the piecewise linear `cdf`, given at `edges` and rising, takes the values `u`."""
    right = torch.searchsorted(cdf, u, right=True).clamp(1, edges.shape[1] - 1)
    c0, c1 = cdf.gather(1, right - 1), cdf.gather(1, right)
    t0, t1 = edges.gather(1, right - 1), edges.gather(1, right)
    return t0 + ((u - c0) / (c1 - c0)).clamp(0, 1) * (t1 - t0)
