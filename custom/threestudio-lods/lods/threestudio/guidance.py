"""Every method of the library as a threestudio guidance, registered as ``<name>-guidance``."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from lods import settings
from lods.cameras import Cameras, contradictions, fovy_of, view_words
from lods.methods import registry
from lods.methods.base import Method
from lods.methods.conditions import Conditions
from lods.methods.inputs import resized
from lods.methods.options import tell
from lods.models import memory
from lods.models.additions import Additions
from lods.models.base import views_of
from lods.models.cards import DEFAULT_MODEL, find_card
from lods.models.families import load_family
from lods.models.memory import ModelSettings
from lods.preflight import PERP_NEG, different
from torch import Tensor

import threestudio
from threestudio.utils.base import BaseModule

WHERE = "system.guidance."
NO_SOURCE = (
    "{} edits what is there already, and the system gives it none (source_rgb, from the same "
    "cameras): lods edit makes such a run"
)
# hooks of the guidances of 0.1, which the guidance's method has now: nobody would call them here
MOVED = (
    *("gradient", "diffuse", "predict", "predict_pair", "compose", "weight", "timesteps"),
    *("texts", "look", "other_text", "start_from", "sds_stage", "distill", "recompute_context"),
    *("create_learned", "learn", "learn_inside", "denoising_loss", "unscale_gradients"),
    *("check", "load_denoiser"),
)
# ours -> the prompt processor's
OTHER_TEXTS = {"source": "source", "bad": "nfsd_negative", "edited": "edited"}


@dataclass
class HostSettings:
    """What a guidance reads beside the settings of its method and of its model."""

    # a diffusers folder (relative to the current one, or absolute), a hub id, or a card of
    # lods/models/cards.yaml: sd15, sd21-base, sd21, sdxl, pocket
    pretrained_model_name_or_path: str = DEFAULT_MODEL
    # prompts with "front view" etc. by camera; false: the plain prompt; null: true, unless
    # cameras=tokens
    view_dependent_prompting: bool | None = None


@dataclass
class Accepted:
    """Keys of existing configurations that nothing reads, nor did in the original."""

    guidance_scale_lora: Annotated[float, "(-inf, inf)"] = 1.0


class HostPrompts:
    """What a threestudio prompt processor returns, as :class:`lods.methods.conditions.Prompts`."""

    def __init__(self, prompt_utils: Any, view_dependent: bool, asked_by: str):
        self.utils, self.view_dependent, self.asked_by = prompt_utils, view_dependent, asked_by
        self._others: dict[str, Any] = {}
        if getattr(prompt_utils, "use_perp_neg", False) and not view_dependent:
            raise ValueError(PERP_NEG)

    def _other(self, text: str) -> Any:
        if text not in self._others:
            if not hasattr(self.utils, "other_text"):
                raise ValueError(
                    f"{self.asked_by} needs another text beside the prompt: set "
                    "system.prompt_processor_type=lods-prompt-processor"
                )
            self._others[text] = self.utils.other_text(OTHER_TEXTS[text])
        return self._others[text]

    def plain(self, text: str) -> Float[Tensor, "T D"]:
        """See :class:`lods.methods.conditions.Prompts`."""
        if text == "null":
            return self.utils.uncond_text_embeddings[0]
        return (self.utils if text == "prompt" else self._other(text)).text_embeddings[0]

    def conditions(self, cameras: Cameras, others: Sequence[str] = ()) -> Conditions:
        """See :class:`lods.methods.conditions.Prompts`. With Perp-Neg the prompt's embeddings are
        between those of the views, and those of a source text with them."""
        if not getattr(self.utils, "use_perp_neg", False):
            prompt, null = self._rows(self.utils, cameras)
            negatives, weights = (), None
        else:
            rows, weights = self.utils.get_text_embeddings_perp_neg(*cameras.views, True)
            n = len(weights)
            prompt, null = rows[:n], rows[n : 2 * n]
            negatives = rows[2 * n :].unflatten(0, (n, -1)).unbind(1)
        found = {}
        for text in others:
            if text in ("source", "edited"):
                found[text] = self._rows(self._other(text), cameras)[0]
            else:
                found[text] = self._other(text).text_embeddings.expand(len(prompt), -1, -1)
        return Conditions(prompt, null, negatives, weights, found, cameras)

    def _rows(self, utils: Any, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """(embeddings of the text, of the negative prompt), one row per camera."""
        if getattr(self.utils, "use_perp_neg", False):
            rows, weights = utils.get_text_embeddings_perp_neg(*cameras.views, True)
            return rows[: len(weights)], rows[len(weights) : 2 * len(weights)]
        return utils.get_text_embeddings(*cameras.views, self.view_dependent).chunk(2)


class MethodGuidance(BaseModule):
    """``guidance(rgb, prompt_utils, elevation, azimuth, camera_distances) -> {"loss_sds", ...}``.

    It holds a ``method`` (:class:`lods.methods.base.Method`), whose attributes can be read from it,
    and whose learned part is in its ``state_dict`` without the word ``method``.

    ``weights`` starts the learned part from a file: path.safetensors, written by ``save_learned``
    (or a LoRA from elsewhere), or path.ckpt:guidance of a checkpoint.
    """

    name: ClassVar[str]
    method_class: ClassVar[type[Method]]
    tolerated: ClassVar[dict[str, tuple[Any, ...]]]  # keys without effect, and their quiet values

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Any  # a Config with the fields of the method, of the model and of HostSettings

    def configure(self) -> None:
        cls, cfg = self.method_class, self.cfg
        _refuse_moved(type(self))
        device = torch.device(self.device)
        settings.refuse_contradictions(self.Config, cfg, WHERE)
        config = settings.make(cls.Config, _part(cfg, cls.Config), WHERE)
        frozen = settings.make(ModelSettings, _part(cfg, ModelSettings), WHERE)
        for key, quiet in self.tolerated.items():
            if cfg[key] not in quiet:
                threestudio.warn(f"guidance: {key}={cfg[key]} has no effect")
        tell(config, cls.unread, cls.grows_with_scale)
        memory.check(frozen, device, WHERE)
        if card := find_card(cfg.pretrained_model_name_or_path):
            cls.refuse_distilled(card.no_null)
        model = load_family(cfg.pretrained_model_name_or_path, device, frozen)
        self.method = cls(model, config)
        self._register_state_dict_hook(_leave_out_method)
        self._register_load_state_dict_pre_hook(_put_in_method)
        self._prompts: HostPrompts | None = None
        if str(cfg.weights or "").endswith(".safetensors"):
            self.load_learned(cfg.weights)
            cfg.weights = None  # anything else is a checkpoint, which BaseModule reads

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            method = self.__dict__.get("_modules", {}).get("method")
            if method is None:
                raise
            return getattr(method, name)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Move the method's schedules to this step."""
        self.method.step(global_step, epoch)

    def initialize(self, prompt_utils: Any) -> None:
        """Start the learned part from the prompt's embeddings; a second call changes nothing.

        Raises ``ValueError`` if the embeddings are of another model than the guidance.
        """
        self._refuse_other_additions(prompt_utils)
        self.method.start(self.prompts_of(prompt_utils))

    def _refuse_other_additions(self, prompt_utils: Any) -> None:
        """Refuse prompts that were embedded with other LoRA files or words than the model has."""
        own = getattr(self.method.model, "additions", None) or Additions()
        theirs = getattr(prompt_utils, "additions", Additions())
        if self.method.prompts is None and theirs != own:
            raise ValueError(different(str(theirs), str(own)))

    def prompts_of(self, prompt_utils: Any) -> HostPrompts:
        """``prompt_utils`` as methods read them."""
        if self._prompts is None or self._prompts.utils is not prompt_utils:
            dependent = view_words(self.cfg.cameras, self.cfg.view_dependent_prompting)
            asked_by = type(self).__name__
            self._prompts = HostPrompts(prompt_utils, dependent, asked_by)
        return self._prompts

    def encode(
        self, rgb: Float[Tensor, "B H W C"], rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c h w"]:
        """Latents of images in 0..1 (C = 3), resized to the model's size; or, with
        ``rgb_as_latents``, the input itself (C = c), resized to the latents' size."""
        model = self.method.model
        channels, size, _ = model.latent_shape
        channels = channels if rgb_as_latents else 3
        if rgb.ndim != 4 or rgb.shape[-1] != channels:
            raise ValueError(
                f"the guidance takes (B, H, W, {channels}) with rgb_as_latents={rgb_as_latents}, "
                f"not {tuple(rgb.shape)}"
            )
        x = rgb.permute(0, 3, 1, 2).float()
        return resized(x, size) if rgb_as_latents else self.method.latents_of(x)

    @torch.no_grad()
    def encode_source(
        self, rgb: Float[Tensor, "B H W C"] | None, rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c h w"] | None:
        """What :meth:`encode` will make of it next, with the same random numbers; None for a method
        that edits nothing. Raises ``ValueError`` where one that edits is given nothing."""
        if not self.method.edits:
            return None
        if rgb is None:
            raise ValueError(NO_SOURCE.format(f"system.guidance_type={self.name}-guidance"))
        device = self.method.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self.encode(rgb, rgb_as_latents)

    def forward(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils: Any,
        elevation: Float[Tensor, " B"],
        azimuth: Float[Tensor, " B"],
        camera_distances: Float[Tensor, " B"],
        rgb_as_latents: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Losses for rendered images in 0..1 (or latents) seen from these cameras (degrees): those
        of :meth:`lods.methods.base.Method.losses`, and its numbers to log.

        Of a method that edits, the batch has to hold ``source_rgb`` (B, H, W, C), of the kind of
        ``rgb``: what was there before the training, from the same cameras and before the same
        background, as rendered from a copy of the representation that stays as it was."""
        self.initialize(prompt_utils)
        source = self.encode_source(kwargs.get("source_rgb"), rgb_as_latents)
        latents = self.encode(rgb, rgb_as_latents)
        matrices = kwargs.get("c2w"), kwargs.get("mvp_mtx")
        fovy = None
        # a model of several views is told no field of view
        if self.cfg.cameras != "words" and views_of(self.method.model) == 1:
            fovy = field_of_view(kwargs.get("fovy"), *matrices, len(latents))
            if fovy is None:
                raise ValueError(
                    f"system.guidance.cameras={self.cfg.cameras} needs a field of view, and the "
                    "batch has neither fovy (B,) in radians nor c2w and mvp_mtx"
                )
        cameras = Cameras(elevation, azimuth, camera_distances, *matrices, fovy)
        prompts = self.prompts_of(prompt_utils)
        conditions = prompts.conditions(cameras, self.method.other_texts)
        found = self.method.losses(latents, dataclasses.replace(conditions, source=source))
        return found.terms | found.numbers

    def loss_is_scaled(self) -> None:
        """To be called where the trainer multiplies the loss itself, as a GradScaler does."""
        told = getattr(self.method, "loss_is_scaled", None)
        if told is not None:
            told()

    @property
    def guidance_scale(self) -> float:
        """s of the method, which may be set while training: see ``Config`` for its range."""
        return float(self.method.cfg.guidance_scale)

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        self.method.set_guidance_scale(value)

    def watch(self, wanted: bool = True) -> None:
        """See :meth:`lods.methods.base.Method.watch`."""
        self.method.watch(wanted)

    def seen(self) -> dict[str, Float[Tensor, "B H W 3"]]:
        """See :meth:`lods.methods.base.Method.seen`; channels come last here."""
        return {name: x.permute(0, 2, 3, 1) for name, x in self.method.seen().items()}

    def save_learned(self, path: str | Path) -> Path | None:
        """See :meth:`lods.methods.base.Method.save`."""
        return self.method.save(path)

    def load_learned(self, path: str | Path) -> dict[str, str]:
        """Start from a file of ``save_learned``; returns the file's metadata."""
        return self.method.load(path)


def field_of_view(
    fovy: Float[Tensor, " B"] | float | None,
    c2w: Float[Tensor, "B 4 4"] | None,
    mvp: Float[Tensor, "B 4 4"] | None,
    rows: int,
) -> Float[Tensor, " B"] | None:
    """In degrees, of each row: ``fovy`` of a batch, which has it in radians, for each row or one
    for all; of a batch without it what the matrices say; None where there are none."""
    if fovy is not None:
        value = torch.as_tensor(fovy).flatten()
        return torch.rad2deg(value.expand(rows)) if len(value) in (1, rows) else None
    return None if c2w is None or mvp is None else fovy_of(mvp, c2w)


def _contradictions(cfg: Any):
    """Of the ``Config`` of every guidance."""
    yield from contradictions(cfg.cameras, cfg.view_dependent_prompting)


def _refuse_moved(cls: type[MethodGuidance]) -> None:
    """Refuse a subclass or a mixin that overrides what is no longer called of a guidance."""
    for name in MOVED:
        if owner := next((base for base in cls.__mro__ if name in vars(base)), None):
            raise ValueError(
                f"{owner.__name__}.{name} would never be called, for {name!r} is the method's, not "
                f"the guidance's: make it a subclass of {cls.method_class.__module__}."
                f"{cls.method_class.__name__} that is registered by lods.register, see "
                "docs/extending.md"
            )


def _leave_out_method(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}method.")]:
        state[prefix + key.removeprefix(f"{prefix}method.")] = state.pop(key)


def _put_in_method(state: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}method.{key.removeprefix(prefix)}"] = state.pop(key)


def _part(cfg: Any, kind: type) -> dict[str, Any]:
    return {field.name: cfg[field.name] for field in dataclasses.fields(kind)}


def _fields(*kinds: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for kind in kinds for field in dataclasses.fields(kind)}


def guidance_for(name: str, cls: type[Method]) -> type[MethodGuidance]:
    """The guidance of a method. Its ``Config`` has the fields of the method, of a model and of the
    host, and accepts those of our other methods, so that a YAML switches method by
    ``guidance_type`` alone."""
    bases = (cls.Config, ModelSettings, HostSettings, Accepted, BaseModule.Config)
    own = _fields(*bases)
    others: dict[str, tuple[Any, Any]] = {}
    quiet: dict[str, set[Any]] = {"guidance_scale_lora": {1.0, 7.5}}
    for other in registry.ours().values():
        config = other.Config
        hints = settings.annotations(config)
        for key, field in _fields(config).items():
            if key not in own:
                others.setdefault(key, (hints[key], field.default))
                quiet.setdefault(key, set()).add(field.default)
    for key in cls.unread:
        quiet[key] = {own[key].default}
    made = [(key, hint, default) for key, (hint, default) in others.items()]
    namespace = {"contradictions": _contradictions}
    config = dataclasses.make_dataclass("Config", made, bases=bases, namespace=namespace)
    config.__module__ = __name__
    tolerated = {key: (*values, *[""] * (None in values)) for key, values in quiet.items()}
    kind = type(
        f"{cls.__name__}Guidance",
        (MethodGuidance,),
        {
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
            "Config": config,
            "name": name,
            "method_class": cls,
            "tolerated": tolerated,
        },
    )
    return kind


_made: dict[str, type[MethodGuidance]] = {}


def _register(name: str, cls: type[Method]) -> None:
    made, full = guidance_for(name, cls), f"{name}-guidance"
    if name in _made and _is_registered(full):  # the same method, whose class was defined anew
        for part in ("Config", "method_class", "tolerated", "__doc__"):
            setattr(_made[name], part, getattr(made, part))
        return
    _made[name] = made
    threestudio.register(full)(made)


def _is_registered(name: str) -> bool:
    try:
        threestudio.find(name)
    except KeyError:
        return False
    return True


registry.on_register(_register)
