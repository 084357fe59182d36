"""The reference on one tile after the other: what ``cpu`` draws with before it has compiled.

A Gaussian is blended in the tiles that its extents reach, so that the cost is that of the (tile,
Gaussian) pairs, as in the compiled rasteriser. Compiling that takes as long as many such
pictures; see :func:`lods.gaussians.backends.uncompiled`.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from lods.gaussians import reference
from lods.gaussians.backends.base import Drawn, project_and_blend
from lods.gaussians.backends.reference import refuses
from torch import Tensor

__all__ = ["composite", "rasterization", "refuses"]
TILE = 16  # pixels
MOST_PAIRS = 2e8  # of a pixel and a Gaussian; for more the kernels are worth compiling


def rasterization(**arguments: Any) -> Drawn:
    """See :func:`lods.gaussians.rasterization`."""
    chunk = arguments["channel_chunk"]
    return project_and_blend(reference.project, composite, arguments, chunk=chunk)


def composite(
    means2d: Float[Tensor, "C N 2"],
    conics: Float[Tensor, "C N 3"],
    opacities: Float[Tensor, " N"],
    colors: Float[Tensor, "*C N D"],
    depths: Float[Tensor, "C N"],
    extents: Float[Tensor, "C N 2"],
    width: int,
    height: int,
    backgrounds: Float[Tensor, "C D"] | None = None,
    with_depth: bool = False,
    chunk: int = 32,
) -> tuple[Float[Tensor, "C H W D"], Float[Tensor, "C H W 1"]]:
    """See :func:`lods.gaussians.reference.composite`."""
    drawn = (extents > 0).all(-1)
    size = torch.tensor([width, height], device=extents.device)
    reached = torch.minimum(2 * extents + TILE, size).prod(-1)[drawn].double().sum()
    if reached > MOST_PAIRS:
        from lods.gaussians.backends import cpu

        return cpu.composite(
            means2d, conics, opacities, colors, depths, extents, width, height, backgrounds,
            with_depth,
        )  # fmt: skip
    colors = colors.expand(len(means2d), -1, -1)
    images, alphas = [], []
    for c in range(len(means2d)):
        rows = []
        for top in range(0, height, TILE):
            row = []
            for left in range(0, width, TILE):
                w, h = min(TILE, width - left), min(TILE, height - top)
                corner = means2d.new_tensor([left, top])
                near = drawn[c] & _reaches(means2d[c] - corner, extents[c], w, h)
                row.append(
                    reference.composite(
                        means2d[c : c + 1, near] - corner, conics[c : c + 1, near],
                        opacities[near], colors[c : c + 1, near], depths[c : c + 1, near],
                        extents[c : c + 1, near], w, h,
                        None if backgrounds is None else backgrounds[c : c + 1],
                        with_depth, chunk,
                    )
                )  # fmt: skip
            rows.append([torch.cat(part, dim=2) for part in zip(*row)])
        image, alpha = (torch.cat(part, dim=1) for part in zip(*rows))
        images.append(image)
        alphas.append(alpha)
    return torch.cat(images), torch.cat(alphas)


def _reaches(
    means2d: Float[Tensor, "N 2"], extents: Float[Tensor, "N 2"], width: int, height: int
) -> Bool[Tensor, " N"]:
    """Which Gaussians may have an alpha of 1/255 in the pixels from 0 to the size of a tile."""
    size = means2d.new_tensor([width, height])
    return ((means2d + extents > 0) & (means2d - extents < size)).all(-1)
