"""The multi-resolution hash-grid encoding: one function, several backends.

``cpu`` (numba, any machine), ``torch`` (the twin: slow, any device and float dtype) and
``tinycudann`` (CUDA). All give the same features and gradients from the same parameters.
"""

from functools import lru_cache

import torch
from torch import nn

import threestudio
from threestudio.utils import compiling
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.typing import *

from .layout import GridLayout, grid_layout
from .twin import _hash_encode_torch

BACKENDS = ("auto", "cpu", "torch", "tinycudann")


@lru_cache
def announce(backend: str, reason: str, fallback: bool = False) -> None:
    """One log line, once; a warning where it is slower, and takes more memory, than it could be."""
    tell = threestudio.warn if fallback else threestudio.info
    tell(f"hash grid: {backend}{reason}")


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(
            f"hash grid: backend {backend!r} is unknown{nearest(backend, BACKENDS)}; choose from "
            f"{', '.join(BACKENDS)}"
        )


def _unusable(backend: str, device: torch.device, dtype: torch.dtype, n_dims: int) -> str:
    """Why a backend cannot be used; empty where it can."""
    home = {"cpu": "cpu", "tinycudann": "cuda"}.get(backend)
    if home and (device.type != home or dtype != torch.float32):
        return f"it computes in float32 on {home}, not in {dtype} on {device.type}"
    if backend == "cpu" and n_dims > 3:
        return f"it takes 2 or 3 input dimensions, not {n_dims}"
    if backend == "tinycudann":
        from .native import missing

        return missing()
    return ""


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, n_dims: int) -> str:
    """The backend to use. ``auto`` is tinycudann on CUDA devices and cpu elsewhere, where they can
    be used, else torch. Raises ``UserError`` for one that is unknown or cannot be used."""
    _check_backend(backend)
    preferred = backend
    if backend == "auto":
        preferred = "tinycudann" if device.type == "cuda" else "cpu"
    why = _unusable(preferred, device, dtype, n_dims)
    if why and backend != "auto":
        raise UserError(
            f"hash grid: backend {backend!r} cannot be used: {why}; or set backend to auto"
        )
    reason = f" ({preferred}: {why})" if why else ""
    if why and device.type == "cuda":
        announce("torch", f"{reason}, which on a GPU takes more time and memory", fallback=True)
    else:
        announce("torch" if why else preferred, reason)
    return "torch" if why else preferred


def hash_encode(
    x: Float[Tensor, "N D"], params: Float[Tensor, "P"], layout: GridLayout, backend: str = "auto"
) -> Float[Tensor, "N LF"]:
    """Features of the points ``x`` in [0, 1]^D from the table ``params``, ordered by level.

    Formula: ``twin._hash_encode_torch``; layout: ``layout.grid_layout``. Differentiable in
    both; points outside wrap around, nothing is read out of bounds. Raises ``ValueError`` for
    shapes that do not fit and for a backend that cannot be used.
    """
    if x.ndim != 2 or x.shape[1] != layout.n_input_dims:
        raise ValueError(f"x has the shape {tuple(x.shape)}, expected (N, {layout.n_input_dims})")
    if tuple(params.shape) != (layout.n_params,):
        raise ValueError(f"params has the shape {tuple(params.shape)}, not ({layout.n_params},)")
    dtype = torch.promote_types(x.dtype, params.dtype)
    backend = resolve_backend(backend, x.device, dtype, layout.n_input_dims)
    if backend == "cpu" and compiling.is_avoided():
        from . import kernels

        backend = "torch" if compiling.would_compile([kernels.encode]) else "cpu"
    if backend == "torch" or len(x) == 0:
        return _hash_encode_torch(x, params, layout)
    if backend == "cpu":
        from .function import encode
    else:
        from .native import encode
    return encode(x.float(), params.float(), layout)


class HashGrid(nn.Module):
    """``hash_encode`` with its parameters: points (N, D) in [0, 1] -> features (N, L F).

    The options are tiny-cuda-nn's, see ``grid_layout``; ``params`` is one flat float32 vector in
    its order, at first uniform in +-1e-4.
    """

    def __init__(
        self,
        n_input_dims: int = 3,
        n_levels: int = 16,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 19,
        base_resolution: int = 16,
        per_level_scale: float = 2.0,
        interpolation: str = "Linear",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_backend(backend)
        self.layout = grid_layout(
            n_input_dims, n_levels, n_features_per_level, log2_hashmap_size, base_resolution,
            per_level_scale, interpolation,
        )  # fmt: skip
        self.backend = backend
        self.n_input_dims, self.n_output_dims = n_input_dims, self.layout.n_output_dims
        self.params = nn.Parameter(torch.empty(self.layout.n_params).uniform_(-1e-4, 1e-4))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N LF"]:
        return hash_encode(x.float(), self.params, self.layout, self.backend)
