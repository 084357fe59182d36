from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

import threestudio
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils.base import BaseObject
from threestudio.utils.misc import C, cleanup, parse_version
from threestudio.utils.typing import *


@threestudio.register("noise-score-guidance")
class NoiseScoreGuidance(BaseObject):
    """The difference of two predictions at pictures shrunk to latents."""

    @dataclass
    class Config(BaseObject.Config):
        pretrained_model_name_or_path: str = "somebody/something"
        guidance_scale: float = 2.0
        grad_clip: Optional[Any] = None
        min_step_percent: float = 0.02
        max_step_percent: float = 0.98
        half_precision_weights: bool = True
        view_dependent_prompting: bool = True

    cfg: Config

    def configure(self) -> None:
        threestudio.info("Loading the model ...")
        name = self.cfg.pretrained_model_name_or_path
        self.weights_dtype = (
            torch.float16
            if self.cfg.half_precision_weights and self.device.type == "cuda"
            else torch.float32
        )
        assert parse_version(torch.__version__) >= parse_version("2.0")
        self.unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet").to(
            self.device, self.weights_dtype
        )
        for p in self.unet.parameters():
            p.requires_grad_(False)
        self.scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps
        self.alphas: Float[Tensor, "..."] = self.scheduler.alphas_cumprod.to(self.device)
        self.set_min_max_steps()
        self.grad_clip_val: Optional[float] = None
        cleanup()
        threestudio.info("Loaded the model!")

    def set_min_max_steps(self, min_step_percent=0.02, max_step_percent=0.98):
        self.min_step = int(self.num_train_timesteps * min_step_percent)
        self.max_step = int(self.num_train_timesteps * max_step_percent)

    @torch.cuda.amp.autocast(enabled=False)
    def forward_unet(
        self, latents: Float[Tensor, "..."], t: Float[Tensor, "..."], text: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        return self.unet(
            latents.to(self.weights_dtype), t, encoder_hidden_states=text.to(self.weights_dtype)
        ).sample.to(latents.dtype)

    def __call__(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils: PromptProcessorOutput,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        rgb_as_latents=False,
        **kwargs,
    ) -> Dict[str, Any]:
        batch_size = rgb.shape[0]
        latents = F.interpolate(rgb.permute(0, 3, 1, 2), (8, 8), mode="bilinear")
        latents = F.pad(latents, (0, 0, 0, 0, 0, 4 - latents.shape[1]))
        text = prompt_utils.get_text_embeddings(
            elevation, azimuth, camera_distances, self.cfg.view_dependent_prompting
        )
        t = torch.randint(
            self.min_step, self.max_step + 1, [batch_size], dtype=torch.long, device=self.device
        )
        with torch.no_grad():
            noisy = self.scheduler.add_noise(latents, torch.randn_like(latents), t)
            pred = self.forward_unet(torch.cat([noisy] * 2), torch.cat([t] * 2), text)
            cond, uncond = pred.chunk(2)
        w = (1 - self.alphas[t]).view(-1, 1, 1, 1)
        grad = torch.nan_to_num(w * self.cfg.guidance_scale * (cond - uncond))
        if self.grad_clip_val is not None:
            grad = grad.clamp(-self.grad_clip_val, self.grad_clip_val)
        target = (latents - grad).detach()
        return {
            "loss_score": 0.5 * F.mse_loss(latents, target, reduction="sum") / batch_size,
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False):
        if self.cfg.grad_clip is not None:
            self.grad_clip_val = C(self.cfg.grad_clip, epoch, global_step)
        self.set_min_max_steps(
            min_step_percent=C(self.cfg.min_step_percent, epoch, global_step),
            max_step_percent=C(self.cfg.max_step_percent, epoch, global_step),
        )
