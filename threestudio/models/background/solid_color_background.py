"""One colour everywhere."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn

import threestudio
from threestudio.models.background.base import BaseBackground, random_color, wrong_color
from threestudio.utils.typing import *


@threestudio.register("solid-color-background")
class SolidColorBackground(BaseBackground):
    """The colour ``env_color`` (C,): a buffer, or a parameter when ``learned``.

    With ``random_aug``, while training, a batch gets with probability ``random_aug_prob`` one
    uniform random colour per image instead, which keeps the object from being drawn by its
    background.
    """

    @dataclass
    class Config(BaseBackground.Config):
        n_output_dims: Annotated[int, "[1, 4096]"] = 3
        color: Annotated[Any, "list (-inf, inf)"] = (1.0, 1.0, 1.0)  # n_output_dims numbers, 0..1
        learned: bool = False
        random_aug: bool = False
        random_aug_prob: Annotated[float, "[0, 1]"] = 0.5

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            if wrong := wrong_color(self.color, self.n_output_dims):
                yield "color", wrong

    cfg: Config

    def configure(self) -> None:
        color = torch.tensor([float(c) for c in self.cfg.color], dtype=torch.float32)
        self.env_color: Float[Tensor, "C"]
        if self.cfg.learned:
            self.env_color = nn.Parameter(color)
        else:
            self.register_buffer("env_color", color)

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W C"]:
        n = self.cfg.n_output_dims
        color = self.env_color.expand(*dirs.shape[:-1], n)
        if self.training and self.cfg.random_aug:
            color = random_color(color, self.cfg.random_aug_prob)
        return color
