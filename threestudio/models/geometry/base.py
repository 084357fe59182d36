"""Base classes of geometries, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass

import torch

from threestudio.utils.base import BaseModule
from threestudio.utils.typing import *


def contract_to_unisphere(
    x: Float[Tensor, "*N 3"], bbox: Float[Tensor, "2 3"], unbounded: bool = False
) -> Float[Tensor, "*N 3"]:
    """Map world points into the unit cube, where encodings live.

    Bounded: ``(x - lo) / (hi - lo)``, so that ``bbox`` becomes [0, 1]^3 (points outside stay
    outside). Unbounded: with ``u = 2 (x - lo) / (hi - lo) - 1``, ``u`` is kept inside the unit
    ball and becomes ``(2 - 1/|u|) u/|u|`` outside (Mip-NeRF 360, arXiv:2111.12077, eq. 10), and
    ``u/4 + 1/2`` is returned, so that all of space lands in [0, 1]^3.
    """
    lo, hi = bbox
    unit = (x - lo) / (hi - lo)
    if not unbounded:
        return unit
    u = 2 * unit - 1
    norm = u.norm(dim=-1, keepdim=True).clamp_min(1.0)
    return (2 - 1 / norm) * (u / norm) / 4 + 0.5


class BaseGeometry(BaseModule):
    """Something a renderer can draw."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Config

    @staticmethod
    def create_from(other: "BaseGeometry", cfg=None, **kwargs) -> "BaseGeometry":
        """Build this kind of geometry from another one (see ``system.geometry_convert_from``)."""
        raise TypeError(f"a geometry cannot be created from {type(other).__name__}")

    def export(self, *args, **kwargs) -> Dict[str, Any]:
        """Quantities to write into an exported asset, by name. Nothing by default."""
        return {}


class BaseImplicitGeometry(BaseGeometry):
    """A field over the cube ``[-radius, radius]^3``.

    Buffer ``bbox`` (2, 3) holds the two corners; subclasses define ``forward(points (..., 3),
    output_normal=False) -> dict``.
    """

    @dataclass
    class Config(BaseGeometry.Config):
        radius: float = 1.0

    cfg: Config

    def configure(self) -> None:
        r = self.cfg.radius
        self.bbox: Float[Tensor, "2 3"]
        self.register_buffer("bbox", torch.tensor([[-r, -r, -r], [r, r, r]], dtype=torch.float32))
        self.unbounded: bool = False

    def forward(
        self, points: Float[Tensor, "*N 3"], output_normal: bool = False
    ) -> Dict[str, Float[Tensor, "..."]]:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


class BaseExplicitGeometry(BaseGeometry):
    """A geometry with parameters that lie in space: points, Gaussians, a mesh."""

    @dataclass
    class Config(BaseGeometry.Config):
        radius: float = 1.0

    cfg: Config
