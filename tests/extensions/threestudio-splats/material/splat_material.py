from dataclasses import dataclass

import torch.nn.functional as F

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.ops import dot
from threestudio.utils.typing import *


@threestudio.register("splat-material")
class SplatMaterial(BaseMaterial):
    @dataclass
    class Config(BaseMaterial.Config):
        ambient: float = 0.5
        ambient_only_steps: int = 2

    cfg: Config

    def configure(self) -> None:
        self.requires_normal = True
        self.ambient_only = False

    def forward(
        self,
        features: Float[Tensor, "B ... Nf"],
        positions: Float[Tensor, "B ... 3"],
        shading_normal: Float[Tensor, "B ... 3"],
        light_positions: Float[Tensor, "B ... 3"],
        **kwargs,
    ) -> Float[Tensor, "B ... 3"]:
        if self.ambient_only:
            return features
        to_light = F.normalize(light_positions - positions, dim=-1)
        diffuse = dot(shading_normal, to_light).clamp(min=0.0)
        return features * (self.cfg.ambient + (1 - self.cfg.ambient) * diffuse)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False):
        self.ambient_only = global_step < self.cfg.ambient_only_steps
