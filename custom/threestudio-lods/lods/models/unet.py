"""Models shaped like Stable Diffusion (1, 2, XL): a UNet, a VAE and a table of noise levels."""

import contextlib
import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from lods import log, scores
from lods.cameras import Cameras, no_cameras
from lods.models import memory
from lods.models.base import AddsNoise, Context, Model, Schedule, TextEncoder
from lods.models.camera_tokens import CameraTokens
from lods.models.cards import (
    Location,
    canonical,
    first_line,
    has_camera_encoder,
    no_camera_encoder,
    resolve,
)
from lods.models.families import load_family, serves
from lods.models.files import cannot_be_had, load_model_config, load_weights
from lods.models.memory import ModelSettings
from lods.models.text import ClipText
from torch import Tensor, nn

MAX_TIMESTEPS = 100_000  # of a noise schedule, which tables are made of; published ones have 1,000
MAX_LATENT_SIZE = 1_024  # pixels of a latent's side


@serves("UNet2DConditionModel")
class UNetModel(AddsNoise):
    """The frozen UNet, VAE and noise schedule of a Stable-Diffusion-shaped model.

    It follows :class:`lods.models.base.Model`. A plain holder: not a module, so that what holds it
    does not save these weights. All sizes are the model's. In and out go float32 tensors; casts to
    the weights' dtype and back happen here and nowhere else, and so does the conversion of the
    model's output to noise.

    It is told of cameras by the words of a text; or, if ``settings.cameras`` says so and its folder
    has a ``camera_encoder``, by rows of :class:`lods.models.camera_tokens.CameraTokens` after those
    of the tokens, in every call and under every text, a learned one too. ``text_shape`` is without
    them.

    A model shaped like SDXL takes the second text encoder's pooled embedding too. It travels as the
    embeddings' last row, its ``pooled_width`` numbers first and zeros after them, so that nobody
    else has to know of it: T is then the number of tokens plus ``pooled_rows`` = 1 (else 0).
    """

    def __init__(self, unet, vae, scheduler, device="cpu", name: str = "", shares_vae=False):
        self.name = name
        self.settings = ModelSettings()
        self._prepared, self._shares_vae = False, shares_vae
        self.camera_tokens: CameraTokens | None = None
        self._looked = False  # at the values of a camera
        self._text: TextEncoder | None = None
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
        # the gradient of a mean over many elements underflows in float16
        self.grad_scale: float = 1024.0 if self.dtype == torch.float16 else 1.0
        config = scheduler.config
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        if self.prediction_type not in scores.PREDICTION_TYPES:
            raise ValueError(
                f"the model predicts {self.prediction_type!r}; known are {scores.PREDICTION_TYPES}"
            )
        self.schedule = Schedule(scheduler.alphas_cumprod.to(self.device))
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
                f"{vae.config.latent_channels}: only plain text-to-image models serve"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.latent_channels, self.latent_size, self.latent_size

    @functools.cached_property
    def text_shape(self) -> tuple[int, int]:
        """(T, D) of an embedding, SDXL's pooled row included. Raises ``ValueError`` where the
        model's text encoder is not a CLIP text model."""
        location = resolve(self.name)
        config = load_model_config(location.path, "text_encoder", location.revision)
        tokens = config.get("max_position_embeddings")
        if tokens is None:
            raise ValueError(
                f"the text_encoder of {self.name!r} does not say how many tokens it takes "
                "(max_position_embeddings): it is not a CLIP text model"
            )
        return tokens + self.pooled_rows, self.text_width

    @property
    def cameras(self) -> str:
        """See :class:`lods.models.base.Model`."""
        return self.settings.cameras

    @property
    def text(self) -> TextEncoder:
        """The model's text encoder (or two, for SDXL), loaded when a text is embedded."""
        if self._text is None:
            self._text = ClipText(self.name, self.text_shape, self.device)
        return self._text

    @property
    def card_name(self) -> str:
        """One name for all names of this model, as files of learned parts note it."""
        return canonical(self.name)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device="cpu",
        dtype: torch.dtype | None = None,
        vae=None,
        settings: ModelSettings | None = None,
    ) -> "UNetModel":
        """Load unet, vae and scheduler (no text encoder) of a card, folder or hub id; with
        ``vae`` that one is shared. ``dtype``: by default what ``settings`` say.

        Raises ``ValueError``, one line, if the model is missing, broken or of another kind.
        """
        settings = settings or ModelSettings()
        memory.check(settings, torch.device(device))
        dtype = dtype or memory.weights_dtype(settings, torch.device(device))
        model = resolve(name_or_path)
        kind = load_model_config(model.path, "unet", model.revision).get("_class_name")
        if kind != "UNet2DConditionModel":
            raise ValueError(
                f"the unet of {name_or_path!r} is a {kind}; a Stable-Diffusion-shaped model has a "
                "UNet2DConditionModel"
            )
        has_encoder = has_camera_encoder(name_or_path)
        if settings.cameras != "words" and not has_encoder:
            raise ValueError(no_camera_encoder(name_or_path, settings.cameras))
        encoder = CameraTokens.load(model.path) if has_encoder else None
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        try:
            config: Any = DDPMScheduler.load_config(
                model.path, subfolder="scheduler", revision=model.revision
            )
        except Exception as error:  # of many kinds, by library and by version
            raise ValueError(cannot_be_had(model.path, "scheduler", error)) from None
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
        unet = load_weights(UNet2DConditionModel, model, "unet", dtype)
        shared, vae = vae is not None, vae or load_weights(AutoencoderKL, model, "vae", dtype)
        loaded = cls(unet, vae, scheduler, device, name_or_path, shared)
        loaded.settings = settings
        if encoder is not None:
            loaded._take_camera_tokens(encoder)
        loaded._compare_with_card(model)
        return loaded

    def _take_camera_tokens(self, encoder: CameraTokens) -> None:
        width = encoder.config.width
        if width != self.text_width:
            raise ValueError(
                f"the camera_encoder of {self.name!r} makes rows of {width} numbers, and the UNet "
                f"takes {self.text_width}: the model folder is damaged"
            )
        self.camera_tokens = encoder.to(self.device).eval().requires_grad_(False)
        if self.cameras == "words":
            log.info(f"model: {self.name} has a camera_encoder, which cameras=tokens would use")

    def _compare_with_card(self, model: Location) -> None:
        if model.card is None:
            return
        names = ("prediction_type", "text_width", "latent_channels", "scaling_factor", "image_size")
        found = {name: getattr(self, name) for name in names}
        text = load_model_config(model.path, "text_encoder", model.revision)
        found["text_tokens"] = text.get("max_position_embeddings")
        odd = model.card.differences(found)
        if odd:
            log.warn(
                f"{model.path} is not what the card {model.card.name} says, and is taken "
                f"as it is: {odd}"
            )
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory / 2**30
            note = model.card.memory_note(memory)
            if note:
                log.warn(note)

    def _plain(self):
        """No autocast inside the frozen networks: their dtype is chosen, not mixed."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return contextlib.nullcontext()

    def lora_network(self) -> nn.Module:
        """The UNet."""
        return self.unet

    def time_embedding(self) -> nn.Module:
        """The MLP that turns a timestep into what the UNet's blocks add."""
        return self.unet.time_embedding

    def sibling(self, name: str) -> Model:
        """See :class:`lods.models.base.Model`."""
        return load_family(name, self.device, self.settings, vae=self.vae)

    def prepare(self, context: Context | None = None) -> None:
        """See :class:`lods.models.base.Model`."""
        if not self._prepared:
            self._prepared = True
            vaes = () if self._shares_vae else (self.vae,)
            plain: Context = lambda: contextlib.nullcontext  # noqa: E731
            memory.apply(self.settings, self.unet, vaes, self.image_size, context or plain)

    def encode(self, rgb: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of images in 0..1: a sample of the VAE's posterior, scaled. Differentiable.

        H and W are ``image_size`` (any multiple of the VAE's factor works).
        """
        self.prepare()
        with self._plain():
            posterior = self.vae.encode((rgb * 2 - 1).to(self.vae_dtype)).latent_dist
            return (posterior.sample().float() - self.shift) * self.scaling_factor

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in 0..1 of latents."""
        with self._plain():
            scaled = (latents / self.scaling_factor + self.shift).to(self.vae_dtype)
            return (self.vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)

    def predict(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: Int[Tensor, " B"],
        texts: Float[Tensor, "B T D"],
        cameras: Cameras | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """The noise that the model sees in ``x_t`` under ``texts``, whatever the network predicts;
        a model shaped like SDXL is told that the picture has its own size, and is not cropped.
        ``cameras`` are needed with ``settings.cameras`` tokens or both, and not looked at with
        words. Raises ``ValueError``, one line, where they are needed and are not there, or not as
        many as pictures.

        Gradients that go back through it are multiplied by ``grad_scale`` (not 1 in float16): a
        method that learns through it divides by that.
        """
        self.prepare()
        rows = None if self.cameras == "words" else self._camera_rows(cameras, len(x_t))
        embeddings = texts.to(self.dtype)
        more = {}
        if self.pooled_rows:
            size = float(self.image_size)
            time_ids = embeddings.new_tensor([size, size, 0.0, 0.0, size, size])
            pooled = embeddings[:, -1, : self.pooled_width]
            embeddings = embeddings[:, :-1]
            conditions = {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}
            more["added_cond_kwargs"] = conditions
        if rows is not None:
            embeddings = torch.cat([embeddings, rows], dim=1)
        with self._plain():
            output = self.unet(
                x_t.to(self.dtype), t, encoder_hidden_states=embeddings, **more
            ).sample.float()
        if self.grad_scale != 1 and output.requires_grad:
            output.register_hook(lambda grad: grad * self.grad_scale)
        return scores.to_noise(
            output, x_t.float(), *self.schedule.alpha_sigma(t), self.prediction_type
        )

    @torch.no_grad()
    def _camera_rows(self, cameras: Cameras | None, count: int) -> Float[Tensor, "B rows D"]:
        """What stands for the cameras after the rows of a text."""
        assert self.camera_tokens is not None  # from_pretrained has seen to it
        if cameras is None:
            raise ValueError(no_cameras(self.cameras))
        if len(cameras) != count:
            raise ValueError(f"there are {len(cameras)} cameras for {count} pictures")
        numbers = cameras.numbers().to(self.device)
        if not self._looked:  # later calls would have to wait for a GPU each time
            self._looked = True
            for line in self.camera_tokens.unseen(numbers):
                log.warn(f"model: {line}")
        return self.camera_tokens(numbers).to(self.dtype)


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
