"""``prolificdreamer-system``: a guidance that learns beside the object (ProlificDreamer,
arXiv:2305.16213), in three stages."""

from dataclasses import dataclass

import threestudio
from threestudio.systems.guided import GuidedSystem
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.typing import *

STAGES = ("coarse", "geometry", "texture")


@threestudio.register("prolificdreamer-system")
class ProlificDreamer(GuidedSystem):
    """The guidance is built with the system, so that the optimizer finds what it learns
    (``optimizer.params.guidance``) and checkpoints hold it. By ``stage``:

    - coarse: the guidance looks at the colours; the losses of :class:`GuidedSystem`
    - geometry: it looks at the normals; ``normal_consistency`` and, with a weight above 0,
      ``laplacian_smoothness`` of the renderer's mesh
    - texture: it looks at the colours; no other losses

    The last two need a renderer of meshes, which an extension brings.
    """

    @dataclass
    class Config(GuidedSystem.Config):
        stage: str = "coarse"
        visualize_samples: bool = False  # what the models draw by themselves, at each validation

    cfg: Config

    def configure(self) -> None:
        stage = self.cfg.stage
        if stage not in STAGES:
            raise UserError(
                f"system.stage={stage!r}: the stages are {', '.join(STAGES)}"
                f"{nearest(stage, STAGES)}"
            )
        super().configure()
        self.build_guidance()
        self.prompt_utils = self.prompt_processor()

    def training_step(self, batch, batch_idx):
        out, stage = self(batch), self.cfg.stage
        seen = "comp_normal" if stage == "geometry" else "comp_rgb"
        if seen not in out:
            raise UserError(
                "system.stage=geometry shows normals to the guidance: set "
                "system.renderer.return_comp_normal=true and system.material.requires_normal=true"
            )
        guided = self.guidance(out[seen], self.prompt_utils, **batch, rgb_as_latents=False)
        losses: Dict[str, Tensor] = {}
        if stage == "coarse":
            losses = self.field_losses(out)
        elif stage == "geometry":
            losses = self._mesh_losses(out)
        return self.total(guided, losses)

    def _mesh_losses(self, out: Dict[str, Any]) -> Dict[str, Float[Tensor, ""]]:
        if "mesh" not in out:
            raise UserError(
                f"system.stage=geometry needs a renderer of meshes, which {self.cfg.renderer_type} "
                "is not: take stage=coarse"
            )
        losses = {}
        if self.weight_of("normal_consistency") is not None:
            losses["normal_consistency"] = out["mesh"].normal_consistency()
        if (self.weight_of("laplacian_smoothness") or 0) > 0:
            losses["laplacian_smoothness"] = out["mesh"].laplacian()
        return losses

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if not self.cfg.visualize_samples:
            return
        drawn = [
            self.guidance.sample(self.prompt_utils, **batch, seed=self.true_global_step),
            self.guidance.sample_lora(self.prompt_utils, **batch, seed=self.true_global_step),
        ]
        cells = [{"type": "rgb", "img": x[0], "kwargs": {"data_format": "HWC"}} for x in drawn]
        self.save_image_grid(
            f"it{self.true_global_step}-{int(batch['index'][0])}-sample.png",
            cells,
            name="validation_step_samples",
            step=self.true_global_step,
        )
