"""What a rasteriser finds in the pixels."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Fragments:
    """Of each pixel's centre: the triangle ``face`` (-1: none), the ``weights`` of its corners,
    which sum to 1, and the camera's z there, ``depth``, in world units; the last two are 0 where
    there is no triangle. Both have gradients with respect to the vertices. ``native`` is what a
    backend keeps for itself."""

    face: Int[Tensor, "C H W"]
    weights: Float[Tensor, "C H W 3"]
    depth: Float[Tensor, "C H W"]
    native: Any = None


@dataclass
class Crossings:
    """Pairs of pixels, by their places ``first`` and ``second`` in (C, H, W), the second to the
    right of the first or below it, and the ``shift`` from the middle between their centres, in
    pixels from -1/2 to 1/2, at which a silhouette crosses the segment between them. The shift has
    a gradient with respect to the vertices."""

    first: Int[Tensor, " K"]
    second: Int[Tensor, " K"]
    shift: Float[Tensor, " K"]
