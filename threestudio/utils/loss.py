"""Losses that several systems share."""

from threestudio.utils.typing import *


def tv_loss(x: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Total variation: ``2 / B * (sum dh^2 / (C (H-1) W) + sum dw^2 / (C H (W-1)))`` where dh and
    dw are differences of vertical and horizontal neighbours."""
    b, c, h, w = x.shape
    dh = (x[:, :, 1:, :] - x[:, :, :-1, :]).square().sum() / (c * (h - 1) * w)
    dw = (x[:, :, :, 1:] - x[:, :, :, :-1]).square().sum() / (c * h * (w - 1))
    return 2 * (dh + dw) / b
