"""A picture around the scene."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.utils.ops import get_activation
from threestudio.utils.typing import *


@threestudio.register("textured-background")
class TexturedBackground(BaseBackground):
    """color_activation of the parameter ``texture`` (1, C, H, W), looked up at the spherical
    coordinates of the direction: the column by the azimuth (atan2(y, x), -pi..pi), the row by the
    angle from +z."""

    @dataclass
    class Config(BaseBackground.Config):
        n_output_dims: Annotated[int, "[1, 4096]"] = 3
        height: Annotated[int, "[1, 16384]"] = 64
        width: Annotated[int, "[1, 16384]"] = 64
        color_activation: str = "sigmoid"

    cfg: Config

    def configure(self) -> None:
        cfg = self.cfg
        self.texture = nn.Parameter(torch.randn(1, cfg.n_output_dims, cfg.height, cfg.width))
        self.activation = get_activation(cfg.color_activation)

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W C"]:
        x, y, z = dirs.reshape(1, 1, -1, 3).unbind(-1)
        column = torch.atan2(y, x) / math.pi
        row = 2 * torch.atan2(torch.hypot(x, y), z) / math.pi - 1
        color = F.grid_sample(
            self.texture,
            torch.stack([column, row], dim=-1),
            mode="bilinear",
            padding_mode="reflection",
            align_corners=False,
        )
        return self.activation(color[0, :, 0].T.reshape(*dirs.shape[:-1], -1))
