"""What the form of the studio offers, and the requests that it may send."""

import functools
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lods import host
from lods.commands.job import OF_FILE, OVERLAY_ENDS, QUALITIES, Request, fields_of_model, has_config
from lods.commands.make import DEFAULT_METHOD, has_gpu, refuse_unknown_words
from lods.models import cards
from lods.models.vocabulary import Vocabulary
from lods.studio import meshes
from lods.studio.meshes import Meshes
from omegaconf import OmegaConf

PRESETS = Path(__file__).resolve().parent / "presets.yaml"
MAX_PROMPT = 300  # characters
MAX_SEED = 2**32
DEFAULT_QUALITY = "good"
STEPS = "trainer.max_steps"
ANY_WORDS = "system.prompt_processor.allow_unknown_words=true"
REPRESENTATIONS = {
    "gaussians": ("Gaussians", "soft splats: the quickest, with fine colours"),
    "nerf": ("Radiance field", "a continuous volume: smooth, and a closed mesh"),
    "mesh": ("Your mesh", "a new texture for a file of yours; its shape stays"),
}
# the methods of lods.methods, whose registry would import torch
METHODS = {
    "lods-embedding": ("LODS, embedding", "learns a text embedding along the way"),
    "lods-lora": ("LODS, LoRA", "learns a small change of the model along the way"),
    "lods-sds": ("SDS", "DreamFusion's score distillation: plain and quick"),
    "lods-csd": ("CSD", "only the part of SDS that follows the prompt"),
    "lods-vsd": ("VSD", "ProlificDreamer's: learns a LoRA that sees the camera"),
    "lods-nfsd": ("NFSD", "SDS without the part that is only noise"),
    "lods-sdi": ("SDI", "SDS with noise that is inverted from the object"),
    "lods-pfd": ("PFD", "SDI with all steps of a sampling back to a picture: slow"),
    "lods-ism": ("ISM", "LucidDreamer's: matches intervals of the inversion"),
    "lods-bridge": ("Bridge", "leads from a source text to the prompt"),
    "lods-asd": ("ASD", "ScaleDreamer's: compares with the same noise at a later time"),
    "lods-rfds": ("RFDS", "SDS as published for flow models"),
    "lods-rfds-rev": ("RFDS-Rev", "RFDS with noise that is found from the object"),
    "lods-ucm": ("UCM", "FlowDreamer's: follows the model's own way to noise"),
    "lods-refine": ("Refine", "sharpens what is there: image to image, then fitted"),
}
_FIELDS = ("prompt", "on", "method", "model", "quality", "seed", "any_words", "after", "mesh")


class Refused(ValueError):
    """A form that cannot be carried out; its text is one line."""


def as_data() -> dict[str, Any]:
    """Everything that the form offers, in plain values."""
    return {
        "representations": _titled(REPRESENTATIONS),
        "methods": _titled(METHODS),
        "models": [_model(card) for card in _embedded_first()],
        "qualities": [
            {"name": name, "title": each["title"], "says": each["says"]}
            for name, each in presets().items()
        ],
        "defaults": {
            "on": "gaussians",
            "method": DEFAULT_METHOD,
            "model": cards.EMBEDDED,
            "quality": DEFAULT_QUALITY,
        },
        "max_prompt": MAX_PROMPT,
        "of_file": OF_FILE,
        "mesh_endings": list(meshes.ENDINGS),
        "max_mesh": meshes.MAX_BYTES,
    }


def _titled(table: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    return [{"name": name, "title": title, "says": says} for name, (title, says) in table.items()]


def _embedded_first() -> list[cards.Card]:
    every = cards.all_cards().values()
    return sorted(every, key=lambda card: (card.folder is None, card.name != cards.EMBEDDED))


def _model(card: cards.Card) -> dict[str, Any]:
    about: dict[str, Any] = {"name": card.name, "words": None}
    about["qualities"] = {on: qualities(card.name, on) for on in REPRESENTATIONS}
    about["steps"] = {}
    if card.overlay is not None:
        offered = about["qualities"].items()
        about["steps"] = {on: {q: steps(card.name, on, q) for q in names} for on, names in offered}
    if card.folder is None:
        here = cards.is_here(card.name)
        about["says"] = f"{card.image_size} pixels, for a GPU of {card.memory_gb} GB or more"
        if not here:
            about["says"] += f"; not on this machine yet: {card.download}"
        return about | {"here": here}
    about |= {"here": True, "says": "comes with the library, small enough for a CPU"}
    vocabulary = Vocabulary.read(str(cards.CARDS.parent / card.folder))
    if vocabulary is not None:
        groups = {key: vocabulary.groups[key] for key in vocabulary.groups if key != "other words"}
        about["words"] = {key: list(names) for key, names in groups.items()}
        about["known"] = vocabulary.words
    return about


# --- quality --------------------------------------------------------------------------------------


def presets() -> dict[str, dict[str, Any]]:
    """The table ``presets.yaml``."""
    content: Any = OmegaConf.to_container(OmegaConf.load(PRESETS))
    return content


def qualities(model: str, on: str) -> list[str]:
    """The presets that can be had for a model and a representation. They are made for the sizes of
    a CPU: a model without an overlay, which is for a GPU, has its config's own quality only."""
    card = cards.find_card(model)
    if card is None or card.overlay is None:
        return [DEFAULT_QUALITY]
    return [
        name
        for name, preset in presets().items()
        if "otherwise" in preset or has_overlay(card, on, name)
    ]


def has_overlay(card: cards.Card, on: str, quality: str) -> bool:
    """Whether there is a config that makes the usual settings of a card this quality."""
    return has_config(f"{card.overlay}{OVERLAY_ENDS[on]}-{quality}")


def steps(model: str, on: str, quality: str) -> int:
    """How many steps a run of this quality takes, with a model that has an overlay."""
    request = Request("", on, DEFAULT_METHOD, model, True, **quality_fields(quality, on, model))
    found = 0
    for name in request.configs():
        found = _steps_in(name) or found
    for word in request.overrides:
        key, _, value = word.partition("=")
        found = int(value) if key == STEPS else found
    return found


@functools.cache
def _steps_in(config: str) -> int:
    """Of a config that ships; 0 where it says nothing of them."""
    content = OmegaConf.load(host.home() / "configs" / f"{config}.yaml")
    return int(OmegaConf.select(content, STEPS, default=0))


def quality_fields(quality: Any, on: str, model: str) -> dict[str, Any]:
    """What a preset adds to a request. Raises :class:`Refused` for one that cannot be had."""
    known, card = qualities(model, on), cards.find_card(model)
    if not isinstance(quality, str) or quality not in known:
        raise Refused(f"the quality is one of {', '.join(known)}, for {model} and {on}")
    if card is not None and card.overlay and has_overlay(card, on, quality):
        return {"quality": quality}
    return {"overrides": tuple(presets()[quality].get("otherwise", ()))}


# --- what the form sends --------------------------------------------------------------------------


def check_prompt(text: Any) -> str:
    """The prompt without spaces around it. Raises :class:`Refused` for what no config could hold
    as it is."""
    if not isinstance(text, str) or not text.strip():
        raise Refused("write what to make: the prompt is empty")
    text = text.strip()
    if len(text) > MAX_PROMPT:
        raise Refused(f"the prompt has {len(text)} characters: {MAX_PROMPT} are the most")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise Refused("the prompt holds a line break or another character that is not text")
    if "${" in text:
        raise Refused("the prompt holds '${', which configs take for a reference")
    if text == "???":
        raise Refused("the prompt '???' is how configs write a missing value")
    return text


def read_form(
    form: Any, kept: Meshes | None = None, gpu: Callable[[], bool] = has_gpu
) -> tuple[Request, str]:
    """``(request, quality)`` of what the form has sent; the mesh that it names is among those that
    are ``kept``. Raises :class:`Refused`, or another
    ``ValueError`` of one line, for anything that cannot be made."""
    if not isinstance(form, dict):
        raise Refused("a request is an object")
    if unknown := [key for key in form if key not in _FIELDS]:
        raise Refused(f"a request has no field {unknown[0][:40]!r}")
    prompt = check_prompt(form.get("prompt"))
    on = _one_of(form, "on", REPRESENTATIONS)
    method = _one_of(form, "method", METHODS)
    model = _one_of(form, "model", cards.all_cards())
    seed, any_words = form.get("seed", 0), form.get("any_words", False)
    if type(seed) is not int or not 0 <= seed < MAX_SEED:
        raise Refused(f"the seed is a whole number from 0 to {MAX_SEED - 1}")
    if type(any_words) is not bool:
        raise Refused("any_words is true or false")
    if not any_words:
        # what the model knows is on the page, beside the prompt
        force = "the tick “take any words” under More choices"
        refuse_unknown_words([prompt], model, force, listed=False)
    cards.refuse_early(model)
    fields = fields_of_model(model, gpu)
    quality = form.get("quality", DEFAULT_QUALITY)
    fields |= quality_fields(quality, on, model)
    mesh = form.get("mesh")
    if on == OF_FILE:
        if kept is None or not isinstance(mesh, str):
            raise Refused("choose the file of the mesh that is to be painted")
        fields |= kept.fields(mesh)
    elif mesh is not None:
        raise Refused(f"a mesh is of what is made of {REPRESENTATIONS[OF_FILE][0].lower()}")
    if any_words:
        fields["overrides"] = (*fields.get("overrides", ()), ANY_WORDS)
    return Request(prompt=prompt, on=on, method=method, model=model, seed=seed, **fields), quality


def refuse_foreign(request: Request, kept: Meshes | None = None) -> None:
    """Raise :class:`Refused` for a request that no form makes, ``kept`` being the meshes that one
    can name. Runs are started by themselves, and
    their folders may have come from somebody else: what a command line could do beyond a form must
    not be done for them."""
    check_prompt(request.prompt)
    known = {
        "on": REPRESENTATIONS,
        "method": METHODS,
        "model": cards.all_cards(),
        "quality": QUALITIES,
    }
    for name, values in known.items():
        if getattr(request, name) not in values:
            raise Refused(f"its {name} is none that the form offers")
    words = {word for preset in presets().values() for word in preset.get("otherwise", ())}
    if not {ANY_WORDS, *words}.issuperset(request.overrides):
        raise Refused("it changes settings that the form does not have")
    begins = bool(request.source or request.source_hash)
    if begins != (request.on == OF_FILE) or (begins and not (kept and kept.name_of(request))):
        raise Refused("the mesh that it begins with is none that the form has been given")
    plain = type(request.small) is bool and type(request.latents) is int
    if not plain or request.gpu is not None or request.steps is not None:
        raise Refused("it has options that the form does not have")
    if not 0 <= request.seed < MAX_SEED:
        raise Refused(f"the seed is a whole number from 0 to {MAX_SEED - 1}")


def _one_of(form: Mapping[str, Any], key: str, known: Mapping[str, Any]) -> str:
    value = form.get(key)
    if not isinstance(value, str) or value not in known:
        raise Refused(f"{key} is one of {', '.join(known)}")
    return value
