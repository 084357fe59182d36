"""``latentnerf-system``: a radiance field of latents (Latent-NeRF, arXiv:2211.07600)."""

from dataclasses import dataclass

import threestudio
from threestudio.systems.dreamfusion import DreamFusion
from threestudio.utils.errors import UserError
from threestudio.utils.ops import ShapeLoss
from threestudio.utils.typing import *


@threestudio.register("latentnerf-system")
class LatentNeRF(DreamFusion):
    """What is rendered (``comp_rgb``, as many channels as the model's latents) is taken for
    latents, and decoded to be looked at; with ``refinement`` it is colours, as elsewhere.

    ``guide_shape``, the path of a mesh, adds ``loss_shape`` (:class:`ShapeLoss`), which keeps the
    density inside of it. The other losses are those of :class:`.guided.GuidedSystem`.
    """

    @dataclass
    class Config(DreamFusion.Config):
        guide_shape: Optional[str] = None
        refinement: bool = False

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self.shape_loss: Optional[ShapeLoss] = None
        if self.cfg.guide_shape is not None:
            self.shape_loss = ShapeLoss(self.cfg.guide_shape)

    @property
    def renders_latents(self) -> bool:
        return not self.cfg.refinement

    def field_losses(self, out: Dict[str, Any]) -> Dict[str, Float[Tensor, ""]]:
        losses = super().field_losses(out)
        if self.shape_loss is not None and (self.weight_of("shape") or 0) > 0:
            losses["shape"] = self.shape_loss(out["points"], out["density"])
        return losses

    def picture(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        out = self(batch)
        if not self.renders_latents:
            return out
        if getattr(self, "guidance", None) is None:  # a test without training: for its decoder
            self.guidance = threestudio.find(self.cfg.guidance_type)(self.cfg.guidance)
        if not hasattr(self.guidance, "decode_latents"):
            raise UserError(
                f"{self.cfg.guidance_type} decodes no latents: take stable-diffusion-guidance, or "
                "set system.refinement=true"
            )
        images = self.guidance.decode_latents(out["comp_rgb"].permute(0, 3, 1, 2))
        return {**out, "comp_rgb": images.permute(0, 2, 3, 1)}
