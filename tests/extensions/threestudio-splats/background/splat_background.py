import random
from dataclasses import dataclass

import torch

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.networks import get_encoding, get_mlp
from threestudio.utils.typing import *


@threestudio.register("splat-background")
class SplatBackground(BaseBackground):
    @dataclass
    class Config(BaseBackground.Config):
        n_output_dims: int = 3
        dir_encoding_config: dict = None
        mlp_network_config: dict = None
        random_aug: bool = False
        random_aug_prob: float = 0.5
        share_aug_bg: bool = False

    cfg: Config

    def configure(self) -> None:
        self.encoding = get_encoding(3, self.cfg.dir_encoding_config)
        self.network = get_mlp(
            self.encoding.n_output_dims, self.cfg.n_output_dims, self.cfg.mlp_network_config
        )

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W Nc"]:
        if self.training and self.cfg.random_aug and random.random() < self.cfg.random_aug_prob:
            n = 1 if self.cfg.share_aug_bg else dirs.shape[0]
            return torch.rand(n, 1, 1, 3).to(dirs).expand(*dirs.shape[:-1], -1)
        color = self.network(self.encoding((dirs.reshape(-1, 3) + 1.0) / 2.0))
        return torch.sigmoid(color).view(*dirs.shape[:-1], -1)
