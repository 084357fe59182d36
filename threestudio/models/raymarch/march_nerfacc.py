"""nerfacc's CUDA kernels behind our signatures (github.com/nerfstudio-project/nerfacc 0.5, MIT)."""

from functools import lru_cache

import torch

from threestudio.utils.typing import *


def missing(device: torch.device, dtype: torch.dtype) -> str:
    """Why nerfacc cannot be used for such tensors, with the remedy; empty if it can."""
    if device.type != "cuda":
        return f"the rays are on {device.type}, not on a CUDA device; use backend='auto'"
    if dtype != torch.float32:
        return f"it computes in float32, not in {dtype}; use backend='torch'"
    return _not_loaded()


@lru_cache(maxsize=1)
def _not_loaded() -> str:
    """nerfacc compiles its kernels on first use (minutes; needs nvcc)."""
    try:
        from nerfacc.cuda._backend import _C
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"nerfacc cannot be loaded ({reason}); pip install nerfacc, with a CUDA toolkit"
    return "" if _C is not None else "its kernels are not built; install a CUDA toolkit (nvcc)"


def traverse(rays_o, rays_d, occupied, aabb, starts, far_plane, step):
    """See ``march.traverse``; nerfacc also steps from the start and asks for the midpoint's cell.
    It adds the step up instead of multiplying, so distances differ in the last bits."""
    from nerfacc.grid import traverse_grids

    far_planes = torch.full_like(starts, far_plane)
    intervals, samples, _ = traverse_grids(
        rays_o, rays_d, occupied[None], aabb[None], near_planes=starts, far_planes=far_planes,
        step_size=step, cone_angle=0.0,
    )  # fmt: skip
    ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
    return samples.ray_indices.long(), *ends


def render_weights(sigmas, t_starts, t_ends, ray_indices, n_rays):
    """See ``march.render_weights``."""
    from nerfacc import render_weight_from_density

    return render_weight_from_density(
        t_starts, t_ends, sigmas, ray_indices=ray_indices, n_rays=n_rays
    )


def accumulate(weights, values, ray_indices, n_rays):
    """See ``march.accumulate_along_rays``."""
    from nerfacc import accumulate_along_rays

    return accumulate_along_rays(weights, values, ray_indices=ray_indices, n_rays=n_rays)
