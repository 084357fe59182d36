"""Base classes of geometries, with the interface of threestudio 0.2.3."""

from dataclasses import dataclass
from typing import Annotated

import torch

import threestudio
from threestudio.models.isosurface import marching_cubes, sample_grid
from threestudio.models.mesh import Mesh
from threestudio.utils.base import BaseModule
from threestudio.utils.errors import UserError, WrongKindError
from threestudio.utils.typing import *

ISOSURFACE_METHODS = ("mt", "mc-cpu")


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
        raise WrongKindError(
            f"a geometry cannot be created from {type(other).__name__} (geometry_convert_from)"
        )

    def export(self, *args, **kwargs) -> Dict[str, Any]:
        """Quantities to write into an exported asset, by name. Nothing by default."""
        return {}


class BaseImplicitGeometry(BaseGeometry):
    """A field over the cube ``[-radius, radius]^3``.

    Buffer ``bbox`` (2, 3) holds the two corners; subclasses define ``forward(points (..., 3),
    output_normal=False) -> dict`` and, for ``isosurface``, ``forward_field`` and
    ``forward_level``.
    """

    @dataclass
    class Config(BaseGeometry.Config):
        radius: Annotated[float, "(0, 1e6]"] = 1.0
        isosurface: bool = True
        # "mc-cpu", marching cubes. "mt", marching tetrahedra, needs files of tetrahedra that are
        # not shipped: it runs marching cubes too
        isosurface_method: Annotated[str, ISOSURFACE_METHODS] = "mt"
        # points along each side of the box
        isosurface_resolution: Annotated[int, "[2, 4096]"] = 128
        # or "auto": mean of the values above 1e-5
        isosurface_threshold: Annotated[Union[float, str], "(-inf, inf) or auto"] = 0.0
        isosurface_chunk: Annotated[int, "[0, 1e12]"] = 0  # points at a time; 0: 2^18
        isosurface_coarse_to_fine: bool = True  # again in the surface's own box, 10 % wider
        isosurface_deformable_grid: bool = False  # of marching tetrahedra: warned about
        isosurface_remove_outliers: bool = True
        # faces that a separate part needs to stay: a number, or a fraction of the largest part's
        isosurface_outlier_n_faces_threshold: Annotated[Union[int, float], "[0, 1e12]"] = 0.01

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

    # -- surface ---------------------------------------------------------------------------------

    def forward_field(
        self, points: Float[Tensor, "*N 3"]
    ) -> Tuple[Float[Tensor, "*N 1"], Optional[Float[Tensor, "*N 3"]]]:
        """``(field, deformation of the grid or None)`` at world points."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_field")

    def forward_level(
        self, field: Float[Tensor, "*N 1"], threshold: float
    ) -> Float[Tensor, "*N 1"]:
        """A function of the field that is negative inside the surface and zero on it."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_level")

    @torch.no_grad()
    def isosurface(self) -> Mesh:
        """The level set at ``isosurface_threshold`` as a mesh in world coordinates, with the extra
        ``bbox``: the box in which it was looked for.

        With ``isosurface_coarse_to_fine`` a first pass over the whole cube finds the box of the
        second, so that all points of the grid are spent where the surface is. An automatic
        threshold is that of the first pass, for both.

        Raises UserError when there is no surface, with what to set instead.
        """
        if not self.cfg.isosurface:
            raise UserError("geometry.isosurface is false: set it to true to get a mesh")
        if self.cfg.isosurface_method == "mt":
            threestudio.info(
                "isosurface_method=mt: marching cubes is used, "
                "the files that marching tetrahedra needs are not shipped"
            )
        if self.cfg.isosurface_deformable_grid:
            threestudio.warn(
                "isosurface_deformable_grid has no effect: marching cubes runs on a regular grid"
            )
        field = self._sample_field(self.bbox)
        threshold = self._threshold_of(field)
        mesh = self._surface_of(field, threshold, self.bbox)
        if self.cfg.isosurface_coarse_to_fine:
            low, high = mesh.v_pos.amin(dim=0), mesh.v_pos.amax(dim=0)
            margin = 0.1 * (high - low)
            low = torch.maximum(low - margin, self.bbox[0])
            high = torch.minimum(high + margin, self.bbox[1])
            box = torch.stack([low, high])
            mesh = self._surface_of(self._sample_field(box), threshold, box)
        return mesh

    def _sample_field(self, bbox: Float[Tensor, "2 3"]) -> Float[Tensor, "R R R"]:
        cfg = self.cfg
        field = sample_grid(
            lambda points: self.forward_field(points)[0],
            cfg.isosurface_resolution,
            bbox,
            cfg.isosurface_chunk,
        )
        if field.isnan().any():
            raise UserError(
                "there is no surface: the geometry's field is not a number (NaN) in places, the "
                "training has diverged; export an earlier checkpoint"
            )
        return field

    def _threshold_of(self, field: Float[Tensor, "R R R"]) -> float:
        if self.cfg.isosurface_threshold != "auto":
            return float(self.cfg.isosurface_threshold)
        positive = field[field > 1e-5]
        if len(positive) == 0:
            raise UserError(
                f"there is no surface: isosurface_threshold=auto is the mean of the field above "
                f"1e-5, and the field lies between {field.min():.4g} and {field.max():.4g}; "
                "train longer, or set geometry.isosurface_threshold to a number in that range"
            )
        threshold = positive.mean().item()
        threestudio.info(f"isosurface_threshold=auto: {threshold:.4g}")
        return threshold

    def _surface_of(
        self, field: Float[Tensor, "R R R"], threshold: float, bbox: Float[Tensor, "2 3"]
    ) -> Mesh:
        level = self.forward_level(field.reshape(-1, 1), threshold).reshape(field.shape)
        if not level.min() < 0 < level.max():
            remedy = "lower" if threshold >= field.max() else "raise"
            raise UserError(
                f"there is no surface at geometry.isosurface_threshold={threshold:.4g}: the field "
                f"lies between {field.min():.4g} and {field.max():.4g}; {remedy} "
                "system.geometry.isosurface_threshold to a number in that range"
            )
        mesh = marching_cubes(level, bbox)
        if self.cfg.isosurface_remove_outliers:
            mesh = mesh.remove_outlier(self.cfg.isosurface_outlier_n_faces_threshold)
        mesh.add_extra("bbox", bbox)
        return mesh


class BaseExplicitGeometry(BaseGeometry):
    """A geometry with parameters that lie in space: points, Gaussians, a mesh."""

    @dataclass
    class Config(BaseGeometry.Config):
        radius: Annotated[float, "(0, 1e6]"] = 1.0

    cfg: Config
