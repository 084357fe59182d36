"""Which class loads a model folder, by the network that it holds; and families from outside."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lods.models.base import Model
from lods.models.cards import has_renders, resolve
from lods.models.files import load_model_config
from lods.models.memory import ModelSettings

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

        return IdealModel.from_folder(name, device, settings)
    if settings.ideal_neighbours is not None:
        raise ValueError(
            f"ideal_neighbours={settings.ideal_neighbours} is a setting of ideal denoisers, and "
            f"{name!r} has a network: leave it out"
        )
    network = load_model_config(location.path, "unet", location.revision).get("_class_name")
    if network not in _classes:
        raise ValueError(
            f"the unet of {name!r} is a {network}; a Stable-Diffusion-shaped model has a "
            f"{' or a '.join(_classes)}"
        )
    return _classes[network].from_pretrained(name, device, vae=vae, settings=settings)


def _checked(model: Model, name: str, settings: ModelSettings) -> Model:
    """A model of a family from outside, unless it is to be told cameras and is not."""
    told = getattr(model, "cameras", "words")
    if told != settings.cameras:
        raise ValueError(
            f"the model {name!r} has cameras={told}, and cameras={settings.cameras} is wanted: set "
            f"cameras={told}"
        )
    return model
