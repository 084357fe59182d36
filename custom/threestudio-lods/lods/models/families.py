"""Which class loads a model folder, by the network that it holds; and families from outside."""

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lods.models.base import Model
from lods.models.cards import (
    NETWORKS,
    VIEW_ADAPTER,
    Location,
    has_renders,
    has_view_adapter,
    resolve,
)
from lods.models.files import load_model_config
from lods.models.memory import ModelSettings, refuse_changes
from lods.models.text import TextPlan, clip_plan

Loader = Callable[[str, torch.device, ModelSettings], Model]
C = TypeVar("C", bound=type)
FAMILIES: dict[str, Loader] = {}  # from outside, by name: see :func:`lods.models.register`
_classes: dict[str, Any] = {}  # by the network's class in diffusers


def serves(network: str) -> Callable[[C], C]:
    """Class decorator: the class's ``from_pretrained(name, device, vae=, settings=)`` loads model
    folders whose network is of this class of diffusers."""

    def enter(cls: C) -> C:
        _classes[network] = cls
        return cls

    return enter


@functools.cache
def _import_ours() -> None:
    """Import every file of this folder: one that holds a family enters it."""
    for module in pkgutil.iter_modules(importlib.import_module("lods.models").__path__):
        importlib.import_module(f"lods.models.{module.name}")


def load_family(name: str, device: torch.device, settings: ModelSettings, vae: Any = None) -> Model:
    """The model of a card, folder or hub id, with the VAE of another model if one is given. Raises
    ``ValueError``, one line, for a family that is not known."""
    if name in FAMILIES:
        return _checked(FAMILIES[name](name, device, settings), name, settings)
    _import_ours()
    location = resolve(name)
    if has_renders(location.path):
        from lods.models.ideal import IdealModel

        refuse_changes(settings, name)
        return IdealModel.from_folder(name, device, settings)
    if settings.ideal_neighbours is not None:
        raise ValueError(
            f"ideal_neighbours={settings.ideal_neighbours} is a setting of ideal denoisers, and "
            f"{name!r} has a network: leave it out"
        )
    cls = _family_of(location, name)
    return cls.from_pretrained(name, device, vae=vae, settings=settings)


def network_of(location: Location) -> tuple[str, Any]:
    """(the subfolder of a model's network, its class in diffusers by name)."""
    try:
        return NETWORKS[0], _class_name(location, NETWORKS[0])
    except ValueError as error:
        for part in NETWORKS[1:]:
            with contextlib.suppress(ValueError):
                return part, _class_name(location, part)
        raise error


def _class_name(location: Location, part: str) -> Any:
    return load_model_config(location.path, part, location.revision).get("_class_name")


def _family_of(location: Location, name: str) -> Any:
    part, network = network_of(location)
    if has_view_adapter(location):
        network = f"{network} with {VIEW_ADAPTER}"
    if network not in _classes:
        what = "a Stable-Diffusion-shaped model has a" if part == "unet" else "known are a"
        known = sorted(each for each, cls in _classes.items() if cls.part == part)
        known = [each for each in known if VIEW_ADAPTER not in each]
        raise ValueError(
            f"the {part} of {name!r} is a {str(network)[:80]}; {what} {' or a '.join(known)}"
        )
    return _classes[network]


def text_plan(location: Location) -> TextPlan:
    """How the texts of a model are embedded; of a folder with text encoders alone, as those of
    Stable Diffusion are. Raises ``ValueError``, one line."""
    _import_ours()
    try:
        part, network = network_of(location)
    except ValueError:  # only text parts, or nothing, of which whoever loads them complains
        return clip_plan(location)
    if part == "unet" and network not in _classes:
        return clip_plan(location)
    return _family_of(location, location.path).text_plan(location)


def _checked(model: Model, name: str, settings: ModelSettings) -> Model:
    """A model of a family from outside, unless it is to be told cameras and is not."""
    told = getattr(model, "cameras", "words")
    if told != settings.cameras:
        raise ValueError(
            f"the model {name!r} has cameras={told}, and cameras={settings.cameras} is wanted: set "
            f"cameras={told}"
        )
    return model
