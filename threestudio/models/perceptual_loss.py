"""``perceptual-loss``: LPIPS by a registered name."""

from dataclasses import dataclass

import threestudio
from threestudio.utils.base import BaseObject
from threestudio.utils.perceptual import PerceptualLoss
from threestudio.utils.typing import *


@threestudio.register("perceptual-loss")
class PerceptualLossObject(BaseObject):
    """``object(x, y)`` is :class:`PerceptualLoss` of two batches of pictures, on the device."""

    @dataclass
    class Config(BaseObject.Config):
        use_dropout: bool = True

    cfg: Config

    def configure(self) -> None:
        self.perceptual_loss = PerceptualLoss(self.cfg.use_dropout).to(self.device)

    def __call__(
        self, x: Float[Tensor, "N 3 H W"], y: Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, "N 1 1 1"]:
        return self.perceptual_loss(x, y)
