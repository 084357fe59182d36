"""What all models share that have a network, a VAE, and a folder of diffusers: the file of a family
adds how its network is called, and what its texts are."""

import contextlib
import dataclasses
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from lods import log, scores
from lods.cameras import Cameras, no_cameras
from lods.learned.lora import Sites
from lods.models import checkpoint, memory, quantized
from lods.models.additions import Additions
from lods.models.autoencoders import load_vae
from lods.models.base import AddsNoise, Context, Model, Schedule, TextEncoder
from lods.models.camera_tokens import CameraTokens
from lods.models.cards import (
    Location,
    canonical,
    has_camera_encoder,
    no_camera_encoder,
    resolve,
)
from lods.models.families import load_family
from lods.models.files import load_model_config, load_weights
from lods.models.memory import ModelSettings
from lods.models.text import TextPlan, Texts
from lods.models.text_layout import Parts, TextLayout
from torch import Tensor, nn

MAX_LATENT_SIZE = 1_024  # pixels of a latent's side


class LatentModel(AddsNoise):
    """A frozen network, VAE and noise schedule; it follows :class:`lods.models.base.Model`.

    A plain holder: not a module, so that what holds it does not save these weights. All sizes are
    the model's. In and out go float32 tensors; casts to the weights' dtype and back happen here and
    nowhere else, and so does the conversion of the network's output to noise.

    It is told of cameras by the words of a text; or, if ``settings.cameras`` says so and its folder
    has a ``camera_encoder``, by rows of :class:`lods.models.camera_tokens.CameraTokens` after those
    of the tokens, in every call and under every text, a learned one too. ``text_shape`` is without
    them.

    A family defines :meth:`network_class`, :meth:`load_schedule`, :meth:`call`, :meth:`text_plan`,
    :meth:`time_embedding` and ``text_layout``, and gives the constructor what it has read from
    the configurations; ``families.serves`` makes it known.
    """

    part: ClassVar[str] = "unet"  # the subfolder of its network
    lora_sites: ClassVar[Sites] = Sites()
    # side of the squares of the VAE's latents that its network takes as one
    packs: ClassVar[int] = 1
    half: ClassVar[torch.dtype] = torch.float16  # of its weights on CUDA, unless settings say
    always_told: ClassVar[bool] = False  # of cameras: it makes no prediction without them
    no_null: str = ""
    views: int = 1

    def __init__(
        self,
        network: Any,
        vae: Any,
        schedule: Schedule,
        prediction_type: str,
        text_width: int,
        device: Any = "cpu",
        name: str = "",
        shares_vae: bool = False,
    ):
        self.name = name
        self.settings, self.additions = ModelSettings(), Additions()
        self._prepared, self._shares_vae = False, shares_vae
        self.camera_tokens: CameraTokens | None = None
        self._looked = False  # at the values of a camera
        self._text: TextEncoder | None = None
        self.device, self.dtype = torch.device(device), network.dtype
        self.vae_dtype: torch.dtype = vae.dtype
        for module in (network, vae):
            module.to(self.device).eval().requires_grad_(False)
        self.network, self.vae = network, vae
        # the gradient of a mean over many elements underflows in float16
        self.grad_scale: float = 1024.0 if self.dtype == torch.float16 else 1.0
        self.prediction_type = prediction_type
        if self.prediction_type not in scores.PREDICTION_TYPES:
            raise ValueError(
                f"the model predicts {self.prediction_type!r}; known are {scores.PREDICTION_TYPES}"
            )
        self.schedule = schedule.to(self.device)
        self.text_width = text_width
        self.latent_channels, self.latent_size, self.image_size = self.sizes(network, vae)
        self.scaling_factor: float = vae.config.get("scaling_factor", None) or 1.0
        self.shift: float = vae.config.get("shift_factor", None) or 0.0

    @classmethod
    def sizes(cls, network: Any, vae: Any) -> tuple[int, int, int]:
        """(channels of the latents, pixels of their side, pixels of a picture's side). Raises
        ``ValueError``, one line, for a network and a VAE that do not fit together."""
        whose, size = cls.side_of(network, vae)
        if not isinstance(size, int) or not 1 <= size <= MAX_LATENT_SIZE:
            raise ValueError(
                f"the {whose}'s sample_size is {str(size)[:30]}, not 1 to "
                f"{MAX_LATENT_SIZE}: the model folder is damaged, or of another kind"
            )
        named = "UNet" if cls.part == "unet" else cls.part
        # a video autoencoder calls them z_dim
        channels = vae.config.get("latent_channels") or vae.config["z_dim"]
        takes = network.config.in_channels
        if channels * cls.packs**2 != takes:
            each = f", and {cls.packs} x {cls.packs} of them are one" if cls.packs > 1 else ""
            raise ValueError(
                f"the {named} takes {takes} channels but the VAE's latents have "
                f"{channels}{each}: only plain text-to-image models serve"
            )
        return channels, size, size * halved(vae)

    # -- of a family -----------------------------------------------------------------------------

    @classmethod
    def side_of(cls, network: Any, vae: Any) -> tuple[str, Any]:
        """(the part whose config says it, the pixels of a latent's side, still unchecked)."""
        return "UNet" if cls.part == "unet" else cls.part, network.config.sample_size

    @classmethod
    def vae_class(cls) -> Any:
        """The class of diffusers that loads the VAE."""
        from diffusers import AutoencoderKL

        return AutoencoderKL

    @classmethod
    def network_class(cls) -> Any:
        """The class of diffusers that loads the network."""
        raise NotImplementedError(f"{cls.__name__} does not define network_class")

    @classmethod
    def network_names(cls) -> tuple[str, ...]:
        """What the network's config may call its class: by default, as diffusers does."""
        return (cls.network_class().__name__,)

    @classmethod
    def load_network(cls, model: Location, dtype: torch.dtype) -> Any:
        """The network with its weights. Raises ``ValueError``, one line."""
        return load_weights(cls.network_class(), model, cls.part, dtype)

    @classmethod
    def load_schedule(cls, model: Location, name: str) -> Any:
        """What the constructor takes as its third argument, from the folder's ``scheduler``.
        ``name``: what the model was asked for as. Raises ``ValueError``, one line."""
        raise NotImplementedError(f"{cls.__name__} does not define load_schedule")

    @classmethod
    def text_plan(cls, model: Location) -> TextPlan:
        """How the texts of a model of this family are embedded."""
        raise NotImplementedError(f"{cls.__name__} does not define text_plan")

    @property
    def text_layout(self) -> TextLayout:
        """See :class:`lods.models.base.Model`."""
        raise NotImplementedError(f"{type(self).__name__} does not define text_layout")

    def call(
        self, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, " B"], text: Parts, **told: Tensor
    ) -> Float[Tensor, "B C h w"]:
        """The network's output, all in the weights' dtype but ``t``; ``told`` is what :meth:`told`
        returned, nothing for most families, which need not take it."""
        raise NotImplementedError(f"{type(self).__name__} does not define call")

    def time_embedding(self) -> nn.Module:
        """See :class:`lods.models.base.Model`."""
        raise NotImplementedError(f"{type(self).__name__} does not define time_embedding")

    def told(self, cameras: Cameras | None, count: int) -> dict[str, Tensor]:
        """What :meth:`call` is given of ``count`` cameras beside rows of text: nothing here."""
        return {}

    def layout_of(self, texts: Float[Tensor, "B T D"]) -> TextLayout:
        """The layout of these embeddings, by default ``text_layout``."""
        return self.text_layout

    # -- of every model --------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def text_shape(self) -> tuple[int, int]:
        """(T, D) of an embedding, with its pooled vector. Raises ``ValueError`` where the folder's
        text encoder is of another kind."""
        return self.text_layout.shape

    @property
    def cameras(self) -> str:
        """See :class:`lods.models.base.Model`."""
        return self.settings.cameras

    @property
    def text(self) -> TextEncoder:
        """The model's text encoders, loaded when a text is embedded, and let go again."""
        if self._text is None:
            self._text = Texts(
                self.name, self.text_shape, self.text_plan, self.device, self.additions
            )
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
    ) -> "LatentModel":
        """Load network, vae and scheduler (no text encoder) of a card, folder or hub id; with
        ``vae`` that one is shared. ``dtype``: by default what ``settings`` say.

        Raises ``ValueError``, one line, if the model is missing, broken or of another kind.
        """
        settings = settings or ModelSettings()
        memory.check(settings, torch.device(device))
        dtype = dtype or memory.weights_dtype(settings, torch.device(device), cls.half)
        model = resolve(name_or_path)
        kind = load_model_config(model.path, cls.part, model.revision).get("_class_name")
        if kind not in cls.network_names():
            what = "a Stable-Diffusion-shaped model" if cls.part == "unet" else cls.__name__
            raise ValueError(
                f"the {cls.part} of {name_or_path!r} is a {kind}; {what} has a "
                f"{' or a '.join(cls.network_names())}"
            )
        encoder = None
        if cls.always_told:
            if settings.cameras == "words":
                raise ValueError(
                    f"the model {name_or_path!r} sees several views at once and is told their "
                    "cameras: set cameras=tokens (or both, with words for the view as well)"
                )
        elif has_camera_encoder(name_or_path):
            encoder = CameraTokens.load(model.path)
        elif settings.cameras != "words":
            raise ValueError(no_camera_encoder(name_or_path, settings.cameras))
        network = cls.load_network(model, dtype)
        additions = Additions.of(settings.model_lora, settings.model_embeddings)
        additions.fuse(network, cls.part)
        if (found := checkpoint.of_folder(model.path)) is not None:
            from lods.models.checkpoint_weights import settle

            settle(found, network, settings.model_prediction)
        # after the network, which may have been asked what it predicts
        schedule = cls.load_schedule(model, name_or_path)
        shared, vae = vae is not None, vae or cls._load_vae(model, settings, dtype)
        if settings.quantized_weights != quantized.NONE:
            quantized.quantize(network, settings.quantized_weights, dtype)
        loaded = cls(network, vae, schedule, device, name_or_path, shared)  # type: ignore[call-arg]
        loaded.settings, loaded.additions = settings, additions
        if settings.model_prediction != "auto":
            if loaded.prediction_type == "flow":
                raise ValueError(
                    f"model_prediction={settings.model_prediction}: {name_or_path!r} is a flow "
                    "model, which predicts a velocity: leave it out"
                )
            loaded.prediction_type = settings.model_prediction
        loaded.no_null = (model.card.no_null if model.card else "") or loaded.no_null
        if encoder is not None:
            loaded._take_camera_tokens(encoder)
        loaded._compare_with_card(model)
        return loaded

    @classmethod
    def _load_vae(cls, model: Location, settings: ModelSettings, dtype: torch.dtype) -> Any:
        if settings.model_vae is None:
            return load_weights(cls.vae_class(), model, "vae", dtype)
        vae = load_vae(settings.model_vae, model, cls.part, dtype)
        own = load_model_config(model.path, "vae", model.revision)
        if "sample_size" in own:  # which a tiny one does not have
            vae.register_to_config(sample_size=own["sample_size"])
        return vae

    def _take_camera_tokens(self, encoder: CameraTokens) -> None:
        width = encoder.config.width
        if width != self.text_width:
            named = "UNet" if self.part == "unet" else self.part
            raise ValueError(
                f"the camera_encoder of {self.name!r} makes rows of {width} numbers, and the "
                f"{named} takes {self.text_width}: the model folder is damaged"
            )
        self.camera_tokens = encoder.to(self.device).eval().requires_grad_(False)
        if self.cameras == "words":
            log.info(f"model: {self.name} has a camera_encoder, which cameras=tokens would use")

    def _compare_with_card(self, model: Location) -> None:
        if model.card is None:
            return
        names = ("prediction_type", "text_width", "latent_channels", "scaling_factor", "image_size")
        found = {name: getattr(self, name) for name in names}
        found["text_tokens"] = self.text_layout.tokens
        if self.settings.model_vae is not None:  # which may be scaled otherwise
            del found["scaling_factor"]
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
        """The network."""
        return self.network

    def sibling(self, name: str) -> Model:
        """See :class:`lods.models.base.Model`."""
        own = dataclasses.replace(self.settings, model_lora=None, model_prediction="auto")
        return load_family(name, self.device, own, vae=self.vae)

    def prepare(self, context: Context | None = None) -> None:
        """See :class:`lods.models.base.Model`."""
        if not self._prepared:
            self._prepared = True
            vaes = () if self._shares_vae else (self.vae,)
            plain: Context = lambda: contextlib.nullcontext  # noqa: E731
            memory.apply(self.settings, self.network, vaes, self.image_size, context or plain)

    def encode(self, rgb: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of images in 0..1: a sample of the VAE's posterior, shifted and scaled.
        Differentiable.

        H and W are ``image_size`` (any multiple of the VAE's factor works).
        """
        self.prepare()
        with self._plain():
            return self.from_vae(self.encode_pictures((rgb * 2 - 1).to(self.vae_dtype)).float())

    def encode_pictures(self, images: Tensor) -> Tensor:
        """What the VAE makes of pictures in -1..1, in its dtype: a sample of its posterior."""
        found = self.vae.encode(images)
        # a tiny autoencoder, or a deep-compression one, has one answer
        return found.latent_dist.sample() if hasattr(found, "latent_dist") else found[0]

    def decode_pictures(self, z: Tensor) -> Tensor:
        """Pictures in -1..1 of the VAE's latents."""
        return self.vae.decode(z).sample

    def from_vae(self, z: Float[Tensor, "B c H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of what the VAE makes, shifted and scaled."""
        return (z - self.shift) * self.scaling_factor

    def to_vae(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B c H W"]:
        """The way back."""
        return latents / self.scaling_factor + self.shift

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in 0..1 of latents."""
        with self._plain():
            scaled = self.to_vae(latents).to(self.vae_dtype)
            return (self.decode_pictures(scaled).float() / 2 + 0.5).clamp(0, 1)

    def predict(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: Int[Tensor, " B"],
        texts: Float[Tensor, "B T D"],
        cameras: Cameras | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """The noise that the model sees in ``x_t`` under ``texts``, whatever the network predicts.
        ``cameras`` are needed with ``settings.cameras`` tokens or both, and not looked at with
        words. Raises ``ValueError``, one line, where they are needed and are not there, or not as
        many as pictures.

        Gradients that go back through it are multiplied by ``grad_scale`` (not 1 in float16): a
        method that learns through it divides by that.
        """
        self.prepare()
        tokens = self.camera_tokens is not None and self.cameras != "words"
        rows = self._camera_rows(cameras, len(x_t)) if tokens else None
        told = self.told(cameras, len(x_t))
        text = self.layout_of(texts).unpack(texts).to(self.dtype)
        if rows is not None:
            text = text.followed_by(rows)
        with self._plain():
            output = self.call(x_t.to(self.dtype), t, text, **told).float()
        if self.grad_scale != 1 and output.requires_grad:
            output.register_hook(lambda grad: grad * self.grad_scale)
        return self.schedule.to_noise(output, x_t.float(), t, self.prediction_type)

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


def halved(vae: Any) -> int:
    """Pixels of a picture for one of the VAE's latents: it halves the picture between its levels,
    that is once less than it has levels."""
    if isinstance(ratio := getattr(vae, "spatial_compression_ratio", None), int):
        return ratio  # one of films, or a deep-compression one, whose config tells it otherwise
    return 2 ** (len(vae.config.block_out_channels) - 1)
