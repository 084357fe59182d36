"""Score distillation with any Stable-Diffusion-shaped model, with the interface of threestudio."""

from dataclasses import dataclass, field
from typing import Annotated, TypedDict

import torch
import torch.nn.functional as F

import threestudio
from threestudio.utils.base import BaseObject
from threestudio.utils.errors import UserError
from threestudio.utils.misc import C
from threestudio.utils.ops import perpendicular_component
from threestudio.utils.pretrained import load_part
from threestudio.utils.schedules import crossing
from threestudio.utils.typing import *

WEIGHTS = {  # weighting_strategy -> w(t) from abar_t
    "sds": lambda abar: 1 - abar,
    "uniform": torch.ones_like,
    "fantasia3d": lambda abar: abar.sqrt() * (1 - abar),
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
EVAL_STEPS = 50  # of DDIM from pure noise, in `guidance_eval`


class Text(NamedTuple):
    """What each of B images is compared with: embeddings, and N negatives for Perp-Neg (or 0)."""

    positive: Float[Tensor, "B T D"]
    uncond: Float[Tensor, "B T D"]
    negatives: Float[Tensor, "B N T D"]
    weights: Float[Tensor, "B N"]

    def row(self, i: int) -> "Text":
        return Text(*(part[i : i + 1] for part in self))


class TokenMergingOptions(TypedDict, total=False):
    """Arguments of ``tomesd.apply_patch``."""

    ratio: Annotated[float, "[0, 1)"]  # part of the tokens that is merged
    max_downsample: Annotated[int, (1, 2, 4, 8)]
    sx: Annotated[int, "[1, 64]"]
    sy: Annotated[int, "[1, 64]"]


@threestudio.register("stable-diffusion-guidance")
class StableDiffusionGuidance(BaseObject):
    """SDS (DreamFusion, arXiv:2209.14988), or SJC (arXiv:2212.00774) with ``use_sjc``.

    With x_t = alpha z + sigma eps, alpha^2 = abar_t, sigma^2 = 1 - abar_t, and s the guidance
    scale in DreamFusion's convention (diffusers' is s + 1),

        eps_hat = eps_c + s (eps_c - eps_u)
        g = w(t) (eps_hat - eps)

    and with Perp-Neg (``prompt_utils.use_perp_neg``, arXiv:2304.04968), e = eps_c - eps_u and the
    negatives' weights c_i, eps_hat = eps_u + s (e + sum_i c_i perp(eps_i - eps_u; e)). SJC's
    gradient is eps_hat - eps with ``var_red`` and eps_hat without, whatever the weighting.

    Models that predict noise, v or the image serve alike; their sizes are read from them.
    """

    @dataclass
    class Config(BaseObject.Config):
        # a diffusers folder (relative to the current one, or absolute) or a hub id
        pretrained_model_name_or_path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        enable_memory_efficient_attention: bool = False  # torch's own is always on
        enable_sequential_cpu_offload: bool = False  # each layer's weights, only while it runs
        enable_attention_slicing: bool = False  # one head after the other
        enable_channels_last_format: bool = False
        guidance_scale: Annotated[float, "[0, 1e9]"] = 100.0
        # every element of the gradient is clamped to +- this; schedules allowed
        grad_clip: Annotated[Optional[Any], "scheduled (0, inf]"] = None
        half_precision_weights: bool = True  # float16 on CUDA; elsewhere weights are float32
        # t is drawn from int(T min) .. int(T max), both included; schedules allowed
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.02
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.98
        # t falls from max to min with the square root of step / trainer_max_steps (HiFA,
        # arXiv:2305.18766), and is the same for all images of a step
        sqrt_anneal: bool = False
        trainer_max_steps: Annotated[int, "[1, 1e12]"] = 25000
        # also `loss_sds_img`, in image space (HiFA): w(t) alpha / sigma (x - decoded estimate)
        use_img_loss: bool = False
        use_sjc: bool = False
        var_red: bool = True
        # sds: 1 - abar | uniform: 1 | fantasia3d
        weighting_strategy: Annotated[str, tuple(WEIGHTS)] = "sds"
        # merges similar tokens (ToMe, arXiv:2303.17604); its params are tomesd.apply_patch's
        token_merging: bool = False
        token_merging_params: Annotated[Optional[dict], TokenMergingOptions] = field(
            default_factory=dict
        )
        view_dependent_prompting: bool = True
        # images of a batch that `guidance_eval` denoises; 0: all
        max_items_eval: Annotated[int, "[0, 1e6]"] = 4

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            if crossed := crossing(self.min_step_percent, self.max_step_percent):
                step, low, high = crossed
                yield (
                    "min_step_percent",
                    f"is above max_step_percent at step {step}: {low} and {high}",
                )
            if self.use_sjc and self.use_img_loss:
                yield "use_img_loss", "goes with SDS only: set use_sjc=false"

    cfg: Config

    def configure(self) -> None:
        self._load()
        config = self.unet.config
        self.latent_size: int = config.sample_size
        # the VAE halves the image between its levels, that is once less than it has levels
        self.image_size: int = self.latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.text_width: int = config.cross_attention_dim
        self.grad_clip_val: Optional[float] = None
        self.update_step(0, 0)

    # --- the model ------------------------------------------------------------------------------

    def _load(self) -> None:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        cfg, model = self.cfg, self.cfg.pretrained_model_name_or_path
        half = cfg.half_precision_weights and self.device.type == "cuda"
        self.weights_dtype = torch.float16 if half else torch.float32
        options = {
            "variants": ("fp16", None) if half else (None, "fp16"),
            "torch_dtype": self.weights_dtype,
            "use_safetensors": True,
        }
        self.scheduler = load_part(DDPMScheduler, model, "scheduler")
        self.unet = load_part(UNet2DConditionModel, model, "unet", **options)
        self.vae = load_part(AutoencoderKL, model, "vae", **options)
        self._check_model(model)
        for module in (self.unet, self.vae):
            module.to(self.device).eval().requires_grad_(False)
        self.alphas: Float[Tensor, "T"] = self.scheduler.alphas_cumprod.to(self.device).float()
        self.num_train_timesteps: int = len(self.alphas)

        if cfg.enable_memory_efficient_attention:
            threestudio.info("guidance: memory-efficient attention is torch's own, and always on")
        if cfg.enable_attention_slicing:
            self.unet.set_attention_slice(1)
        if cfg.enable_channels_last_format:
            self.unet.to(memory_format=torch.channels_last)
        if cfg.token_merging:
            try:
                import tomesd
            except ImportError:
                raise UserError(
                    "guidance.token_merging needs the package tomesd: pip install tomesd, or set "
                    "token_merging=false"
                ) from None
            tomesd.apply_patch(self.unet, **(cfg.token_merging_params or {}))
        if cfg.enable_sequential_cpu_offload:
            from accelerate import cpu_offload

            for module in (self.unet, self.vae):
                cpu_offload(module, execution_device=self.device)

    def _check_model(self, model: str) -> None:
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise UserError(f"{model!r} predicts {kind!r}, not one of {PREDICTION_TYPES}")
        config = self.unet.config
        if config.get("addition_embed_type", None) is not None or (
            config.in_channels != self.vae.config.latent_channels
        ):
            raise UserError(
                f"the UNet of {model!r} takes more than latents and a prompt: set "
                "pretrained_model_name_or_path to a model shaped like Stable Diffusion 1 or 2"
            )

    def forward_unet(
        self,
        latents: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        encoder_hidden_states: Float[Tensor, "B T D"],
        **kwargs,
    ) -> Float[Tensor, "B C h w"]:
        """What the model outputs, which is noise, v or the image. `kwargs` go to the UNet."""
        with torch.autocast(self.device.type, enabled=False):
            output = self.unet(
                latents.to(self.weights_dtype),
                t,
                encoder_hidden_states=encoder_hidden_states.to(self.weights_dtype),
                **kwargs,
            )
        return output.sample.to(latents.dtype)

    def encode_images(self, imgs: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of images in 0..1: a sample of the VAE's posterior, scaled. Differentiable."""
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.vae.encode((imgs * 2 - 1).to(self.weights_dtype)).latent_dist
        return (posterior.sample() * self.vae.config.scaling_factor).to(imgs.dtype)

    def decode_latents(
        self,
        latents: Float[Tensor, "B C h w"],
        latent_height: Optional[int] = None,
        latent_width: Optional[int] = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """Images in 0..1 of latents, which are resized first where a size is given."""
        size = (latent_height or latents.shape[-2], latent_width or latents.shape[-1])
        scaled = _resize(latents, size) / self.vae.config.scaling_factor
        with torch.autocast(self.device.type, enabled=False):
            image = self.vae.decode(scaled.to(self.weights_dtype)).sample
        return (image * 0.5 + 0.5).clamp(0, 1).to(latents.dtype)

    def _alpha_sigma(self, t: Int[Tensor, "B"]) -> Tuple[Tensor, Tensor]:
        abar = self.alphas[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def predict_noise(
        self, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, "B"], text: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B C h w"]:
        """The noise that the model sees in ``x_t``."""
        return self.noise_of(self.forward_unet(x_t, t, text), x_t, t)

    def noise_of(
        self, output: Float[Tensor, "B C h w"], x_t: Float[Tensor, "B C h w"], t: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C h w"]:
        """The noise that the model's ``output`` says is in ``x_t``: of v = alpha eps - sigma z
        (arXiv:2202.00512) it is alpha v + sigma x_t, of the image z it is
        (x_t - alpha z) / sigma."""
        alpha, sigma = self._alpha_sigma(t)
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind == "v_prediction":
            return alpha * output + sigma * x_t
        return (x_t - alpha * output) / sigma if kind == "sample" else output

    # --- schedules ------------------------------------------------------------------------------

    def set_min_max_steps(
        self, min_step_percent: float = 0.02, max_step_percent: float = 0.98
    ) -> None:
        """``min_step`` and ``max_step``, from fractions of the model's timesteps."""
        if not 0 <= min_step_percent <= max_step_percent <= 1:
            raise UserError(
                "guidance: 0 <= min_step_percent <= max_step_percent <= 1 is needed, not "
                f"{min_step_percent} and {max_step_percent}"
            )
        T = self.num_train_timesteps
        self.min_step = min(int(T * min_step_percent), T - 1)
        self.max_step = min(int(T * max_step_percent), T - 1)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set ``min_step``, ``max_step`` and ``grad_clip_val`` to those of the step."""
        cfg = self.cfg
        if cfg.grad_clip is not None:
            self.grad_clip_val = C(cfg.grad_clip, epoch, global_step)
        low = C(cfg.min_step_percent, epoch, global_step)
        if cfg.sqrt_anneal:
            start = C(cfg.max_step_percent, 0, 0)
            part = min(global_step / cfg.trainer_max_steps, 1.0) ** 0.5
            now = start + part * (low - start)
            self.set_min_max_steps(now, now)
        else:
            self.set_min_max_steps(low, C(cfg.max_step_percent, epoch, global_step))

    # --- the gradient ---------------------------------------------------------------------------

    def _text(self, prompt_utils, elevation, azimuth, camera_distances) -> Text:
        views = (elevation, azimuth, camera_distances, self.cfg.view_dependent_prompting)
        n = len(elevation)
        if prompt_utils.use_perp_neg:
            rows, weights = prompt_utils.get_text_embeddings_perp_neg(*views)
        else:
            rows = prompt_utils.get_text_embeddings(*views)
            weights = rows.new_zeros(n, 0)
        self.check_width(rows)
        negatives = rows[2 * n :].view(n, weights.shape[1], *rows.shape[1:])
        return Text(rows[:n], rows[n : 2 * n], negatives, weights)

    def check_width(self, embeddings: Float[Tensor, "N T D"]) -> None:
        """Raise :class:`UserError` if these are of another text model than the UNet's."""
        if embeddings.shape[-1] != self.text_width:
            raise UserError(
                f"the prompt's embeddings have width {embeddings.shape[-1]}, the guidance's model "
                f"takes {self.text_width}: give prompt_processor and guidance the same "
                "pretrained_model_name_or_path"
            )

    @torch.no_grad()
    def get_noise_pred(
        self, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, "B"], text: Text
    ) -> Float[Tensor, "B C h w"]:
        """eps_hat: the guided prediction, of one call of the UNet."""
        n, negatives = len(x_t), text.weights.shape[1]
        # the negatives of an image stand together
        rows = torch.arange(n, device=x_t.device)
        rows = torch.cat([rows, rows, rows.repeat_interleave(negatives)])
        embeddings = torch.cat([text.positive, text.uncond, text.negatives.flatten(0, 1)])
        eps = self.predict_noise(x_t[rows], t[rows], embeddings)
        eps_c, eps_u = eps[:n], eps[n : 2 * n]
        direction = eps_c - eps_u
        if negatives == 0:
            return eps_c + self.cfg.guidance_scale * direction
        push = direction.clone()
        for i in range(negatives):
            away = perpendicular_component(eps[2 * n + i :: negatives] - eps_u, direction)
            push += text.weights[:, i].view(-1, 1, 1, 1).to(away) * away
        return eps_u + self.cfg.guidance_scale * push

    def _resized(
        self, image: Float[Tensor, "B C H W"], rgb_as_latents: bool
    ) -> Float[Tensor, "B C h w"]:
        size = self.latent_size if rgb_as_latents else self.image_size
        return _resize(image, (size, size))

    def to_latents(
        self, rgb: Float[Tensor, "B H W C"], rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c h w"]:
        """Latents of images in 0..1 at the model's size; latents are only resized."""
        image = self._resized(rgb.permute(0, 3, 1, 2), rgb_as_latents)
        return image if rgb_as_latents else self.encode_images(image)

    def _clip(self, grad: Tensor) -> Tensor:
        grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
        clip = self.grad_clip_val
        return grad if clip is None else grad.clamp(-clip, clip)

    def __call__(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        rgb_as_latents: bool = False,
        guidance_eval: bool = False,
        **kwargs,
    ) -> Dict[str, Any]:
        """Losses for images in 0..1 (or latents, which are only resized) seen from these cameras
        (degrees). ``loss_sds`` = sum (z - stopgrad(z - g))^2 / 2B, whose gradient is g / B; with
        ``use_img_loss`` the same in image space as ``loss_sds_img``; ``grad_norm``, ``min_step``
        and ``max_step``. `guidance_eval` adds ``eval``, see :meth:`guidance_eval`."""
        cfg, image = self.cfg, rgb.permute(0, 3, 1, 2)
        if cfg.use_img_loss and rgb_as_latents:
            raise UserError("guidance.use_img_loss needs images, not latents: set it to false")
        image = self._resized(image, rgb_as_latents)
        latents = image if rgb_as_latents else self.encode_images(image)
        text = self._text(prompt_utils, elevation, azimuth, camera_distances)

        with torch.no_grad():
            bounds = (self.min_step, self.max_step + 1)
            t = torch.randint(*bounds, latents.shape[:1], device=latents.device)
            eps = torch.randn_like(latents)
            alpha, sigma = self._alpha_sigma(t)
            x_t = alpha * latents + sigma * eps
            guided = self.get_noise_pred(x_t, t, text)
            w = WEIGHTS[cfg.weighting_strategy](alpha**2)
            if cfg.use_sjc:
                grad = guided - eps if cfg.var_red else guided
            else:
                grad = w * (guided - eps)
            grad = self._clip(grad)
        out = {
            "loss_sds": _as_loss(latents, grad),
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }
        if cfg.use_img_loss:
            with torch.no_grad():
                estimate = self.decode_latents((x_t - sigma * guided) / alpha)
                grad_img = self._clip(w * alpha / sigma * (image - estimate))
            out["loss_sds_img"] = _as_loss(image, grad_img)
        if guidance_eval:
            out["eval"] = self.guidance_eval(t, text, x_t, guided)
            angles = zip(out["eval"]["noise_levels"], elevation, azimuth, camera_distances)
            out["eval"]["texts"] = [
                f"n{n:.2f}\ne{float(e):.1f}\na{float(a):.1f}\nc{float(d):.2f}"
                for n, e, a, d in angles
            ]
        return out

    @torch.no_grad()
    def guidance_eval(
        self,
        t_orig: Int[Tensor, "B"],
        text: Text,
        latents_noisy: Float[Tensor, "B C h w"],
        noise_pred: Float[Tensor, "B C h w"],
    ) -> Dict[str, Any]:
        """What the model makes of noisy latents, for ``BaseLift3DSystem.guidance_evaluation_save``:
        ``bs`` images (at most ``max_items_eval``), their ``noise_levels`` t / T, and (bs, H, W, 3)
        in 0..1: ``imgs_noisy``, ``imgs_1step`` and ``imgs_final`` (after one step and after all
        steps of DDIM, arXiv:2010.02502, without noise) and ``imgs_1orig`` (the first estimate).
        Draws no random numbers."""
        bs = len(t_orig) if self.cfg.max_items_eval <= 0 else self.cfg.max_items_eval
        bs = min(bs, len(t_orig))
        first, steps, last = [], [], []
        for i in range(bs):
            path = self._ddim(
                t_orig[i], text.row(i), latents_noisy[i : i + 1], noise_pred[i : i + 1]
            )
            for found, latents in zip((first, steps, last), path):
                found.append(latents)
        columns = {
            "imgs_noisy": latents_noisy[:bs],
            "imgs_1step": torch.cat(steps),
            "imgs_1orig": torch.cat(first),
            "imgs_final": torch.cat(last),
        }
        images = {k: self.decode_latents(v).permute(0, 2, 3, 1) for k, v in columns.items()}
        levels = [int(t) / self.num_train_timesteps for t in t_orig[:bs]]
        return {"bs": bs, "noise_levels": levels, **images}

    def _ddim(self, t: Int[Tensor, ""], text: Text, x: Tensor, eps: Tensor) -> Tuple[Tensor, ...]:
        """``(first estimate of z, x after one step, z after all)``."""
        T, (alpha, sigma) = self.num_train_timesteps, self._alpha_sigma(t[None])
        estimate = first = (x - sigma * eps) / alpha
        one_step = None
        for next_t in range(0, T, max(T // EVAL_STEPS, 1))[::-1]:
            if next_t >= t:
                continue
            t_now = torch.full_like(t, next_t)[None]
            alpha, sigma = self._alpha_sigma(t_now)
            x = alpha * estimate + sigma * eps
            one_step = x if one_step is None else one_step
            eps = self.get_noise_pred(x, t_now, text)
            estimate = (x - sigma * eps) / alpha
        return first, first if one_step is None else one_step, estimate


def _resize(x: Float[Tensor, "B C H W"], size: Tuple[int, int]) -> Float[Tensor, "B C h w"]:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _as_loss(x: Float[Tensor, "B ..."], grad: Float[Tensor, "B ..."]) -> Float[Tensor, ""]:
    """A loss whose gradient at `x` is grad / B."""
    return 0.5 * F.mse_loss(x, (x - grad).detach(), reduction="sum") / len(x)
