"""Base class of backgrounds, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass

import torch

from threestudio.utils.base import BaseModule
from threestudio.utils.ranges import shown
from threestudio.utils.typing import *


class BaseBackground(BaseModule):
    """``forward(dirs (B, H, W, 3) ray directions in the world) -> colours (B, H, W, C)``."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Config

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W C"]:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


def wrong_color(color: Any, channels: int) -> str:
    """What is wrong with a background's colour; empty if nothing is. Colours of pictures are within
    0..1; other numbers of channels are latents, which have no bounds."""
    if len(color) != channels:
        return f"has {len(color)} numbers, but n_output_dims is {channels}"
    if channels == 3 and not all(0 <= c <= 1 for c in color):
        return f"must be three numbers from 0 to 1, not {shown(color)}"
    return ""


def random_color(color: Float[Tensor, "B H W C"], probability: float) -> Float[Tensor, "B H W C"]:
    """With ``probability`` one uniform random colour per image instead of ``color``.

    The old one stays in the graph ('0 *'), which distributed training insists on.
    """
    if torch.rand(()) < probability:
        color = color * 0 + torch.rand(len(color), 1, 1, color.shape[-1]).to(color)
    return color
