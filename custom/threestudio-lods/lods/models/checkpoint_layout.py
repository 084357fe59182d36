"""From the shapes of the tensors in a checkpoint of the original codes (CompVis, Stability AI) to
the configurations that diffusers and transformers need: nothing is downloaded.

Widths, depths and where attention is can be read from the shapes. What cannot (the number of heads,
the activation of CLIP, the scale of the latents, the noise) is the family's.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lods.models import clip_tokens

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = "cond_stage_model.transformer.text_model."  # transformers' names
OPEN_CLIP = "cond_stage_model.model."  # OpenCLIP's
XL_CLIP_L = "conditioner.embedders.0.transformer.text_model."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
XL_REFINER = "conditioner.embedders.0.model."
HEAD = 64  # width of an attention head, but for the UNet of Stable Diffusion 1, which has 8 heads
SIZE_NUMBER = 256  # width of the embedding of each of SDXL's six numbers of size and crop
NOISE = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


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


class Unfit(ValueError):
    """A checkpoint that is no text-to-image model of a known family; the text says what it is."""


def layout_of(shapes: Shapes) -> Layout:
    """Raises :class:`Unfit`."""
    if why := _other(shapes):
        raise Unfit(why)
    for recognised, build in FAMILIES:
        if recognised(shapes):
            try:
                return build(shapes)
            except (KeyError, IndexError, ZeroDivisionError) as error:
                raise Unfit(f"is damaged, or of another kind: {error} is not as it is") from None
    raise Unfit("has no text encoder, or one of another kind: only whole checkpoints serve")


def _other(shapes: Shapes) -> str:
    """What a file is that is no checkpoint of a known family; "" for one."""
    names = list(shapes)
    if any(re.search(r"(lora_|hada_|lokr_|oft_)", name) for name in names):
        return "is a LoRA or its like, and no model: give it as model_lora"
    if set(names) & {"emb_params", "clip_l", "clip_g", "string_to_param"}:
        return "is a textual inversion, and no model: give it as model_embeddings"
    if any("joint_blocks" in name for name in names):
        return "is a Stable Diffusion 3 in one file, which is not read: give its diffusers folder"
    if any("double_blocks" in name for name in names):
        return "is a FLUX in one file, which is not read: give its diffusers folder"
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in names):
        return "is one part of a diffusers folder: give the folder that holds all of them"
    if any(name.startswith("control_model.") for name in names):
        return "is a ControlNet: only text-to-image models serve"
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        if any(name.startswith((VAE, "encoder.", "decoder.")) for name in names):
            return "is an autoencoder without a network: only whole checkpoints serve"
        first = f": its first tensor is {names[0][:60]!r}" if names else ": it is empty"
        return f"is not a diffusion model of a known kind{first}"
    if (channels := shapes[f"{UNET}input_blocks.0.0.weight"][1]) != 4:
        return (
            f"has a UNet that takes {channels} channels (for inpainting, depth or editing): only "
            "plain text-to-image models serve"
        )
    if any(name.startswith(XL_REFINER) for name in names):
        return "is SDXL's refiner: take the base model"
    if not any(name.startswith(VAE) for name in names):
        return "has no autoencoder (first_stage_model): only whole checkpoints serve"
    return ""


# --- parts ----------------------------------------------------------------------------------------


def _numbers(shapes: Shapes, prefix: str) -> list[int]:
    """The numbers N of the names ``<prefix>N.``, in order."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(found[1]) for name in shapes if (found := pattern.match(name))})


def unet_config(shapes: Shapes, heads: int | None) -> dict[str, Any]:
    """Of a UNet; ``heads`` at every level, None: as many as heads of 64 fit."""
    widths: list[int] = [shapes[f"{UNET}input_blocks.0.0.weight"][0]]
    levels: list[list[int]] = [[]]  # the transformer blocks after each residual block
    for i in _numbers(shapes, f"{UNET}input_blocks.")[1:]:
        block = f"{UNET}input_blocks.{i}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
            widths.append(0)
            continue
        widths[-1] = shapes[f"{block}0.out_layers.3.weight"][0]
        levels[-1].append(len(_numbers(shapes, f"{block}1.transformer_blocks.")))
    if len({len(level) for level in levels}) != 1 or any(len(set(each)) != 1 for each in levels):
        raise Unfit("has a UNet of an unusual shape, whose levels differ in their blocks")
    middle = f"{UNET}middle_block.1."
    depth = [level[0] for level in levels]
    inside = len(_numbers(shapes, f"{middle}transformer_blocks."))
    # the middle has the depth of the last level, which may have no attention itself
    depths = [each or 1 for each in depth[:-1]] + [depth[-1] or inside]
    kinds = ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in depth]
    ups = ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(depth)]
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": kinds,
        "up_block_types": ups,
        "cross_attention_dim": shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": depths,
        "use_linear_projection": len(shapes[f"{middle}proj_in.weight"]) == 2,
        # diffusers' name for the number of heads
        "attention_head_dim": heads or [max(1, width // HEAD) for width in widths],
    }
    beside = shapes.get(f"{UNET}label_emb.0.0.weight")
    if beside is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_NUMBER,
            "projection_class_embeddings_input_dim": beside[1],
        }
    return config


def vae_config(shapes: Shapes, scale: float) -> dict[str, Any]:
    """Of an autoencoder whose latents are multiplied by ``scale``."""
    down = f"{VAE}encoder.down."
    levels = _numbers(shapes, down)
    widths = [shapes[f"{down}{i}.block.0.conv1.weight"][0] for i in levels]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": len(_numbers(shapes, f"{down}0.block.")),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "scaling_factor": scale,
    }


def clip_config(shapes: Shapes, prefix: str, kind: str, drop: int = 0) -> dict[str, Any]:
    """Of a CLIP text encoder under transformers' or OpenCLIP's names, without its last ``drop``
    layers."""
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
        "num_hidden_layers": len(_numbers(shapes, layers)) - drop,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": shapes[f"{prefix}{places}"][0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "projection_dim": projection[1],
        "bos_token_id": 0,
        "eos_token_id": 2,  # by which transformers pools at the largest id, the end mark
        "pad_token_id": 1,
    }


# --- families -------------------------------------------------------------------------------------


def _pipeline(kind: str, texts: tuple[Text, ...], **more: Any) -> dict[str, Any]:
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    for text in texts:
        parts[text.part] = ["transformers", text.kind]
        parts[text.part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return {"_class_name": kind, **parts, **more}


def _sd1(shapes: Shapes) -> Layout:
    text = clip_config(shapes, CLIP_L, "CLIPTextModel")
    texts = (Text("text_encoder", "CLIPTextModel", CLIP_L, text["num_hidden_layers"]),)
    configs = {
        "": _pipeline("StableDiffusionPipeline", texts),
        "unet": unet_config(shapes, heads=8),
        "vae": vae_config(shapes, 0.18215),
        "text_encoder": text,
        "scheduler": {**NOISE, "prediction_type": "epsilon"},
    }
    return Layout("Stable Diffusion 1", configs, texts, {"epsilon": 512, "v_prediction": 512})


def _sd2(shapes: Shapes) -> Layout:
    # trained on the last but one hidden states of its text encoder
    text = clip_config(shapes, OPEN_CLIP, "CLIPTextModel", drop=1)
    texts = (Text("text_encoder", "CLIPTextModel", OPEN_CLIP, text["num_hidden_layers"], "!"),)
    configs = {
        "": _pipeline("StableDiffusionPipeline", texts),
        "unet": unet_config(shapes, heads=None),
        "vae": vae_config(shapes, 0.18215),
        "text_encoder": text,
        "scheduler": dict(NOISE),  # there are both kinds: see checkpoint_weights.ask
    }
    return Layout("Stable Diffusion 2", configs, texts, {"epsilon": 512, "v_prediction": 768})


def _sdxl(shapes: Shapes) -> Layout:
    one = clip_config(shapes, XL_CLIP_L, "CLIPTextModel")
    two = clip_config(shapes, XL_OPEN_CLIP, "CLIPTextModelWithProjection")
    texts = (
        Text("text_encoder", "CLIPTextModel", XL_CLIP_L, one["num_hidden_layers"]),
        Text(
            "text_encoder_2",
            "CLIPTextModelWithProjection",
            XL_OPEN_CLIP,
            two["num_hidden_layers"],
            "!",
        ),
    )
    kind = "StableDiffusionXLPipeline"
    configs = {
        "": _pipeline(kind, texts, force_zeros_for_empty_prompt=True),
        "unet": unet_config(shapes, heads=None),
        "vae": vae_config(shapes, 0.13025),
        "text_encoder": one,
        "text_encoder_2": two,
        "scheduler": {**NOISE, "prediction_type": "epsilon"},
    }
    return Layout("SDXL", configs, texts, {"epsilon": 1024, "v_prediction": 1024})


def _has(prefix: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(name.startswith(prefix) for name in shapes)


# What a file is taken for, by what its names show: a family more is a line more.
FAMILIES: tuple[tuple[Callable[[Shapes], bool], Callable[[Shapes], Layout]], ...] = (
    (_has(XL_OPEN_CLIP), _sdxl),
    (_has(OPEN_CLIP), _sd2),
    (_has(CLIP_L), _sd1),
)


def write_folder(layout: Layout, folder: Path) -> None:
    """Write the configurations and tokenizers of the model, and no weights."""
    for part, config in layout.configs.items():
        name = {"": "model_index.json", "scheduler": "scheduler_config.json"}.get(
            part, "config.json"
        )
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / name).write_text(json.dumps(config, indent=2), encoding="utf-8")
    for text in layout.texts:
        part = text.part.replace("text_encoder", "tokenizer")
        clip_tokens.write_tokenizer(folder / part, text.padding)
