"""What the families of checkpoints in one file share: the configurations of a text encoder and an
autoencoder, by the shapes of the tensors in the header of the file."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lods.models import clip_tokens

Shapes = Mapping[str, tuple[int, ...]]

NETWORK = "model.diffusion_model."
VAE = "first_stage_model."
HEAD = 64  # width of an attention head, but for the UNet of Stable Diffusion 1, which has 8 heads


class Text(NamedTuple):
    """A text encoder in a checkpoint: its subfolder, its class in transformers, and where it is."""

    part: str
    kind: str
    prefix: str
    layers: int  # that are used
    padding: str = clip_tokens.MARKS[1]


class Layout(NamedTuple):
    """What a checkpoint holds, as a folder of diffusers would."""

    family: str
    configs: dict[str, dict[str, Any]]  # of a part, or of the pipeline under ""
    texts: tuple[Text, ...]
    image_size: dict[str, int]  # pixels by what the network predicts
    network: str = "unet"  # the subfolder of the network
    note: str = ""  # what of the file is left out, for whoever loads it


class Unfit(ValueError):
    """A checkpoint that is no text-to-image model of a known family; the text says what it is."""


def has(prefix: str) -> Callable[[Shapes], bool]:
    """Whether a checkpoint has a tensor under this prefix."""
    return lambda shapes: any(name.startswith(prefix) for name in shapes)


def numbers(shapes: Shapes, prefix: str) -> list[int]:
    """The numbers N of the names ``<prefix>N.``, in order."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(found[1]) for name in shapes if (found := pattern.match(name))})


def vae_config(shapes: Shapes, scale: float) -> dict[str, Any]:
    """Of an autoencoder whose latents are multiplied by ``scale``."""
    down = f"{VAE}encoder.down."
    levels = numbers(shapes, down)
    widths = [shapes[f"{down}{i}.block.0.conv1.weight"][0] for i in levels]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": len(numbers(shapes, f"{down}0.block.")),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "scaling_factor": scale,
    }


def clip_config(
    shapes: Shapes, prefix: str, kind: str, drop: int = 0, act: str = ""
) -> dict[str, Any]:
    """Of a CLIP text encoder under transformers' or OpenCLIP's names, without its last ``drop``
    layers. ``act``: its activation, by default OpenCLIP's where it has OpenCLIP's names."""
    open_clip = not prefix.endswith("text_model.")
    tokens = "token_embedding.weight" if open_clip else "embeddings.token_embedding.weight"
    places = "positional_embedding" if open_clip else "embeddings.position_embedding.weight"
    layers = f"{prefix}{'transformer.resblocks.' if open_clip else 'encoder.layers.'}"
    inner = "mlp.c_fc.weight" if open_clip else "mlp.fc1.weight"
    size, width = shapes[f"{prefix}{tokens}"]
    if size != clip_tokens.SIZE:
        raise Unfit(f"has a text encoder for {size} tokens, and CLIP's has {clip_tokens.SIZE}")
    projection = shapes.get(f"{prefix}text_projection", (width, width))
    return {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": shapes[f"{layers}0.{inner}"][0],
        "num_hidden_layers": len(numbers(shapes, layers)) - drop,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": shapes[f"{prefix}{places}"][0],
        "hidden_act": act or ("gelu" if open_clip else "quick_gelu"),
        "projection_dim": projection[1],
        "bos_token_id": 0,
        "eos_token_id": 2,  # by which transformers pools at the largest id, the end mark
        "pad_token_id": 1,
    }


def pipeline(
    kind: str, texts: tuple[Text, ...], parts: Mapping[str, str], **more: Any
) -> dict[str, Any]:
    """The ``model_index.json`` of the class ``kind`` of diffusers, whose ``parts`` are of these
    classes beside the autoencoder and the text encoders."""
    named = {part: ["diffusers", of] for part, of in parts.items()}
    named["vae"] = ["diffusers", "AutoencoderKL"]
    for text in texts:
        named[text.part] = ["transformers", text.kind]
        named[text.part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return {"_class_name": kind, **named, **more}
