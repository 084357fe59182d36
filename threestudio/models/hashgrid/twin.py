"""The torch twin of the hash grid: the formulas, once, without tricks.

It is the oracle of the compiled kernels, and what runs on other devices and in other precisions.
Time is linear in points * levels * corners; memory in points * corners, of one level at a time,
because the levels are computed again, one by one, for the gradients. The results are bit for bit
those of one pass.
"""

from functools import reduce
from itertools import product

import torch
from torch.utils.checkpoint import checkpoint

from threestudio.utils.typing import *

from .layout import GridLayout, Level

UINT32 = 2**32 - 1
# Positions farther out share a cell: an integer of 32 bits cannot hold their vertices.
FARTHEST = 2.0**30


def _hash_encode_torch(
    x: Float[Tensor, "N D"], params: Float[Tensor, "P"], layout: GridLayout
) -> Float[Tensor, "N LF"]:
    """Features of points in [0, 1]^D, level by level (arXiv:2201.05989, section 3).

    With u = x scale + 1/2, the cell c = floor(u), t = u - c, and s = t (Linear) or
    s = t^2 (3 - 2 t) (Smoothstep), a level's features are

        sum over the corners b of {0, 1}^D of  prod_d (s_d if b_d else 1 - s_d) T[entry(c + b)]

    with the entries of ``layout.Level``. Points outside are interpolated in the same way: their
    vertices wrap around. Differentiable in x and params to any order (0 where a derivative jumps:
    the cell has no gradient).
    """
    table = params.view(-1, layout.n_features_per_level)
    corners = torch.tensor(list(product((0, 1), repeat=x.shape[1])), device=x.device)
    differentiated = torch.is_grad_enabled() and (x.requires_grad or params.requires_grad)
    features = []
    for level in layout.levels:
        arguments = x, table, corners, level, layout.interpolation == "Smoothstep"
        if differentiated:
            again = checkpoint(_level, *arguments, use_reentrant=False, preserve_rng_state=False)
            features.append(again)
        else:
            features.append(_level(*arguments))
    return torch.cat(features, dim=-1)


def _level(
    x: Float[Tensor, "N D"],
    table: Float[Tensor, "E F"],
    corners: Int[Tensor, "2^D D"],
    level: Level,
    smooth: bool,
) -> Float[Tensor, "N F"]:
    """One level's features. Autograd would keep 96 bytes a point of each level (D = 3, F = 2): with
    16 levels more than twice of what the rest of a radiance field keeps."""
    position = x * level.scale + 0.5
    cell = position.detach().floor()
    s = position - cell
    if smooth:
        s = s * s * (3 - 2 * s)
    vertices = cell.clamp(-FARTHEST, FARTHEST).long()[:, None] + corners  # N, 2^D, D
    terms = (vertices * torch.tensor(level.strides, device=x.device)).unbind(-1)
    joined = reduce(torch.add if level.dense else torch.bitwise_xor, terms)
    entries = level.offset + (joined & UINT32) % level.size
    factors = torch.where(corners == 1, s[:, None], 1 - s[:, None]).unbind(-1)
    weights = reduce(torch.mul, factors)
    return (weights[..., None] * table[entries]).sum(1)
