"""A LoRA file of a style or a subject, added to the weights of a frozen network.

Names are converted by diffusers' own loaders, so that peft's, diffusers' and kohya's formats serve.
What the file has for a layer is checked against the layer before anything is changed: diffusers
itself passes over what does not fit.
"""

import json
import math
from typing import Any

import torch
from lods.learned.files import read_safetensors
from lods.models.additions import Lora
from lods.models.cards import MULTI_VIEW
from torch import Tensor, nn

# in names of what is no LoRA, and which diffusers does not read, or reads as something else
LYCORIS = ("hada_", "lokr_", "oft_", "lora_mid", "on_input", "dora_scale", ".diff", "glora")
LYCORIS += (".w_norm", ".b_norm")
# by the class of a network, diffusers' loader with the converters for it
LOADERS = {
    "UNet2DConditionModel": "StableDiffusionXLLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_UP_AND_DOWN = (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora.up", "lora.down"))
Pairs = dict[str, tuple[Tensor, Tensor]]


def fuse(network: nn.Module, part: str, lora: Lora) -> None:
    """W + scale B A for every layer that the file has for the network ``part`` of its pipeline.
    Raises ``ValueError``, one line, if it fits in no layer, or not in all."""
    parts = read(lora, type(network).__name__, network.config)  # type: ignore[arg-type]
    if part not in parts and (other := set(parts) & {"unet", "transformer"}):
        raise ValueError(
            f"the LoRA {lora.path} is of a {other.pop()}, and this model has a {part}: it is of "
            "another model"
        )
    if not parts:
        raise ValueError(f"{lora.path} holds no LoRA that diffusers reads")
    add(network, parts.get(part, {}), lora, part)


def fuse_text(encoder: nn.Module, part: str, lora: Lora, network: dict[str, Any]) -> None:
    """The same for a text encoder; a file without anything for it changes nothing."""
    pairs = read(lora, network.get("_class_name", ""), network).get(part, {})
    flat = not hasattr(encoder, "text_model")  # as in newer versions of transformers
    named: Pairs = {}
    for name, pair in pairs.items():
        short = name.removeprefix("text_model.")
        inside = short.startswith(("encoder.", "embeddings.", "final_layer_norm."))
        named[short if flat or not inside else f"text_model.{short}"] = pair
    add(encoder, named, lora, part)


@torch.no_grad()
def add(network: nn.Module, pairs: Pairs, lora: Lora, part: str) -> None:
    """Change the weights; none of them if one does not fit."""
    layers = dict(network.named_modules())
    found = []
    for name, (down, up) in pairs.items():
        weight = getattr(layers.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"{_misfit(lora)}: its {part} has no layer {name}")
        inner = weight[0].numel()
        if (len(up), down[0].numel()) != (len(weight), inner) or up[0].numel() != len(down):
            raise ValueError(
                f"{_misfit(lora)}: for {name} of the {part} it has {down[0].numel()} to {len(up)} "
                f"numbers, and the layer {inner} to {len(weight)}"
            )
        found.append((weight, down, up))
    for weight, down, up in found:
        update = up.flatten(1).float() @ down.flatten(1).float()
        changed = weight.float() + lora.scale * update.reshape(weight.shape).to(weight.device)
        weight.copy_(changed.to(weight.dtype))


def _misfit(lora: Lora) -> str:
    return f"the LoRA {lora.path} does not fit this model"


def read(lora: Lora, network: str, config: Any) -> dict[str, Pairs]:
    """(A, B) by the names of layers, by the part of the pipeline that they belong to; alpha / rank
    is in B. ``network``: the class of the model's network, ``config`` its configuration. Raises
    ``ValueError``, one line, for a file of something else."""
    tensors, metadata = read_safetensors(lora.path)
    odd = next((key for key in tensors if any(mark in key for mark in LYCORIS)), None)
    if odd is not None:
        raise ValueError(
            f"{lora.path} is a LyCORIS file or its like ({odd[:60]!r}), which diffusers does not "
            "read: take a plain LoRA"
        )
    tensors = {_full(key): value for key, value in tensors.items()}
    converted = _converted(_with_alphas(tensors), network, config, lora.path)
    pairs: dict[str, Pairs] = {}
    for part, named in _by_part(converted, lora.path).items():
        pairs[part] = _pairs(named, part, metadata, lora.path)
    return pairs


def _full(key: str) -> str:
    """peft's own names, under which a network's layers stand alone, as pipelines have them."""
    return f"unet.{key.removeprefix('base_model.model.')}" if "base_model.model" in key else key


def _with_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factor alpha / rank of a layer multiplied into its B."""
    tensors = dict(tensors)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        alpha, stem = float(tensors.pop(key)), key.removesuffix(".alpha")
        for up, down in _UP_AND_DOWN:
            rank = tensors.get(f"{stem}.{down}.weight")
            if rank is not None and f"{stem}.{up}.weight" in tensors:
                name = f"{stem}.{up}.weight"
                tensors[name] = tensors[name].float() * (alpha / len(rank))
    return tensors


def _converted(tensors: dict[str, Tensor], network: str, config: Any, path: str) -> dict[str, Any]:
    from types import SimpleNamespace

    from diffusers.loaders import lora_pipeline

    network = "UNet2DConditionModel" if network in MULTI_VIEW else network
    loader = getattr(lora_pipeline, LOADERS.get(network, ""), None)
    if loader is None:
        return tensors
    more = {}
    if network == "UNet2DConditionModel":
        more["unet_config"] = SimpleNamespace(layers_per_block=config.get("layers_per_block", 2))
    try:
        found = loader.lora_state_dict(dict(tensors), **more)
    except Exception as error:  # of many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{path} is not a LoRA that diffusers reads for this model ({why})"
        ) from None
    return found[0] if isinstance(found, tuple) else found


def _by_part(tensors: dict[str, Tensor], path: str) -> dict[str, dict[str, Tensor]]:
    from diffusers.utils import state_dict_utils as names

    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part not in PARTS:
            raise ValueError(
                f"{path} is not a LoRA that diffusers reads for a model of this kind, which has "
                f"no place for {key[:80]!r}"
            )
        parts.setdefault(part, {})[rest] = value
    for part, named in parts.items():
        if part == "unet":
            parts[part] = names.convert_unet_state_dict_to_peft(named)
        elif part.startswith("text_encoder"):
            for spelling in (names.DIFFUSERS_OLD_TO_PEFT, names.DIFFUSERS_TO_PEFT):
                parts[part] = named = names.convert_state_dict(named, spelling)
    return parts


def _pairs(tensors: dict[str, Tensor], part: str, metadata: dict[str, str], path: str) -> Pairs:
    ends = (".lora_A.weight", ".lora_B.weight")
    stems = {key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)}
    odd = [key for key in tensors if not key.endswith(ends)]
    odd += [stem for stem in stems if not all(stem + end in tensors for end in ends)]
    if odd:
        raise ValueError(f"{path} is not a plain LoRA: see {odd[0][:80]!r} of its {part}")
    pairs: Pairs = {}
    for stem in sorted(stems):
        down, up = (tensors[stem + end] for end in ends)
        if down.ndim < 2 or up.ndim < 2 or not down.numel():
            raise ValueError(f"{path} is damaged: {stem} of its {part} is no matrix")
        pairs[stem] = down, up.float() * _noted_factor(metadata, part, stem, len(down), path)
    return pairs


def _noted_factor(metadata: dict[str, str], part: str, stem: str, rank: int, path: str) -> float:
    """alpha / rank (alpha / sqrt(rank) for rank-stabilised ones) of a file in which peft noted
    alpha; 1 in any other."""
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        alpha = noted.get(f"{part}.lora_alpha")
        for pattern, value in (noted.get(f"{part}.alpha_pattern") or {}).items():
            if stem == pattern or stem.endswith(f".{pattern}"):
                alpha = value
        if alpha is None:
            return 1.0
        by = math.sqrt(rank) if noted.get(f"{part}.use_rslora") else rank
        factor = float(alpha) / by
        if not 0 < factor < 1e4:
            raise ValueError(f"alpha / rank is {factor}")
        return factor
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: lora_adapter_metadata cannot be read ({error})") from None
