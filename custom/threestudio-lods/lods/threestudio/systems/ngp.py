"""``lods-ngp-system``: text to a neural radiance field."""

from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Float
from lods.threestudio.systems.base import LODSSystem
from lods.threestudio.systems.pictures import grey_cell, rgb_cell
from torch import Tensor

import threestudio
from threestudio.utils.ops import dot

STAGES = ("coarse", "geometry", "texture")
NORMALS = (
    "set system.geometry.normal_type=finite_difference and system.material.requires_normal=true"
)


@threestudio.register("lods-ngp-system")
class LODSInstantNGP(LODSSystem):
    """A density and colours by position, behind a volume renderer; see :class:`LODSSystem` for the
    losses. Its own regularisers, computed when their lambda stands in the YAML and is above 0:

    - ``orient``: sum over samples of w max(0, n . d)^2 over the number of rays that meet anything,
      w the sample's weight (not differentiated), n its normal, d the direction of its ray
      (Ref-NeRF, arXiv:2112.03907, eq. 11)
    - ``z_variance``: the mean variance of the depth along rays with opacity above 1/2; 0 without
      such a ray
    """

    REGULARISERS = (*LODSSystem.REGULARISERS, "orient", "z_variance")

    @dataclass
    class Config(LODSSystem.Config):
        geometry_type: str = "implicit-volume"
        material_type: str = "no-material"
        background_type: str = "neural-environment-map-background"
        renderer_type: str = "nerf-volume-renderer"
        # what the guidance looks at: geometry the normals, coarse and texture the colours
        stage: Annotated[str, STAGES] = "coarse"
        visualize_samples: bool = False  # of the original's YAML; nothing reads it there either

    cfg: Config

    def configure(self) -> None:
        if self.cfg.stage not in STAGES:
            raise ValueError(f"system.stage={self.cfg.stage!r}: the stages are {', '.join(STAGES)}")
        if self.cfg.visualize_samples:
            threestudio.warn("system.visualize_samples has no effect")
        super().configure()

    def guided_image(self, out: dict[str, Any]) -> Float[Tensor, "B H W 3"]:
        if self.cfg.stage != "geometry":
            return out["comp_rgb"]
        if "comp_normal" not in out:
            raise ValueError(
                f"system.stage=geometry needs normals: {NORMALS}, and "
                "system.renderer.return_comp_normal=true"
            )
        return out["comp_normal"]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.loss_of(self(batch), batch)}

    def wants(self, name: str) -> bool:
        wanted = super().wants(name)
        if name in ("orient", "z_variance"):
            return wanted and self.C(self.cfg.loss[f"lambda_{name}"]) > 0
        return wanted

    def regularisers(self, out: dict[str, Any]) -> dict[str, Float[Tensor, ""]]:
        losses = super().regularisers(out)
        if self.wants("orient"):
            if "normal" not in out:
                raise ValueError(f"system.loss.lambda_orient needs normals: {NORMALS}")
            facing_away = dot(out["normal"], out["t_dirs"]).clamp(min=0) ** 2
            rays = (out["opacity"] > 0).sum().clamp(min=1)
            losses["orient"] = (out["weights"].detach() * facing_away).sum() / rays
        if self.wants("z_variance"):
            solid = (out["opacity"] > 0.5).to(out["z_variance"])
            losses["z_variance"] = (out["z_variance"] * solid).sum() / solid.sum().clamp(min=1)
        return losses

    def panels(self, out: dict[str, Any], i: int) -> list[dict[str, Any]]:
        cells = [rgb_cell(out["comp_rgb"][i])]
        if "comp_normal" in out:
            cells.append(rgb_cell(out["comp_normal"][i]))
        return [*cells, grey_cell(out["opacity"][i, ..., 0], (0, 1))]
