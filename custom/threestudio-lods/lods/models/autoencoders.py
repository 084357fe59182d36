"""Another autoencoder than the model's own (``model_vae``): the tiny one for the same latents
(TAESD), or any that diffusers loads."""

import os
from typing import Any

import torch
from lods.models.cards import (
    MULTI_VIEW,
    Location,
    find_folder,
    is_hub_id,
    missing,
    out_of_reach,
)
from lods.models.files import load_model_config, load_weights, read_config

TINY = "taesd"
# by what the network's configuration says; each for the latents with this scale
TAESD = {
    "sd": ("madebyollin/taesd", 0.18215),
    "sdxl": ("madebyollin/taesdxl", 0.13025),
    "sd3": ("madebyollin/taesd3", 1.5305),
    "flux": ("madebyollin/taef1", 0.3611),
}
_NETWORKS = {
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "ZImageTransformer2DModel": "flux",
    **dict.fromkeys(MULTI_VIEW, "sd"),
}
KINDS = ("AutoencoderTiny", "AutoencoderKL")


def tiny_for(network: dict[str, Any], vae: dict[str, Any]) -> str:
    """The hub id of the tiny autoencoder for a model with these configurations of its network and
    its own autoencoder. Raises ``ValueError``, one line, where there is none."""
    kind = str(network.get("_class_name"))
    family = _NETWORKS.get(kind, "")
    if kind == "UNet2DConditionModel":
        family = "sdxl" if network.get("addition_embed_type") == "text_time" else "sd"
    repo, scale = TAESD.get(family, ("", 0.0))
    own = vae.get("scaling_factor", 0.18215)
    if not repo or not isinstance(own, (int, float)) or abs(own - scale) > 1e-6:
        raise ValueError(
            f"model_vae={TINY}: there is none for this model's latents (scaling factor "
            f"{str(own)[:20]}); give the folder of an AutoencoderTiny that was trained on them"
        )
    return repo


def load_vae(wanted: str, model: Location, part: str, dtype: torch.dtype) -> Any:
    """The autoencoder ``wanted``: "taesd", a folder or a hub id, itself or with a ``vae`` in it.
    ``part``: the subfolder of the model's network. Raises ``ValueError``, one line."""
    name = wanted
    if wanted == TINY:
        network = load_model_config(model.path, part, model.revision)
        name = tiny_for(network, load_model_config(model.path, "vae", model.revision))
    folder = find_folder(name)
    if not folder:
        if not is_hub_id(name):
            raise ValueError(
                f"model_vae: there is no folder {name!r}, seen from {os.getcwd()}: give {TINY}, a "
                "folder of an AutoencoderTiny or AutoencoderKL, or a hub id 'owner/name'"
            )
        if why := out_of_reach(name):
            raise ValueError(_missing(name, wanted, why))
    where = Location(folder or name)
    inner = "" if folder and os.path.isfile(os.path.join(folder, "config.json")) else "vae"
    if folder:
        config = read_config(os.path.join(folder, inner, "config.json"))
    else:
        try:
            config, inner = load_model_config(name, ""), ""
        except ValueError:
            config = load_model_config(name, "vae")
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ValueError(
            f"model_vae={wanted}: it is a {str(kind)[:60]}, not an {' or '.join(KINDS)}"
        )
    import diffusers

    return load_weights(getattr(diffusers, kind), where, inner, dtype)


def _missing(name: str, wanted: str, why: str) -> str:
    said = missing(wanted, f"{name} is", why, name).split("; ")[0]
    return (
        f"{said}; set model_vae to a downloaded folder, or download it once where there is a "
        f"network: hf download {name}"
    )
