"""Frozen models: ``load`` one by the name of a card, a diffusers folder or a hub id."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lods.models.base import Model
    from lods.models.cards import all_cards
    from lods.models.memory import ModelSettings
    from lods.models.schedule import RectifiedFlow, Schedule, VariancePreserving
    from lods.models.text_layout import TextLayout

__all__ = [
    "Model",
    "ModelSettings",
    "RectifiedFlow",
    "Schedule",
    "TextLayout",
    "VariancePreserving",
    "all_cards",
    "choose",
    "load",
    "register",
]
_WHERE = {
    "Model": "base",
    "ModelSettings": "memory",
    "RectifiedFlow": "schedule",
    "Schedule": "schedule",
    "TextLayout": "text_layout",
    "VariancePreserving": "schedule",
    "all_cards": "cards",
}


def load(name: str = "auto", device: Any = None, **settings: Any) -> "Model":
    """The frozen model of this name, ready to encode, decode and predict.

    ``name``: a card (:func:`all_cards`: sd15, sd21-base, sd21, sdxl, sd3-medium, pocket, ...), a
    diffusers folder, a folder of renders for an ideal denoiser (:mod:`lods.models.ideal`), a hub
    id, or the name of a family that was registered by :func:`register`; ``auto`` is
    Stable Diffusion 2.1-base where there is a CUDA device and the model is on this machine or can
    be downloaded, else the embedded model. ``device``: by default the current CUDA device, or the
    CPU. ``settings`` are the fields of :class:`lods.models.memory.ModelSettings`.

    Raises ``ValueError``, one line, for a model that cannot be had and for a wrong setting.
    """
    import torch
    from lods.models.families import load_family
    from lods.models.memory import ModelSettings
    from lods.settings import make

    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "auto":
        name = choose()[0]
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"there is no device {device!r}: write 'cpu' or 'cuda:0'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {str(device)!r} that torch sees: see lods doctor")
    return load_family(name, device, make(ModelSettings, settings))


def choose() -> tuple[str, str]:
    """``(name, why)`` of the model that ``auto`` stands for on this machine."""
    import torch
    from lods.models.cards import DEFAULT_MODEL, EMBEDDED, resolve
    from lods.models.files import load_model_config

    if not torch.cuda.is_available():
        return EMBEDDED, "there is no CUDA GPU; --model takes any Stable Diffusion"
    try:
        found = resolve(DEFAULT_MODEL)
        load_model_config(found.path, "unet", found.revision)
    except ValueError as error:
        return EMBEDDED, str(error)
    return DEFAULT_MODEL, "there is a CUDA GPU and the model can be had"


def register(name: str, loader: Any) -> None:
    """Make ``load(name)`` return ``loader(name, device, settings)``, a model that follows
    :class:`lods.models.base.Model`: a family of one's own, from outside this package.

    Raises ``ValueError`` for a name that a card or another family has.
    """
    from lods.models.cards import find_card
    from lods.models.families import FAMILIES

    if find_card(name) is not None or name in FAMILIES:
        raise ValueError(f"there is a model {name!r} already: choose another name")
    FAMILIES[name] = loader


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
