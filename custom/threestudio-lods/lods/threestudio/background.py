"""``lods-shared-environment-map-background``: views that belong together have one background."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio

Base: Any = threestudio.find("neural-environment-map-background")


@threestudio.register("lods-shared-environment-map-background")
class SharedEnvironmentMapBackground(Base):
    """``neural-environment-map-background``, whose ``random_aug`` gives all pictures of a batch the
    same random colour, as MVDream's (arXiv:2308.16512): its model has seen no object before several
    backgrounds."""

    @dataclass
    class Config(Base.Config):
        pass

    cfg: Config

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W C"]:
        """The colours behind these directions."""
        augments = self.cfg.random_aug
        self.cfg.random_aug = False
        try:
            color = super().forward(dirs)
        finally:
            self.cfg.random_aug = augments
        prob = self.cfg.random_aug_prob
        if self.training and augments and torch.rand(()) < prob:
            # 0 times the map, so that its parameters have a gradient in every step
            return 0 * color + torch.rand(color.shape[-1]).to(color)
        return color
