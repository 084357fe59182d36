"""A colour for every direction, from a small network."""

from dataclasses import dataclass, field
from typing import Annotated

import torch

import threestudio
from threestudio.models.background.base import BaseBackground, random_color, wrong_color
from threestudio.models.networks import (
    EncodingOptions,
    NetworkOptions,
    get_encoding,
    get_mlp,
)
from threestudio.utils.ops import get_activation
from threestudio.utils.typing import *


@threestudio.register("neural-environment-map-background")
class NeuralEnvironmentMapBackground(BaseBackground):
    """color_activation(network(encoding(d))) of the viewing direction d.

    With ``random_aug``, while training, a batch gets with probability ``random_aug_prob`` one
    uniform random colour per image instead. ``eval_color``: in evaluation that colour.
    """

    @dataclass
    class Config(BaseBackground.Config):
        n_output_dims: Annotated[int, "[1, 4096]"] = 3
        color_activation: str = "sigmoid"
        dir_encoding_config: Annotated[dict, EncodingOptions] = field(
            default_factory=lambda: {"otype": "SphericalHarmonics", "degree": 3}
        )
        mlp_network_config: Annotated[dict, NetworkOptions] = field(
            default_factory=lambda: {
                "otype": "VanillaMLP",
                "activation": "ReLU",
                "n_neurons": 16,
                "n_hidden_layers": 2,
            }
        )
        random_aug: bool = False
        random_aug_prob: Annotated[float, "[0, 1]"] = 0.5
        eval_color: Annotated[Optional[Any], "list (-inf, inf)"] = (
            None  # n_output_dims numbers, 0..1
        )

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            color = self.eval_color
            if color is not None and (wrong := wrong_color(color, self.n_output_dims)):
                yield "eval_color", wrong

    cfg: Config

    def configure(self) -> None:
        n = self.cfg.n_output_dims
        self.encoding = get_encoding(3, self.cfg.dir_encoding_config)
        self.network = get_mlp(self.encoding.n_output_dims, n, self.cfg.mlp_network_config)
        self.activation = get_activation(self.cfg.color_activation)

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W C"]:
        n = self.cfg.n_output_dims
        if not self.training and self.cfg.eval_color is not None:
            fixed = torch.tensor([float(c) for c in self.cfg.eval_color]).to(dirs)
            return fixed.expand(*dirs.shape[:-1], n)
        encoded = self.encoding((dirs.reshape(-1, 3) + 1) / 2)
        color = self.activation(self.network(encoded)).reshape(*dirs.shape[:-1], n)
        if self.training and self.cfg.random_aug:
            color = random_color(color, self.cfg.random_aug_prob)
        return color
