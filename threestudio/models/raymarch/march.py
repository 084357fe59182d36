"""One set of functions, several backends.

``cpu`` (numba, float32 on the CPU), ``torch`` (the twin: any device and float dtype) and
``nerfacc`` (CUDA). All take the same samples and give the same weights and gradients, but for
rounding.
"""

import importlib
from functools import lru_cache

import torch

import threestudio
from threestudio.utils import compiling
from threestudio.utils.typing import *

BACKENDS = ("auto", "cpu", "torch", "nerfacc")

Samples = Tuple[Int[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]


@lru_cache
def announce(backend: str, reason: str, fallback: bool = False) -> None:
    """One log line, once; a warning where it is slower than it could be."""
    tell = threestudio.warn if fallback else threestudio.info
    tell(f"Ray marching: {backend}{reason}")


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use for tensors of this device and dtype.

    ``auto`` is nerfacc on CUDA devices where it works, cpu for float32 on the CPU, else torch.
    Raises ``ValueError`` for an unknown or an unusable backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"ray marching backend {backend!r} is unknown; choose from {BACKENDS}")
    compilable = device.type == "cpu" and dtype == torch.float32
    kind = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    reason = ""
    if backend == "cpu" and not compilable:
        raise ValueError(
            f"ray marching backend 'cpu' computes in float32 on the CPU, not in {kind}; use 'torch'"
        )
    if backend == "nerfacc" or (backend == "auto" and device.type == "cuda"):
        from . import march_nerfacc

        missing = march_nerfacc.missing(device, dtype)
        if backend == "nerfacc" and missing:
            raise ValueError(f"ray marching backend 'nerfacc' is not usable: {missing}")
        backend = "torch" if missing else "nerfacc"
        reason = f" (nerfacc: {missing}), which on a GPU takes more time" if missing else ""
    elif backend == "auto":
        backend = "cpu" if compilable else "torch"
    announce(backend, reason, fallback=bool(reason))
    return backend


def _module(backend: str, tensor: Tensor):
    name = resolve_backend(backend, tensor.device, tensor.dtype)
    module = importlib.import_module(f"{__package__}.march_{name}")
    avoided = name == "cpu" and compiling.is_avoided()
    if avoided and compiling.would_compile([module.march, module.weigh, module.gather]):
        return importlib.import_module(f"{__package__}.march_torch")
    return module


def _wide(x: Tensor) -> Tensor:
    """Distances and transmittances lose too many bits in 16-bit floats."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def traverse(
    rays_o: Float[Tensor, "R 3"],
    rays_d: Float[Tensor, "R 3"],
    occupied: Bool[Tensor, "X Y Z"],
    aabb: Float[Tensor, "6"],
    starts: Float[Tensor, "R"],
    far_plane: float,
    step: float,
    backend: str = "auto",
) -> Samples:
    """The intervals of constant length whose midpoints lie in occupied cells.

    Interval k of ray r is [s + k step, s + (k + 1) step], with s = starts[r] and k = 0, 1, ...; it
    is taken if its midpoint t is not beyond ``far_plane`` and the cell of o + t d, in the grid that
    divides the box ``aabb`` (low corner, high corner), is occupied. Memory is proportional to the
    number of samples taken. No gradients.
    """
    rays_o, rays_d, starts = _wide(rays_o), _wide(rays_d), _wide(starts)
    module = _module(backend, rays_o)
    return module.traverse(
        rays_o.detach(), rays_d.detach(), occupied, aabb.to(rays_o), starts, far_plane, step
    )


def render_weights(
    sigmas: Float[Tensor, "N"],
    t_starts: Float[Tensor, "N"],
    t_ends: Float[Tensor, "N"],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
    backend: str = "auto",
) -> Tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """How much each packed sample contributes to its ray (NeRF, arXiv:2003.08934, eq. 3):

        alpha_i = 1 - exp(-sigma_i (t_ends_i - t_starts_i)),
        T_i     = prod_{j < i} (1 - alpha_j),
        w_i     = T_i alpha_i

    over the samples j of the same ray. ``sigmas`` are densities [1 / unit of t], not negative.
    Returns the weights w, the transmittances T and the alphas. Differentiable in the densities.
    """
    sigmas = _wide(sigmas)
    module = _module(backend, sigmas)
    return module.render_weights(
        sigmas, t_starts.to(sigmas.dtype), t_ends.to(sigmas.dtype), ray_indices, n_rays
    )


def accumulate_along_rays(
    weights: Float[Tensor, "N"],
    values: Optional[Float[Tensor, "N C"]],
    ray_indices: Int[Tensor, "N"],
    n_rays: int,
    backend: str = "auto",
) -> Float[Tensor, "R C"]:
    """sum_i w_i v_i over the samples of each ray, or sum_i w_i (R, 1) without ``values``; 0 for a
    ray without samples. Differentiable in weights and values."""
    values = weights.new_ones(len(weights), 1) if values is None else values.to(weights.dtype)
    return _module(backend, weights).accumulate(weights, values, ray_indices, n_rays)
