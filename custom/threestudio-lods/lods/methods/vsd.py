"""Variational score distillation (VSD; ProlificDreamer, arXiv:2305.16213)."""

import contextlib
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods import scores as formulas
from lods.methods.lods_lora import LODSLoRAGuidance
from lods.methods.options import WITHOUT_EFFECT
from torch import Tensor, nn

import threestudio

CAMERAS = {"extrinsics": "c2w", "mvp": "mvp_mtx"}  # camera_condition_type -> key of the batch
DROPPED = 0.1  # part of the rows that learn without a camera


class CameraEmbedding(nn.Module):
    """Adds W_2 silu(W_1 c + b_1) + b_2 to a UNet's time embedding, for rows with a camera c (16,).

    The sum is made where :meth:`rows` says, and nowhere outside of it. W_2 and b_2 start as zero,
    so that, as with a LoRA, learning starts at the model itself.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        width, device = unet.time_embedding.linear_2.out_features, unet.device
        self.linear_1 = nn.Linear(16, width, device=device)
        self.linear_2 = nn.Linear(width, width, device=device)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)
        self._cameras: Tensor | None = None
        self._start = 0
        unet.time_embedding.register_forward_hook(self._add)

    def forward(self, cameras: Float[Tensor, "B 16"]) -> Float[Tensor, "B E"]:
        return self.linear_2(F.silu(self.linear_1(cameras)))

    def _add(self, module, inputs, output: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        if self._cameras is None:
            return output
        added = self(self._cameras).to(output.dtype)
        after = len(output) - self._start - len(added)
        return output + F.pad(added, (0, 0, self._start, after))

    @contextlib.contextmanager
    def rows(self, cameras: Float[Tensor, "B 16"], start: int = 0):
        """Within this, the rows of the UNet's calls from ``start`` on have these cameras."""
        before = self._cameras, self._start
        self._cameras, self._start = cameras, start
        try:
            yield
        finally:
            self._cameras, self._start = before


@threestudio.register("lods-vsd-guidance")
class VSDGuidance(LODSLoRAGuidance):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps_lora(x_t; y, c) ].

    eps is the frozen model; eps_lora is the same with a LoRA and a :class:`CameraEmbedding`, under
    the prompt of the view and the camera c: the batch's ``c2w`` (B, 4, 4), or its ``mvp_mtx`` with
    ``camera_condition_type`` mvp; zeros where the batch has none. Both learn by ``loss_lora`` =
    mean (eps_lora(x_t'; y, c) - eps')^2 over what is being rendered, with zeros for c in 10 % of
    the rows (``lora_cfg_training``). The three predictions are rows of one UNet call, unless
    ``pretrained_model_name_or_path_lora`` names another model.

    ``lora_scale`` is 1 here, as published; 0.5 is LODS'. ``save_learned`` writes the LoRA for
    diffusers' pipelines; the camera's part is in checkpoints only, since nothing else could use it.
    """

    @dataclass
    class Config(LODSLoRAGuidance.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5
        lora_scale: float = 1.0
        camera_condition_type: Annotated[str, tuple(CAMERAS)] = "extrinsics"

    cfg: Config
    finite_scale = True
    without_effect = {
        k: WITHOUT_EFFECT[k] for k in ("guidance_scale_lora", "prompt_scale", "embedding_start")
    }

    def check(self) -> None:
        super().check()
        if self.cfg.camera_condition_type not in CAMERAS:
            raise ValueError(
                f"camera_condition_type must be one of {', '.join(CAMERAS)}, "
                f"not {self.cfg.camera_condition_type!r}"
            )

    def create_learned(self) -> None:
        super().create_learned()
        self.camera = CameraEmbedding(self.denoiser_lora.unet)
        self.unscale_gradients(self.camera.parameters())
        self._seen: Tensor | None = None

    def look(self, views, batch) -> None:
        matrix = batch.get(CAMERAS[self.cfg.camera_condition_type])
        self._seen = None if matrix is None else matrix.float().flatten(1).detach()

    def _cameras(self, x_t: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 16"]:
        return x_t.new_zeros(len(x_t), 16) if self._seen is None else self._seen

    def learn(self, latents, prompt, null) -> dict[str, Float[Tensor, ""]]:
        def predict(x_t, t):
            draws = len(x_t) // len(latents)
            cameras = self._cameras(latents).repeat(draws, 1)
            if self.cfg.lora_cfg_training:
                kept = torch.rand(len(cameras), 1, device=cameras.device) >= DROPPED
                cameras = cameras * kept
            with self.camera.rows(cameras):
                return self.predict_learnt(x_t, t, prompt.repeat(draws, 1, 1))

        return {"loss_lora": self.denoising_loss(latents, predict)}

    def gradient(self, x_t, t, eps, prompt, null) -> Float[Tensor, "B c h w"]:
        # the rows of the LoRA are the last third of a common call, or a call of another model
        start = 2 * len(x_t) if self.denoiser_lora is self.denoiser else 0
        with self.camera.rows(self._cameras(x_t), start):
            eps_c, eps_u, eps_lora = self.predict_three(x_t, t, prompt, null, prompt)
        return formulas.sds(eps_c, eps_u, eps_lora, self.cfg.guidance_scale, self.weight(t))
