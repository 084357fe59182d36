"""``lods.load``: a method, its model and its prompt."""

import dataclasses
import os
from typing import Any

from lods import settings as fields
from lods.cameras import refuse_contradictions
from lods.methods.base import Method
from lods.methods.options import tell
from lods.methods.registry import find
from lods.models.cards import find_card
from lods.models.memory import ModelSettings
from lods.preflight import NO_SOURCE_PROMPT
from lods.prompts import EmbeddedPrompts, TextSettings


def load_method(
    method: str,
    model: Any,
    prompt: str,
    negative_prompt: str,
    device: Any,
    settings: dict[str, Any],
) -> Method:
    """See :func:`lods.load`."""
    if not isinstance(method, str):
        raise ValueError(f"the method must be a name, not {fields.shown(method)}")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not (isinstance(model, str) or hasattr(model, "schedule")):
        raise ValueError(f"the model must be a name or a lods.models.base.Model, not {model!r}")
    for what, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str):
            raise ValueError(f"the {what} must be one text, not {fields.shown(text)}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"the {what} holds half of a surrogate pair, which is no character")
    cls = find(method)
    parts = {"method": cls.Config, "model": ModelSettings, "texts": TextSettings}
    given: dict[str, dict[str, Any]] = {part: {} for part in parts}
    names = {part: {f.name for f in dataclasses.fields(kind)} for part, kind in parts.items()}
    for name, value in settings.items():
        part = next((part for part in parts if name in names[part]), None)
        if part is None:
            known = sorted(set().union(*names.values()))
            raise ValueError(f"{method} has no setting {name!r}{fields.nearest(name, known)}")
        given[part][name] = value
    config = fields.make(cls.Config, given["method"])
    text_settings = fields.make(TextSettings, given["texts"])
    if isinstance(model, str):  # of a model that is given, EmbeddedPrompts sees to it
        frozen = fields.make(ModelSettings, given["model"])
        refuse_contradictions(frozen.cameras, text_settings.view_dependent_prompting)
    if cls.edits and text_settings.source_prompt is None:
        raise ValueError(NO_SOURCE_PROMPT)
    if not prompt.strip():
        raise ValueError("the prompt is empty: give prompt='a DSLR image of a hamburger'")
    if isinstance(model, str):
        from lods.models import load
        from lods.prompts import check_words

        if card := find_card(model):  # before it is downloaded and loaded
            cls.refuse_distilled(card.no_null)
        check_words(model, prompt, text_settings)
        model = load(model, device, **given["model"])
    elif given["model"] or device is not None:
        name = next(iter(given["model"]), "device")
        raise ValueError(f"{name} is a setting of a model that is loaded here: leave it out")
    tell(config, cls.unread, cls.grows_with_scale)
    made = cls(model, config)
    made.start(EmbeddedPrompts(model, prompt, negative_prompt, text_settings))
    return made
