"""Variational score distillation (VSD; ProlificDreamer, arXiv:2305.16213)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from lods import scores
from lods.learned.camera import CameraEmbedding
from lods.methods.learned_lora import LoraMethod
from lods.methods.registry import register

CAMERAS = {"extrinsics": "c2w", "mvp": "mvp"}  # camera_condition_type -> field of Cameras
DROPPED = 0.1  # part of the rows that learn without a camera


@register("lods-vsd")
class VSD(LoraMethod):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps_lora(x_t; y, c) ].

    eps is the frozen model; eps_lora is the same with a LoRA and a :class:`CameraEmbedding`, under
    the prompt of the view and the camera c: the matrix camera to world, or with
    ``camera_condition_type`` mvp that to clip space; zeros where there is none. Both learn by
    ``loss_lora`` = mean (eps_lora(x_t'; y, c) - eps')^2 over what is being rendered, with zeros for
    c in 10 % of the rows (``lora_cfg_training``).

    ``lora_scale`` is 1 here, as published; 0.5 is LODS'. ``save`` writes the LoRA for diffusers'
    pipelines; the camera's part is in checkpoints only, since nothing else could use it.
    """

    @dataclass
    class Config(LoraMethod.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5
        lora_scale: Annotated[float, "[-1000, 1000]"] = 1.0
        # extrinsics or mvp, the camera as the LoRA sees it; learning drops it in 10 % of the rows
        camera_condition_type: Annotated[str, tuple(CAMERAS)] = "extrinsics"
        lora_cfg_training: bool = True

    cfg: Config

    grows_with_scale = True

    def create_learned(self) -> None:
        super().create_learned()
        self.camera = CameraEmbedding(self.lora_model)
        self.unscale_gradients(self.camera.parameters())

    def _cameras(self, x_t, conditions):
        matrix = getattr(conditions.cameras, CAMERAS[self.cfg.camera_condition_type], None)
        return x_t.new_zeros(len(x_t), 16) if matrix is None else matrix.float().flatten(1).detach()

    def learning_losses(self, latents, conditions):
        seen = self.cameras_of_draws(conditions)

        def predict(x_t, t):
            draws = len(x_t) // len(latents)
            cameras = self._cameras(latents, conditions).repeat(draws, 1)
            if self.cfg.lora_cfg_training:
                kept = torch.rand(len(cameras), 1, device=cameras.device) >= DROPPED
                cameras = cameras * kept
            with self.camera.rows(cameras):
                return self.predict_learned(x_t, t, conditions.prompt.repeat(draws, 1, 1), seen)

        return {"loss_lora": self.denoising_loss(latents, predict)}

    def gradient(self, x_t, t, eps, conditions):
        y, n = conditions.prompt, conditions.null
        # the rows of the LoRA are the last third of a common call, or a call of another model
        start = 2 * len(x_t) if self.lora_model is self.model else 0
        with self.camera.rows(self._cameras(x_t, conditions), start):
            eps_c, eps_u, eps_lora = self.predict_with_lora(x_t, t, conditions, [y, n], y)
        return scores.sds(eps_c, eps_u, eps_lora, self.cfg.guidance_scale, self.weight(t))
