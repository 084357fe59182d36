from dataclasses import dataclass

import torch
import torch.nn as nn

import threestudio
from threestudio.models.geometry.base import BaseGeometry
from threestudio.models.mesh import Mesh
from threestudio.utils.ops import get_activation
from threestudio.utils.typing import *


@threestudio.register("splat-geometry")
class SplatGeometry(BaseGeometry):
    @dataclass
    class Config(BaseGeometry.Config):
        n_points: int = 24
        radius: float = 0.6
        color_activation: str = "sigmoid"

    cfg: Config

    def configure(self) -> None:
        self._xyz = nn.Parameter((torch.rand(self.cfg.n_points, 3) * 2 - 1) * self.cfg.radius)
        self._color = nn.Parameter(torch.randn(self.cfg.n_points, 3))
        self._opacity = nn.Parameter(torch.zeros(self.cfg.n_points, 1))
        self.color_activation = get_activation(self.cfg.color_activation)

    @property
    def get_color(self):
        return self.color_activation(self._color)

    @property
    def get_opacity(self):
        return torch.sigmoid(self._opacity)

    def grow(self, n: int) -> None:
        """n more points, beside the first ones."""
        for name in ("_xyz", "_color", "_opacity"):
            old = getattr(self, name).data
            new = torch.cat([old, old[:n] + 0.05 * torch.randn_like(old[:n])])
            setattr(self, name, nn.Parameter(new))

    def extract_mesh(self) -> Mesh:
        """A triangle per point."""
        corners = torch.tensor([[0.0, 0, 0.1], [0, 0.1, -0.1], [0, -0.1, -0.1]])
        v_pos = (self._xyz.detach()[:, None] + corners.to(self._xyz)).reshape(-1, 3)
        mesh = Mesh(v_pos, torch.arange(len(v_pos)).reshape(-1, 3))
        mesh.set_vertex_color(self.get_color.detach().repeat_interleave(3, dim=0))
        return mesh
