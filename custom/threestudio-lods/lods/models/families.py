"""Which class loads a model folder, by the network that it holds."""

from collections.abc import Callable

import torch
from lods.models.base import Model
from lods.models.memory import ModelSettings

Loader = Callable[[str, torch.device, ModelSettings], Model]
FAMILIES: dict[str, Loader] = {}  # of one's own, by name: see :func:`lods.models.register`


def load_family(name: str, device: torch.device, settings: ModelSettings, vae=None) -> Model:
    """The model of a card, folder or hub id, with the VAE of another model if one is given. Raises
    ``ValueError``, one line, for a family that is not known."""
    from lods.models.unet import UNetModel

    if name in FAMILIES:
        return FAMILIES[name](name, device, settings)
    return UNetModel.from_pretrained(name, device, vae=vae, settings=settings)
