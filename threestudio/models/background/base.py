"""Base class of backgrounds, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass

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
