"""Lambertian shading by one point light."""

import random
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.ops import dot, get_activation
from threestudio.utils.typing import *

SHADINGS = ("albedo", "textureless", "diffuse")


@threestudio.register("diffuse-with-point-light-material")
class DiffuseWithPointLightMaterial(BaseMaterial):
    """colour = albedo (diffuse max(0, n . l) + ambient), the shading of DreamFusion
    (arXiv:2209.14988, eq. 7): n the normal, l the direction to the light.

    While training, each batch has one of three looks: ``albedo`` alone before step
    ``ambient_only_steps`` and, after it, with probability 1 - ``diffuse_prob``; else
    ``textureless`` (albedo 1) with probability ``textureless_prob``; else ``diffuse``. In
    evaluation it is ``albedo`` with ``ambient_only_on_test`` and ``diffuse`` without. With
    ``soft_shading`` the ambient part is drawn from 0..1 for each batch of training, and the
    diffuse one is the rest.
    """

    @dataclass
    class Config(BaseMaterial.Config):
        ambient_light_color: Annotated[Any, "list [0, 1e4]"] = (0.1, 0.1, 0.1)
        diffuse_light_color: Annotated[Any, "list [0, 1e4]"] = (0.9, 0.9, 0.9)
        ambient_only_steps: Annotated[int, "[-1, 1e12]"] = 1000
        diffuse_prob: Annotated[float, "[0, 1]"] = 0.75
        textureless_prob: Annotated[float, "[0, 1]"] = 0.5
        albedo_activation: str = "sigmoid"
        soft_shading: bool = False
        ambient_only_on_test: bool = False

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            for name in ("ambient_light_color", "diffuse_light_color"):
                if len(self[name]) not in (1, 3):
                    yield name, f"must have 3 numbers, or 1 for white light, not {len(self[name])}"

    cfg: Config

    def configure(self) -> None:
        self.requires_normal = True
        for name in ("ambient_light_color", "diffuse_light_color"):
            color = torch.tensor([float(c) for c in self.cfg[name]])
            self.register_buffer(name, color, persistent=False)
        self.activation = get_activation(self.cfg.albedo_activation)
        self.ambient_only = False

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Ambient light only before ``ambient_only_steps``."""
        self.ambient_only = global_step < self.cfg.ambient_only_steps

    def draw_shading(self) -> str:
        """The look of the next batch."""
        if not self.training:
            return "albedo" if self.cfg.ambient_only_on_test else "diffuse"
        if self.ambient_only or random.random() > self.cfg.diffuse_prob:
            return "albedo"
        return "textureless" if random.random() < self.cfg.textureless_prob else "diffuse"

    def forward(
        self,
        features: Float[Tensor, "*B F"],
        positions: Float[Tensor, "*B 3"],
        shading_normal: Float[Tensor, "*B 3"],
        light_positions: Float[Tensor, "*B 3"],
        ambient_ratio: Optional[float] = None,
        shading: Optional[str] = None,
        **kwargs,
    ) -> Float[Tensor, "*B 3"]:
        """Colours; ``shading`` (one of SHADINGS) and ``ambient_ratio`` (ambient part of the
        light, 0..1) replace what would be drawn."""
        shading = shading or self.draw_shading()
        if shading not in SHADINGS:
            raise ValueError(f"shading is one of {', '.join(SHADINGS)}, not {shading!r}")
        albedo = self.activation(features[..., :3])
        ambient, diffuse = self.ambient_light_color, self.diffuse_light_color
        if ambient_ratio is None and self.training and self.cfg.soft_shading:
            ambient_ratio = random.random()
        if ambient_ratio is not None:
            ambient, diffuse = ambient_ratio, 1 - ambient_ratio
        to_light = F.normalize(light_positions - positions, dim=-1)
        light = diffuse * dot(shading_normal, to_light).clamp(min=0) + ambient
        # '0 *': distributed training insists that every parameter is in the graph
        if shading == "albedo":
            return albedo + 0 * light
        if shading == "textureless":
            return 0 * albedo + light
        return albedo * light

    def export(self, features: Float[Tensor, "*B F"], **kwargs) -> Dict[str, Any]:
        """``albedo`` (..., 3), within 0..1."""
        return {"albedo": self.activation(features[..., :3]).clamp(0.0, 1.0)}
