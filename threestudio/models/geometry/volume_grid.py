"""Density and features on a dense grid."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

import threestudio
from threestudio.models.geometry.base import contract_to_unisphere
from threestudio.models.geometry.density import DensityVolume, finite_difference_normal
from threestudio.utils.typing import *

_EPS = 1.0e-3  # world units
NORMAL_TYPES = ("finite_difference", "pred")


@threestudio.register("volume-grid")
class VolumeGrid(DensityVolume):
    """(d, features) = trilinear interpolation of the parameter ``grid`` (1, 1 + F, D, H, W), and
    raw(x) = exp(density_scale) d; see :class:`DensityVolume` for the density. ``density_scale`` is
    learnt unless the bias is a blob, when it is 0."""

    BLOBS = {"blob": "linear"}

    @dataclass
    class Config(DensityVolume.Config):
        # z, y, x: D, H, W of grid_sample
        grid_size: Annotated[Tuple[int, int, int], "[1, 4096]"] = (100, 100, 100)
        density_bias: Annotated[Any, "(-inf, inf) or blob"] = "blob"
        density_blob_scale: float = 5.0
        normal_type: Annotated[Optional[str], NORMAL_TYPES] = "finite_difference"
        isosurface_threshold: Annotated[Any, "(-inf, inf) or auto"] = "auto"

    cfg: Config

    def configure(self) -> None:
        super().configure()
        cfg = self.cfg
        size = tuple(cfg.grid_size)
        self.grid = nn.Parameter(torch.zeros(1, cfg.n_feature_dims + 1, *size))
        if cfg.density_bias == "blob":
            self.register_buffer("density_scale", torch.zeros(1))
        else:
            self.density_scale = nn.Parameter(torch.zeros(1))
        if cfg.normal_type == "pred":
            self.normal_grid = nn.Parameter(torch.zeros(1, 3, *size))

    def _sample(
        self, points: Float[Tensor, "*N 3"], grid: Float[Tensor, "1 C D H W"]
    ) -> Float[Tensor, "*N C"]:
        unit = contract_to_unisphere(points, self.bbox, self.unbounded)
        where = (2 * unit - 1).reshape(1, 1, 1, -1, 3)
        values = F.grid_sample(grid, where, align_corners=False, mode="bilinear")
        return values.reshape(grid.shape[1], -1).T.reshape(*points.shape[:-1], grid.shape[1])

    def _density(
        self, points: Float[Tensor, "*N 3"], raw: Float[Tensor, "*N 1"]
    ) -> Float[Tensor, "*N 1"]:
        return self.activated_density(points, raw * self.density_scale.exp())

    def forward_density(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 1"]:
        """The density alone."""
        return self._density(points, self._sample(points, self.grid[:, :1]))

    def forward(
        self, points: Float[Tensor, "*N 3"], output_normal: bool = False
    ) -> Dict[str, Float[Tensor, "..."]]:
        """``density``, ``features`` if there are any, and with ``output_normal`` ``normal`` and
        ``shading_normal``, at world points."""
        raw = self._sample(points, self.grid)
        density = self._density(points, raw[..., :1])
        out = {"density": density}
        if self.cfg.n_feature_dims > 0:
            out["features"] = raw[..., 1:]
        if output_normal:
            self.check_normals()
            if self.cfg.normal_type == "pred":
                normal = F.normalize(self._sample(points, self.normal_grid), dim=-1)
            else:
                normal = finite_difference_normal(
                    self.forward_density, points, density, _EPS, self.cfg.radius
                )
            out["normal"] = out["shading_normal"] = normal
        return out

    def export(self, points: Float[Tensor, "*N 3"], **kwargs) -> Dict[str, Any]:
        """``features`` at the points."""
        if self.cfg.n_feature_dims == 0:
            return {}
        return {"features": self._sample(points, self.grid[:, 1:])}
