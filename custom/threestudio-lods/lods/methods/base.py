"""What all priors share: encode, draw (t, noise), ask for the prior's gradient, make it a loss."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lods import log
from lods import scores as formulas
from lods.learned.inner import InnerAdam
from lods.methods import options
from lods.models import memory
from lods.models.cards import canonical
from lods.models.unet import DEFAULT_MODEL, Denoiser
from lods.preflight import INNER_STEPS
from torch import Tensor

from threestudio.utils.base import BaseModule
from threestudio.utils.misc import C

TIMESTEP_SCHEDULES = ("random", "monotone")


class BaseGuidance(BaseModule):
    """``guidance(rgb, prompt_utils, elevation, azimuth, camera_distances) -> {"loss_sds", ...}``.

    A prior defines ``gradient`` (from noise predictions, see :mod:`.formulas`) and, where it needs
    them, ``look`` (what it reads of the cameras), ``diffuse`` (how x_t is made) and, if it learns,
    ``create_learned``, ``learn`` (its own ``loss_*``), ``start_from``, ``save_learned`` and
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
        guidance_scale: Annotated[float, "(0, inf]"] = 7.5
        # LODS priors: r of cfg_r(eps(x_t; y), eps(x_t; n)), which takes the place of eps(x_t; y) as
        # in VSD: the renders then tend to samples with that guidance scale. 1: as published
        prompt_scale: Annotated[float, "(0, 1e6]"] = 1.0
        # so many first steps follow SDS over its scale, SDS(sds_scale) / sds_scale, times s for the
        # priors whose gradient grows with s; what is learnt is learnt from the first on: the layout
        # is then SDS', the rest the prior's
        sds_steps: Annotated[int, "[0, 1e12]"] = 0
        sds_scale: Annotated[float, "(0, 1e9]"] = 100.0
        # t is drawn from int(T min) .. int(T max), both included; schedules allowed
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.02
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.98
        # how: random, or monotone, the same t for all rows, which falls with the step (of HiFA,
        # arXiv:2305.18766): max - (max - min) sqrt(step / timestep_schedule_steps)
        timestep_schedule: Annotated[str, TIMESTEP_SCHEDULES] = "random"
        timestep_schedule_steps: Annotated[int, "[0, 1e12]"] = 0
        # every element of the gradient is clamped to +- this; schedules allowed
        grad_clip: Annotated[Any | None, "scheduled (0, inf]"] = None
        # w(t), see formulas.weight: sds, uniform or fantasia3d
        weighting_strategy: Annotated[str, formulas.WEIGHTINGS] = "sds"
        # prompts with "front view" etc. by camera; false: the plain prompt
        view_dependent_prompting: bool = True
        # of UNet and VAE: auto, float16, bfloat16 or float32; auto is float16 on CUDA with
        # half_precision_weights, else float32
        weights_dtype: Annotated[str, ("auto", *memory.DTYPES)] = "auto"
        half_precision_weights: bool = True
        # learnt priors: (t, noise) draws per image for the prior's own loss
        lora_n_timestamp_samples: Annotated[int, "[1, 1000]"] = 1
        # learnt priors: so many updates before each gradient, by an Adam of the guidance's own with
        # this rate, in place of one by the system's optimizer after it (0)
        prior_inner_steps: Annotated[int, "[0, 10000]"] = 0
        prior_inner_lr: Annotated[float, "(0, 1e6]"] = 1.0e-3
        # lods-embedding-guidance: negative, it starts as the negative prompt; source, as
        # prompt_processor.source_prompt
        embedding_start: str = "negative"
        # LoRA only: rank, strength of the learnt prediction (0.5 in the original, 1 for VSD),
        # and another model for it (same latents, text width and schedule; null: the same model)
        lora_rank: Annotated[int, "[1, 1024]"] = 4
        lora_scale: Annotated[float, "[-1000, 1000]"] = 0.5
        pretrained_model_name_or_path_lora: str | None = None
        # lods-vsd-guidance: extrinsics or mvp, the camera as the LoRA sees it; learning drops it in
        # 10 % of the rows
        camera_condition_type: str = "extrinsics"
        lora_cfg_training: bool = True
        # lods-nfsd-guidance: the part of the timesteps below which t counts as small
        nfsd_threshold: Annotated[float, "[0, 1]"] = 0.2
        # lods-bridge-guidance: so many steps of SDS at this scale come first (in the paper half of
        # the run)
        bridge_start: Annotated[int, "[0, 1e12]"] = 500
        bridge_sds_scale: Annotated[float, "(0, 1e9]"] = 40.0
        # lods-sdi-guidance: steps and guidance scale of the inversion, and the part of the noise of
        # a DDPM step that each of them adds
        inversion_steps: Annotated[int, "[1, 10000]"] = 10
        inversion_scale: Annotated[float, "[-1e6, 1e6]"] = -7.5
        inversion_eta: Annotated[float, "[0, 1]"] = 0.3
        # lods-ism-guidance: timesteps between the two predictions, and in a step of the inversion
        ism_delta_t: Annotated[int, "[1, 100000]"] = 50
        ism_delta_s: Annotated[int, "[1, 100000]"] = 200
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
        # accepted for existing configurations, see options.py
        guidance_scale_lora: Annotated[float, "(-inf, inf)"] = 1.0

        def contradictions(self):
            """Fields that do not go together: (field, what is wrong)."""
            yield from options.wrong_schedules(self)
            if self.timestep_schedule == "monotone" and self.timestep_schedule_steps < 1:
                yield (
                    "timestep_schedule",
                    "=monotone needs the number of steps in which t falls: set "
                    "system.guidance.timestep_schedule_steps, for example to trainer.max_steps",
                )

    cfg: Config

    finite_scale = False  # a prior whose gradient grows with s, without a limit, says True
    without_effect = options.WITHOUT_EFFECT

    def configure(self) -> None:
        self.check()
        options.tell(self.cfg, self.without_effect, self.finite_scale)
        memory.check(self.cfg, self.device)
        self._loaded: list[Denoiser] = []
        self.denoiser = self.load_denoiser(self.cfg.pretrained_model_name_or_path)
        self._prompt_known = False
        self._negatives: tuple[Tensor, ...] = ()  # Perp-Neg's, of the last call
        self._lost: Tensor | None = None  # share of the last gradient that was not finite
        self._warned: set = set()
        self.update_step(0, 0)
        self.create_learned()
        learnt = list(self.parameters())
        self.inner = None
        if learnt and self.cfg.prior_inner_steps:
            self.inner = InnerAdam(learnt, self.cfg.prior_inner_lr)
        elif self.cfg.prior_inner_steps:
            log.warn("guidance: prior_inner_steps has no effect, this prior learns nothing")
        memory.apply(self.cfg, self._loaded, self.recompute_context)
        if str(self.cfg.weights or "").endswith(".safetensors"):
            self._start_from_file(self.cfg.weights)
            self.cfg.weights = None  # anything else is a checkpoint, which BaseModule reads

    def check(self) -> None:
        """Refuse, with one line, fields that make no sense; before anything is loaded.

        The host of this repository has refused most of it by the annotations of ``Config``, which
        upstream's threestudio does not read.
        """
        formulas.check_scale(self.cfg.guidance_scale, self.finite_scale)
        formulas.weight(torch.zeros(()), self.cfg.weighting_strategy)  # refuses an unknown name
        options.check_prompt_scale(self.cfg.prompt_scale)
        for field, wrong in BaseGuidance.Config.contradictions(self.cfg):
            raise ValueError(f"system.guidance.{field} {wrong}")
        steps, scale = self.sds_stage()
        formulas.check_scale(scale, finite=True, name="sds_scale (of the bridge, bridge_sds_scale)")
        if steps < 0:
            raise ValueError(
                f"sds_steps (of the bridge, bridge_start) must be 0 or more, not {steps}"
            )
        if self.cfg.lora_n_timestamp_samples < 1:
            raise ValueError("lora_n_timestamp_samples must be at least 1")
        if self.cfg.timestep_schedule not in TIMESTEP_SCHEDULES:
            raise ValueError(
                f"timestep_schedule must be one of {', '.join(TIMESTEP_SCHEDULES)}, "
                f"not {self.cfg.timestep_schedule!r}"
            )
        if self.cfg.prior_inner_steps < 0 or not self.cfg.prior_inner_lr > 0:
            raise ValueError("prior_inner_steps must be 0 or more, and prior_inner_lr above 0")

    def create_learned(self) -> None:
        """Hook of ``configure``: make what the prior learns (the denoiser is there)."""

    def load_learned(self, path) -> dict[str, str]:
        """Start from a file of ``save_learned``; returns the file's metadata."""
        raise ValueError(
            f"{type(self).__name__} learns nothing: system.guidance.weights={path} has no use"
        )

    def _start_from_file(self, path) -> None:
        model = self.load_learned(path).get("model")
        if model is not None and canonical(model) != self.learnt_on:
            log.warn(f"guidance: {path} was learnt on {model!r}, not {self.learnt_on!r}")
        log.info(f"guidance: what is learnt starts from {path}")

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
        self.step = global_step
        T = self.denoiser.num_train_timesteps
        low = C(self.cfg.min_step_percent, epoch, global_step)
        high = C(self.cfg.max_step_percent, epoch, global_step)
        if not 0 <= low <= high <= 1:  # a schedule in epochs, which check_schedules does not see
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
        self.start_from(prompt_utils)
        self._prompt_known = True

    def start_from(self, prompt_utils) -> None:
        """Hook of ``initialize``, for what is learnt from the prompt's embeddings, or read once."""

    def other_text(self, prompt_utils, kind: str):
        """What ``prompt_utils`` is for the prompt, for another text of ``LODSPromptProcessor``."""
        if not hasattr(prompt_utils, "other_text"):
            raise ValueError(
                f"{type(self).__name__} needs another text beside the prompt: set "
                "system.prompt_processor_type=lods-prompt-processor"
            )
        return prompt_utils.other_text(kind)

    def texts(
        self, prompt_utils, *views: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
        """Embeddings of prompt and negative prompt for cameras (elevation, azimuth, distance). With
        Perp-Neg the prompt's are between the views', and the negatives are kept."""
        dependent = self.cfg.view_dependent_prompting
        self._negatives = ()
        if not getattr(prompt_utils, "use_perp_neg", False):
            return prompt_utils.get_text_embeddings(*views, dependent).chunk(2)
        if not dependent:
            raise ValueError(
                "use_perp_neg needs system.guidance.view_dependent_prompting=true, or set "
                "system.prompt_processor.use_perp_neg=false"
            )
        rows, self._weights = prompt_utils.get_text_embeddings_perp_neg(*views, True)
        n = len(self._weights)
        self._negatives = rows[2 * n :].unflatten(0, (n, -1)).unbind(1)
        return rows[:n], rows[n : 2 * n]

    def look(self, views: tuple[Float[Tensor, " B"], ...], batch: dict[str, Any]) -> None:
        """Hook of ``forward``: keep what the prior reads of the cameras (``views`` as in ``texts``,
        ``batch`` the other keys of the data) beside prompt and negative prompt."""

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

    def predict(
        self, x_t: Float[Tensor, "B c h w"], t: Int[Tensor, " B"], *texts: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B c h w"], ...]:
        """The noise predictions under each of these texts, rows of one UNet call."""
        n = len(texts)
        return self.denoiser.predict_noise(
            torch.cat([x_t] * n), torch.cat([t] * n), torch.cat(texts)
        ).chunk(n)

    def predict_pair(self, x_t, t, prompt, null, *more) -> tuple[Float[Tensor, "B c h w"], ...]:
        """(eps_c, eps_u, then those under ``more`` texts); with Perp-Neg eps_c is the composition
        of :func:`.formulas.perp_neg`, whose negatives are the last rows of the call."""
        texts = (prompt, null, *more)
        eps_c, *others = self.predict(x_t, t, *texts, *self._negatives)
        others, negatives = others[: len(texts) - 1], others[len(texts) - 1 :]
        return self.compose(eps_c, others[0], negatives), *others

    def compose(self, eps_c, eps_u, negatives: list[Tensor]) -> Float[Tensor, "B c h w"]:
        """``eps_c``, or with negatives the composition of Perp-Neg."""
        return formulas.perp_neg(eps_c, eps_u, negatives, self._weights) if negatives else eps_c

    def sds_stage(self) -> tuple[int, float]:
        """(steps, scale) of the SDS that comes before the prior's own gradient."""
        return self.cfg.sds_steps, self.cfg.sds_scale

    def gradient(
        self,
        x_t: Float[Tensor, "B c h w"],
        t: Int[Tensor, " B"],
        eps: Float[Tensor, "B c h w"],
        prompt: Float[Tensor, "B T D"],
        null: Float[Tensor, "B T D"],
    ) -> Float[Tensor, "B c h w"]:
        """The prior's gradient with respect to the latents (called without autograd)."""
        raise NotImplementedError(f"{type(self).__name__} does not define gradient")

    def learn(
        self,
        latents: Float[Tensor, "B c h w"],
        prompt: Float[Tensor, "B T D"],
        null: Float[Tensor, "B T D"],
    ) -> dict[str, Float[Tensor, ""]]:
        """The prior's own losses on detached latents; nothing for a prior that does not learn.

        They have a UNet call of their own. As rows of the gradient's call they would save one,
        but the backward pass would go through all 3B rows: 6 forward passes' worth of B rows in
        place of 4, and the activations of three times the rows. ``benchmarks/guidance.py`` times
        that as "ours one call".
        """
        return {}

    def learn_inside(self, latents, prompt, null) -> dict[str, Float[Tensor, ""]]:
        """``prior_inner_steps`` updates of what is learnt; the last one's losses, to be logged."""
        ranks = torch.distributed
        if ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1:
            raise ValueError(INNER_STEPS)
        for _ in range(self.cfg.prior_inner_steps):
            losses = self.learn(latents, prompt, null)
            self.inner.step(torch.autograd.grad(sum(losses.values()), self.inner.learnt))
        return {name: value.detach() for name, value in losses.items()}

    def denoising_loss(self, latents: Float[Tensor, "B c h w"], predict) -> Float[Tensor, ""]:
        """mean (predict(x_t, t) - eps)^2, t uniform in 0..T-1, over ``lora_n_timestamp_samples``
        draws of (t, eps) per image; image i is row i, i + B, i + 2B, ..."""
        z = latents.detach().repeat(self.cfg.lora_n_timestamp_samples, 1, 1, 1)
        t = torch.randint(self.denoiser.num_train_timesteps, z.shape[:1], device=z.device)
        eps = torch.randn_like(z)
        return F.mse_loss(predict(self.denoiser.add_noise(z, eps, t), t), eps)

    def unscale_gradients(self, parameters) -> None:
        """Undo the ``grad_scale`` of ``predict_noise`` on what is learnt through it."""
        if self.denoiser.grad_scale != 1:
            for parameter in parameters:
                parameter.register_hook(lambda grad: grad / self.denoiser.grad_scale)

    def loss_is_scaled(self) -> None:
        """To be called where the trainer multiplies the loss itself, as a GradScaler does: both
        factors together would overflow in float16 at a small batch, and cost the first steps."""
        if self.inner is None:  # whose losses the trainer does not see
            for denoiser in self._loaded:
                denoiser.grad_scale = 1.0

    def weight(self, t: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """w(t) of the configured ``weighting_strategy``."""
        return formulas.weight(self.denoiser.alphas_cumprod[t], self.cfg.weighting_strategy)

    def timesteps(self, rows: int, device: torch.device) -> Int[Tensor, " B"]:
        """t of each row, by ``timestep_schedule``."""
        if self.cfg.timestep_schedule == "monotone":
            done = min(self.step / self.cfg.timestep_schedule_steps, 1.0) ** 0.5
            t = round(self.max_step - (self.max_step - self.min_step) * done)
            return torch.full((rows,), t, device=device)
        return torch.randint(self.min_step, self.max_step + 1, (rows,), device=device)

    def diffuse(
        self,
        latents: Float[Tensor, "B c h w"],
        t: Int[Tensor, " B"],
        prompt: Float[Tensor, "B T D"],
        null: Float[Tensor, "B T D"],
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        """x_t, and the noise that ``gradient`` compares predictions with: here freshly drawn."""
        # in one order whatever the layout, or a seed would mean other noise in another layout
        eps = torch.randn_like(latents, memory_format=torch.contiguous_format)
        return self.denoiser.add_noise(latents, eps, t), eps

    @torch.no_grad()
    def distill(
        self,
        latents: Float[Tensor, "B c h w"],
        prompt: Float[Tensor, "B T D"],
        null: Float[Tensor, "B T D"],
    ) -> Float[Tensor, "B c h w"]:
        """The gradient for one draw of (t, eps): not-finite elements become 0, then clamped."""
        t = self.timesteps(len(latents), latents.device)
        steps, scale = self.sds_stage()
        if self.step < steps:  # with the frozen model's own two predictions, and new noise
            x_t, eps = BaseGuidance.diffuse(self, latents, t, prompt, null)
            eps_c, eps_u = BaseGuidance.predict_pair(self, x_t, t, prompt, null)
            raw = formulas.lods(eps_c, eps_u, eps, scale, self.weight(t))
            if self.finite_scale:  # so that the next stage's is not s times as large
                raw = raw * self.cfg.guidance_scale
        else:
            x_t, eps = self.diffuse(latents, t, prompt, null)
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
            log.warn(
                f"guidance: {100 * share:.3g} % of a gradient's elements were nan or inf, and "
                "count as 0" + (": nothing is learnt from such a step" if share == 1 else "")
            )

    def forward(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils,
        elevation: Float[Tensor, " B"],
        azimuth: Float[Tensor, " B"],
        camera_distances: Float[Tensor, " B"],
        rgb_as_latents: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Losses for rendered images in 0..1 (or latents) seen from these cameras (degrees).

        ``loss_sds`` = 1/2 sum (z - stopgrad(z - g))^2 / B, whose gradient is g / B; the prior's
        own ``loss_*``; and, to log, ``grad_norm`` (of g), ``min_step`` and ``max_step``.
        """
        self.initialize(prompt_utils)
        latents = self.encode(rgb, rgb_as_latents)
        views = (elevation, azimuth, camera_distances)
        prompt, null = self.texts(prompt_utils, *views)
        self.look(views, kwargs)
        learn = self.learn if self.inner is None else self.learn_inside
        losses = learn(latents, prompt, null)
        grad = self.distill(latents, prompt, null)
        target = (latents - grad).detach()
        return {
            "loss_sds": 0.5 * F.mse_loss(latents, target, reduction="sum") / len(latents),
            **losses,
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }

    def save_learned(self, path) -> Path | None:
        """Write what the prior has learnt to a safetensors file of its own and return its path;
        None, and nothing written, for a prior that does not learn."""
        return None
