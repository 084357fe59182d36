"""Features that are colours already."""

from dataclasses import dataclass

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.ops import get_activation
from threestudio.utils.typing import *


@threestudio.register("no-material")
class NoMaterial(BaseMaterial):
    """``colour = color_activation(features)``: no light, no shading."""

    @dataclass
    class Config(BaseMaterial.Config):
        n_output_dims: int = 3  # channels of the features; 0: colours come from the geometry
        color_activation: str = "sigmoid"
        requires_normal: bool = False

    cfg: Config

    def configure(self) -> None:
        self.requires_normal = self.cfg.requires_normal
        self.activation = get_activation(self.cfg.color_activation)

    def forward(self, features: Float[Tensor, "*B F"], **kwargs) -> Float[Tensor, "*B C"]:
        if features.shape[-1] != self.cfg.n_output_dims:
            raise ValueError(
                f"no-material has n_output_dims={self.cfg.n_output_dims} but the geometry gives "
                f"{features.shape[-1]} features: set material.n_output_dims accordingly"
            )
        return self.activation(features)

    def export(self, features: Float[Tensor, "*B F"], **kwargs) -> Dict[str, Any]:
        """``albedo`` (..., 3): the first three channels, within 0..1."""
        return {"albedo": self(features, **kwargs)[..., :3].clamp(0.0, 1.0)}
