"""What geometries that are a density by position share."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.utils.errors import UserError
from threestudio.utils.ops import get_activation
from threestudio.utils.typing import *


def finite_difference_normal(
    field: Callable[[Tensor], Tensor],
    points: Float[Tensor, "*N 3"],
    value: Float[Tensor, "*N 1"],
    eps: float,
    radius: float,
    central: bool = False,
) -> Float[Tensor, "*N 3"]:
    """Unit vectors along -grad ``field`` at ``points``, where it has the ``value``.

    One-sided: -(f(x + eps e_k) - f(x)) / eps, three more evaluations; ``central``:
    -(f(x + eps e_k) - f(x - eps e_k)) / (2 eps), six. The taps are clamped to the cube of
    half-width ``radius``, outside of which a field need not be defined.
    """
    steps = eps * torch.eye(3, dtype=points.dtype, device=points.device)
    if central:
        taps = torch.stack([steps, -steps])  # sign, axis, coordinate
        values = field((points[..., None, None, :] + taps).clamp(-radius, radius))[..., 0]
        difference = 0.5 * (values[..., 0, :] - values[..., 1, :])
    else:
        values = field((points[..., None, :] + steps).clamp(-radius, radius))[..., 0]
        difference = values - value
    return F.normalize(-difference / eps, dim=-1)


class DensityVolume(BaseImplicitGeometry):
    """density = density_activation(raw(x) + bias(x)), in 1 / world units.

    The bias makes a blob at the origin to begin with, |x| in world units and s, std the options
    ``density_blob_scale`` and ``density_blob_std``: ``linear`` s (1 - |x| / std) (Magic3D,
    arXiv:2211.10440), ``gaussian`` s exp(-|x|^2 / (2 std^2)) (DreamFusion, arXiv:2209.14988); or
    it is a number. The YAML's names for the two are the keys of ``BLOBS``.
    """

    BLOBS: Dict[str, str] = {}

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        n_feature_dims: Annotated[int, "[0, 4096]"] = 3
        density_activation: Optional[str] = "softplus"
        density_bias: Annotated[Any, "(-inf, inf)"] = 0.0  # a number, or the name of a blob
        density_blob_scale: Annotated[float, "(-inf, inf)"] = 10.0
        density_blob_std: Annotated[float, "(0, 1e6]"] = 0.5
        normal_type: Optional[str] = "finite_difference"

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self.activation = get_activation(self.cfg.density_activation)
        self.density_blob_std = self.cfg.density_blob_std

    def activated_density(
        self, points: Float[Tensor, "*N 3"], raw: Float[Tensor, "*N 1"]
    ) -> Float[Tensor, "*N 1"]:
        """The density from the raw value of the network or grid."""
        bias, scale = self.cfg.density_bias, self.cfg.density_blob_scale
        kind = self.BLOBS.get(bias) if isinstance(bias, str) else None
        if kind == "linear":
            bias = scale * (1 - points.norm(dim=-1, keepdim=True) / self.density_blob_std)
        elif kind == "gaussian":
            square = points.square().sum(dim=-1, keepdim=True)
            bias = scale * torch.exp(-0.5 * square / self.density_blob_std**2)
        return self.activation(raw + bias)

    def check_normals(self) -> None:
        """Refuse to give normals when there are none."""
        if self.cfg.normal_type is None:
            raise UserError(
                "normals are asked for (by the material or by return_comp_normal), but "
                "geometry.normal_type is null: set it to finite_difference"
            )

    def forward_density(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 1"]:
        """The density alone."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_density")

    def forward_field(self, points: Float[Tensor, "*N 3"]) -> Tuple[Float[Tensor, "*N 1"], None]:
        """The field whose level set is the surface: the density; no deformation."""
        return self.forward_density(points), None

    def forward_level(
        self, field: Float[Tensor, "*N 1"], threshold: float
    ) -> Float[Tensor, "*N 1"]:
        """Negative inside: threshold - field."""
        return threshold - field
