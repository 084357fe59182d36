"""Base class of backgrounds, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass

import torch

from threestudio.utils.base import BaseModule
from threestudio.utils.typing import *


class BaseBackground(BaseModule):
    """``forward(dirs (B, H, W, 3) ray directions in the world) -> colours (B, H, W, C)``."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Config

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W C"]:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


def random_color(color: Float[Tensor, "B H W C"], probability: float) -> Float[Tensor, "B H W C"]:
    """With ``probability`` one uniform random colour per image instead of ``color``.

    The old one stays in the graph ('0 *'), which distributed training insists on.
    """
    if torch.rand(()) < probability:
        color = color * 0 + torch.rand(len(color), 1, 1, color.shape[-1]).to(color)
    return color
