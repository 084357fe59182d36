"""What all priors share: encode, draw (t, noise), ask for the prior's gradient, make it a loss."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import threestudio
from threestudio.utils.base import BaseModule
from threestudio.utils.misc import C
from threestudio.utils.typing import *

from . import formulas, memory
from .cards import canonical
from .denoiser import DEFAULT_MODEL, Denoiser

# Fields of the original configurations that nothing reads (there neither): a note is logged if
# they are set to anything but these values.
WITHOUT_EFFECT = {
    "guidance_scale_lora": (1.0, 7.5),
    "lora_cfg_training": (True,),
    "camera_condition_type": ("extrinsics",),
}


class BaseGuidance(BaseModule):
    """``guidance(rgb, prompt_utils, elevation, azimuth, camera_distances) -> {"loss_sds", ...}``.

    A prior defines ``gradient`` (from two noise predictions, see :mod:`.formulas`) and, if it
    learns, ``create_learned``, ``learn`` (its own ``loss_*``), ``start_from``, ``save_learned`` and
    ``load_learned``. UNet and VAE are frozen and not part of ``state_dict``; what is learnt is.
    """

    @dataclass
    class Config(BaseModule.Config):
        """One set of fields for all priors, so that a YAML switches prior by ``guidance_type``.

        ``weights`` starts what is learnt from a file: path.safetensors, written by
        ``save_learned`` (a LoRA also by others), or path.ckpt:guidance of a checkpoint.
        """

        # a diffusers folder (relative to the current one, or absolute), a hub id, or a card of
        # models/cards.yaml: sd15, sd21-base, sd21, sdxl, pocket
        pretrained_model_name_or_path: str = DEFAULT_MODEL
        # s of the formulas, above 0; .inf for the LODS priors
        guidance_scale: float = 7.5
        # t is drawn from int(T min) .. int(T max), both included; schedules allowed
        min_step_percent: Any = 0.02
        max_step_percent: Any = 0.98
        # every element of the gradient is clamped to +- this; schedules allowed
        grad_clip: Optional[Any] = None
        # w(t), see formulas.weight: sds, uniform or fantasia3d
        weighting_strategy: str = "sds"
        # prompts with "front view" etc. by camera; false: the plain prompt
        view_dependent_prompting: bool = True
        # of UNet and VAE: auto, float16, bfloat16 or float32; auto is float16 on CUDA with
        # half_precision_weights, else float32
        weights_dtype: str = "auto"
        half_precision_weights: bool = True
        # learnt priors: (t, noise) draws per image for the prior's own loss
        lora_n_timestamp_samples: int = 1
        # LoRA only: rank, strength of the learnt prediction (0.5 in the original), and another
        # model for it (same latents, text width and schedule; null: the same model)
        lora_rank: int = 4
        lora_scale: float = 0.5
        pretrained_model_name_or_path_lora: Optional[str] = None
        # speed: channels-last convolutions; torch.compile, minutes at the first step, which
        # needs a C++ compiler
        enable_channels_last_format: bool = False
        compile_unet: bool = False
        compile_vae: bool = False
        # memory, see guidance/memory.py, from cheap to slow: images through the VAE one by one;
        # blocks of UNet and VAE computed again for their gradients; images in tiles (the one that
        # changes results); attention heads in slices; on CUDA, weights of a layer only while it
        # runs. Memory-efficient attention is torch's own and always on.
        enable_vae_slicing: bool = False
        enable_gradient_checkpointing: bool = False
        enable_vae_tiling: bool = False
        enable_attention_slicing: bool = False
        enable_sequential_cpu_offload: bool = False
        enable_memory_efficient_attention: bool = False
        # accepted for existing configurations, see WITHOUT_EFFECT
        guidance_scale_lora: float = 1.0
        lora_cfg_training: bool = True
        camera_condition_type: str = "extrinsics"

    cfg: Config

    finite_scale = False  # a prior whose formula has no limit for s = inf says True

    def configure(self) -> None:
        formulas.check_scale(self.cfg.guidance_scale, self.finite_scale)
        formulas.weight(torch.zeros(()), self.cfg.weighting_strategy)  # refuses an unknown name
        if self.cfg.lora_n_timestamp_samples < 1:
            raise ValueError("lora_n_timestamp_samples must be at least 1")
        for field, values in WITHOUT_EFFECT.items():
            if self.cfg[field] not in values:
                threestudio.warn(f"guidance: {field}={self.cfg[field]} has no effect")
        memory.check(self.cfg, self.device)
        self._loaded: List[Denoiser] = []
        self.denoiser = self.load_denoiser(self.cfg.pretrained_model_name_or_path)
        self._prompt_known = False
        self._lost: Optional[Tensor] = None  # share of the last gradient that was not finite
        self._warned: set = set()
        self.update_step(0, 0)
        self.create_learned()
        memory.apply(self.cfg, self._loaded, self.recompute_context)
        if str(self.cfg.weights or "").endswith(".safetensors"):
            self._start_from_file(self.cfg.weights)
            self.cfg.weights = None  # anything else is a checkpoint, which BaseModule reads

    def create_learned(self) -> None:
        """Hook of ``configure``: make what the prior learns (the denoiser is there)."""

    def load_learned(self, path) -> Dict[str, str]:
        """Start from a file of ``save_learned``; returns the file's metadata."""
        raise ValueError(
            f"{type(self).__name__} learns nothing: system.guidance.weights={path} has no use"
        )

    def _start_from_file(self, path) -> None:
        model = self.load_learned(path).get("model")
        if model not in (None, self.learnt_on):
            threestudio.warn(f"guidance: {path} was learnt on {model!r}, not {self.learnt_on!r}")
        threestudio.info(f"guidance: what is learnt starts from {path}")

    @property
    def learnt_on(self) -> str:
        """The name of the model that what is learnt belongs to."""
        return canonical(self.cfg.pretrained_model_name_or_path)

    def load_denoiser(self, name_or_path: str, vae=None) -> Denoiser:
        """The model on this module's device, in the dtype that the config asks for."""
        dtype = memory.weights_dtype(self.cfg, self.device)
        denoiser = Denoiser.from_pretrained(name_or_path, self.device, dtype, vae)
        self._loaded.append(denoiser)
        return denoiser

    def recompute_context(self) -> Callable[[], Any]:
        """What makes the context in which the UNet runs now, for ``memory.checkpoint_blocks``."""
        return contextlib.nullcontext

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set ``min_step``, ``max_step`` and ``grad_clip`` from their schedules."""
        T = self.denoiser.num_train_timesteps
        low = C(self.cfg.min_step_percent, epoch, global_step)
        high = C(self.cfg.max_step_percent, epoch, global_step)
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"0 <= min_step_percent <= max_step_percent <= 1 is needed, not {low} and {high} "
                f"(at step {global_step})"
            )
        self.min_step = min(int(T * low), T - 1)
        self.max_step = min(int(T * high), T - 1)
        clip = self.cfg.grad_clip
        self.grad_clip = None if clip is None else C(clip, epoch, global_step)

    def initialize(self, prompt_utils) -> None:
        """Start what is learnt from the prompt's embeddings; a second call changes nothing.

        Raises ``ValueError`` if the embeddings are of another model than the guidance.
        """
        if self._prompt_known:
            return
        width = prompt_utils.uncond_text_embeddings.shape[-1]
        if width != self.denoiser.text_width:
            raise ValueError(
                f"the prompt's embeddings have width {width}, the guidance's model takes "
                f"{self.denoiser.text_width}: give prompt_processor and guidance the same "
                "pretrained_model_name_or_path, and for SDXL set "
                "system.prompt_processor_type=lods-prompt-processor"
            )
        if getattr(prompt_utils, "use_perp_neg", False):
            threestudio.warn("guidance: use_perp_neg has no effect on this prior")
        self.start_from(prompt_utils.uncond_text_embeddings[0])
        self._prompt_known = True

    def start_from(self, null: Float[Tensor, "T D"]) -> None:
        """Hook of ``initialize``, for a prior that starts at the negative prompt."""

    def encode(
        self, rgb: Float[Tensor, "B H W C"], rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c h w"]:
        """Latents of images in 0..1 (C = 3), resized to the model's size; or, with
        ``rgb_as_latents``, the input itself (C = c), resized to the latents' size."""
        channels = self.denoiser.latent_channels if rgb_as_latents else 3
        if rgb.ndim != 4 or rgb.shape[-1] != channels:
            raise ValueError(
                f"the guidance takes (B, H, W, {channels}) with rgb_as_latents={rgb_as_latents}, "
                f"not {tuple(rgb.shape)}"
            )
        size = self.denoiser.latent_size if rgb_as_latents else self.denoiser.image_size
        x = rgb.permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        return x if rgb_as_latents else self.denoiser.encode(x)

    def gradient(
        self,
        x_t: Float[Tensor, "B c h w"],
        t: Int[Tensor, "B"],
        eps: Float[Tensor, "B c h w"],
        prompt: Float[Tensor, "B T D"],
        null: Float[Tensor, "B T D"],
    ) -> Float[Tensor, "B c h w"]:
        """The prior's gradient with respect to the latents (called without autograd)."""
        raise NotImplementedError(f"{type(self).__name__} does not define gradient")

    def learn(
        self, latents: Float[Tensor, "B c h w"], null: Float[Tensor, "B T D"]
    ) -> Dict[str, Float[Tensor, ""]]:
        """The prior's own losses on detached latents; nothing for a prior that does not learn.

        They have a UNet call of their own. As rows of the gradient's call they would save one,
        but the backward pass would go through all 3B rows: 6 forward passes' worth of B rows in
        place of 4, and the activations of three times the rows. ``benchmarks/guidance.py`` times
        that as "ours one call".
        """
        return {}

    def denoising_loss(self, latents: Float[Tensor, "B c h w"], predict) -> Float[Tensor, ""]:
        """mean (predict(x_t, t) - eps)^2, t uniform in 0..T-1, over ``lora_n_timestamp_samples``
        draws of (t, eps) per image; image i is row i, i + B, i + 2B, ..."""
        z = latents.detach().repeat(self.cfg.lora_n_timestamp_samples, 1, 1, 1)
        t = torch.randint(self.denoiser.num_train_timesteps, z.shape[:1], device=z.device)
        eps = torch.randn_like(z)
        return F.mse_loss(predict(self.denoiser.add_noise(z, eps, t), t), eps)

    def unscale_gradients(self, parameters) -> None:
        """Undo the ``grad_scale`` of ``predict_noise`` on what is learnt through it."""
        scale = self.denoiser.grad_scale
        if scale != 1:
            for parameter in parameters:
                parameter.register_hook(lambda grad: grad / scale)

    def weight(self, t: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """w(t) of the configured ``weighting_strategy``."""
        return formulas.weight(self.denoiser.alphas_cumprod[t], self.cfg.weighting_strategy)

    @torch.no_grad()
    def distill(
        self,
        latents: Float[Tensor, "B c h w"],
        prompt: Float[Tensor, "B T D"],
        null: Float[Tensor, "B T D"],
    ) -> Float[Tensor, "B c h w"]:
        """The gradient for one draw of (t, eps): not-finite elements become 0, then clamped."""
        t = torch.randint(
            self.min_step, self.max_step + 1, latents.shape[:1], device=latents.device
        )
        # in one order whatever the layout, or a seed would mean other noise in another layout
        eps = torch.randn_like(latents, memory_format=torch.contiguous_format)
        x_t = self.denoiser.add_noise(latents, eps, t)
        raw = self.gradient(x_t, t, eps, prompt, null)
        self._warn_of_lost()
        self._lost = (~torch.isfinite(raw)).float().mean()
        grad = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0)
        return grad if self.grad_clip is None else grad.clamp(-self.grad_clip, self.grad_clip)

    def _warn_of_lost(self) -> None:
        """Say once per run that elements of a gradient were not finite, and once that all were.

        It is the last step's gradient that is asked about: a GPU would have to be waited for to
        know this step's."""
        share = 0.0 if self._lost is None else float(self._lost)
        if share > 0 and (share == 1) not in self._warned:
            self._warned.add(share == 1)
            threestudio.warn(
                f"guidance: {100 * share:.3g} % of a gradient's elements were nan or inf, and "
                "count as 0" + (": nothing is learnt from such a step" if share == 1 else "")
            )

    def forward(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        rgb_as_latents: bool = False,
        **kwargs,
    ) -> Dict[str, Any]:
        """Losses for rendered images in 0..1 (or latents) seen from these cameras (degrees).

        ``loss_sds`` = 1/2 sum (z - stopgrad(z - g))^2 / B, whose gradient is g / B; the prior's
        own ``loss_*``; and, to log, ``grad_norm`` (of g), ``min_step`` and ``max_step``.
        """
        self.initialize(prompt_utils)
        latents = self.encode(rgb, rgb_as_latents)
        prompt, null = prompt_utils.get_text_embeddings(
            elevation, azimuth, camera_distances, self.cfg.view_dependent_prompting
        ).chunk(2)
        losses = self.learn(latents, null)
        grad = self.distill(latents, prompt, null)
        target = (latents - grad).detach()
        return {
            "loss_sds": 0.5 * F.mse_loss(latents, target, reduction="sum") / len(latents),
            **losses,
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }

    def save_learned(self, path) -> Optional[Path]:
        """Write what the prior has learnt to a safetensors file of its own and return its path;
        None, and nothing written, for a prior that does not learn."""
        return None
