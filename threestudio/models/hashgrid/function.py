"""The CPU kernels behind autograd functions, double backward included.

The three operations are each other's derivatives (see ``kernels``):

    E(x, T)     encode      features       dE: S(x, g) to T,  P(x, T, g) to x
    S(x, g)     scatter     table          dS: E(x, m) to g,  P(x, m, g) to x
    P(x, T, g)  positions   (N, D)         dP: E_v, S_v, P_v, the same along the direction v
"""

import numpy as np
import torch

from threestudio.utils.parallel import run_kernel as _run
from threestudio.utils.parallel import worker_count
from threestudio.utils.typing import *

from . import kernels
from .layout import GridLayout
from .twin import _hash_encode_torch

SERIAL_WORK = 10_000  # points times levels


def _workers(work: int) -> int:
    return worker_count(work, SERIAL_WORK)


def _grid(layout: GridLayout) -> tuple:
    """What the kernels take of a layout."""
    smooth = layout.interpolation == "Smoothstep"
    return *layout.arrays, smooth, layout.n_features_per_level


def _array(tensor: Tensor) -> np.ndarray:
    """A flat numpy view (or contiguous copy) of a tensor."""
    return tensor.detach().contiguous().numpy().ravel()


def _axes(x: Optional[Float[Tensor, "N D"]]) -> np.ndarray:
    """Coordinates axis by axis, three of them; empty for None."""
    if x is None:
        return np.empty(0, np.float32)
    rows = torch.zeros(3, len(x))
    rows[: x.shape[1]] = x.detach().T
    return rows.numpy().ravel()


def _encode(x, v, params, layout) -> Float[Tensor, "N LF"]:
    out = torch.empty(len(x), layout.n_output_dims)
    workers = _workers(len(x) * layout.n_levels)
    block = min(kernels.BLOCK, -(-len(x) // workers))
    buffers = np.empty((workers, block * layout.n_output_dims), np.float32)
    arrays = _axes(x), _axes(v), _array(params), *_grid(layout), buffers, _array(out)
    _run(kernels.encode, workers, *arrays)
    return out


def _by_level(g, layout) -> np.ndarray:
    out = np.empty(g.numel(), np.float32)
    levels, features = layout.n_levels, layout.n_features_per_level
    workers = _workers(len(g) * levels)
    _run(kernels.by_level, workers, _array(g), len(g), levels, features, workers, out)
    return out


def _scatter(x, v, g, layout) -> Float[Tensor, "P"]:
    out = torch.empty(layout.n_params)
    workers = min(_workers(len(x) * layout.n_levels), layout.n_levels)
    arrays = _axes(x), _axes(v), _by_level(g, layout), *_grid(layout), workers, _array(out)
    _run(kernels.scatter, workers, *arrays)
    return out


def _positions(x, v, params, g, layout) -> Float[Tensor, "N D"]:
    out = torch.zeros(3, len(x))
    workers = _workers(len(x) * layout.n_levels)
    arrays = _axes(x), _axes(v), _array(params), _by_level(g, layout), *_grid(layout)
    _run(kernels.positions, workers, *arrays, workers, _array(out))
    return out[: x.shape[1]].T.contiguous()


class _Encode(torch.autograd.Function):
    """E, with its gradient to the table only; that to x is added behind it by ``_ToPositions``. So
    where only the latter is asked for (a normal), the former is not computed. ``held`` is (x,): a
    tensor in a tuple is saved but is no input, which autograd would come here for."""

    @staticmethod
    def forward(ctx, params, held, layout):
        (x,) = held
        ctx.save_for_backward(x)
        ctx.layout = layout
        return _encode(x, None, params, layout)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return _Scatter.apply(x, g, ctx.layout), None, None


class _ToPositions(torch.autograd.Function):
    """The features E(x, params), with the gradient to x."""

    @staticmethod
    def forward(ctx, x, params, features, layout):
        ctx.save_for_backward(x, params)
        ctx.layout = layout
        return features.view_as(features)

    @staticmethod
    def backward(ctx, g):
        x, params = ctx.saved_tensors
        return _Positions.apply(x, params, g, ctx.layout), None, g, None


class _Scatter(torch.autograd.Function):
    """S(x, g)."""

    @staticmethod
    def forward(ctx, x, g, layout):
        ctx.save_for_backward(x, g)
        ctx.layout = layout
        return _scatter(x, None, g, layout)

    @staticmethod
    def backward(ctx, m):
        x, g = ctx.saved_tensors
        to_x, to_g, _ = ctx.needs_input_grad
        d_x = _Positions.apply(x, m, g, ctx.layout) if to_x else None
        return d_x, encode(x, m, ctx.layout) if to_g else None, None


class _Positions(torch.autograd.Function):
    """P(x, T, g)."""

    @staticmethod
    def forward(ctx, x, params, g, layout):
        ctx.save_for_backward(x, params, g)
        ctx.layout = layout
        return _positions(x, None, params, g, layout)

    @staticmethod
    def backward(ctx, v):
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_second_by_twin(saved, needed, v, ctx.layout), None
        x, params, g = saved
        to_x, to_params, to_g = needed
        return (
            _positions(x, v, params, g, ctx.layout) if to_x else None,
            _scatter(x, v, g, ctx.layout) if to_params else None,
            _encode(x, v, params, ctx.layout) if to_g else None,
            None,
        )


def _second_by_twin(saved, needed, v, layout) -> list:
    """The backward of P where it has to be differentiable itself (third derivatives)."""
    aliases = x, params, g = [tensor.view_as(tensor) for tensor in saved]
    out = _hash_encode_torch(x, params, layout)
    (d_x,) = torch.autograd.grad(out, x, g, create_graph=True)
    inputs = [alias for alias, need in zip(aliases, needed) if need]
    grads = iter(torch.autograd.grad(d_x, inputs, v, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needed]


def encode(
    x: Float[Tensor, "N D"], params: Float[Tensor, "P"], layout: GridLayout
) -> Float[Tensor, "N LF"]:
    """See ``twin._hash_encode_torch``; float32, on the CPU, up to 3 dimensions. Third and
    higher derivatives are by the twin."""
    features = _Encode.apply(params, (x,), layout)
    return _ToPositions.apply(x, params, features, layout) if x.requires_grad else features
