"""From the shapes of the tensors in a checkpoint of the original codes (CompVis, Stability AI) to
the configurations that diffusers and transformers need: nothing is downloaded.

Widths, depths and where attention is can be read from the shapes. What cannot (the number of heads,
the activation of CLIP, the scale of the latents, the noise) is the family's.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lods.models import checkpoint_sd3, clip_tokens
from lods.models.checkpoint_parts import (
    HEAD,
    NETWORK,
    VAE,
    Layout,
    Shapes,
    Text,
    Unfit,
    clip_config,
    has,
    numbers,
    pipeline,
    vae_config,
)

CLIP_L = "cond_stage_model.transformer.text_model."  # transformers' names
OPEN_CLIP = "cond_stage_model.model."  # OpenCLIP's
XL_CLIP_L = "conditioner.embedders.0.transformer.text_model."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
XL_REFINER = "conditioner.embedders.0.model."
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
UNET_PARTS = {"unet": "UNet2DConditionModel", "scheduler": "DDPMScheduler"}


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
    if any(name.endswith(("scaled_fp8", ".scale_weight")) for name in names):
        return "has weights of 8 bits with scales beside them: take the file with those of 16 bits"
    if checkpoint_sd3.shows(shapes):
        return checkpoint_sd3.lacks(shapes)
    if any("double_blocks" in name for name in names):
        return "is a FLUX in one file, which is not read: give its diffusers folder"
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in names):
        return "is one part of a diffusers folder: give the folder that holds all of them"
    if any(name.startswith("control_model.") for name in names):
        return "is a ControlNet: only text-to-image models serve"
    if f"{NETWORK}input_blocks.0.0.weight" not in shapes:
        if any(name.startswith((VAE, "encoder.", "decoder.")) for name in names):
            return "is an autoencoder without a network: only whole checkpoints serve"
        first = f": its first tensor is {names[0][:60]!r}" if names else ": it is empty"
        return f"is not a diffusion model of a known kind{first}"
    if (channels := shapes[f"{NETWORK}input_blocks.0.0.weight"][1]) != 4:
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


def unet_config(shapes: Shapes, heads: int | None) -> dict[str, Any]:
    """Of a UNet; ``heads`` at every level, None: as many as heads of 64 fit."""
    widths: list[int] = [shapes[f"{NETWORK}input_blocks.0.0.weight"][0]]
    levels: list[list[int]] = [[]]  # the transformer blocks after each residual block
    for i in numbers(shapes, f"{NETWORK}input_blocks.")[1:]:
        block = f"{NETWORK}input_blocks.{i}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
            widths.append(0)
            continue
        widths[-1] = shapes[f"{block}0.out_layers.3.weight"][0]
        levels[-1].append(len(numbers(shapes, f"{block}1.transformer_blocks.")))
    if len({len(level) for level in levels}) != 1 or any(len(set(each)) != 1 for each in levels):
        raise Unfit("has a UNet of an unusual shape, whose levels differ in their blocks")
    middle = f"{NETWORK}middle_block.1."
    depth = [level[0] for level in levels]
    inside = len(numbers(shapes, f"{middle}transformer_blocks."))
    # the middle has the depth of the last level, which may have no attention itself
    depths = [each or 1 for each in depth[:-1]] + [depth[-1] or inside]
    kinds = ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in depth]
    ups = ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(depth)]
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes[f"{NETWORK}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{NETWORK}out.2.weight"][0],
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
    beside = shapes.get(f"{NETWORK}label_emb.0.0.weight")
    if beside is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_NUMBER,
            "projection_class_embeddings_input_dim": beside[1],
        }
    return config


# --- families -------------------------------------------------------------------------------------


def _sd1(shapes: Shapes) -> Layout:
    text = clip_config(shapes, CLIP_L, "CLIPTextModel")
    texts = (Text("text_encoder", "CLIPTextModel", CLIP_L, text["num_hidden_layers"]),)
    configs = {
        "": pipeline("StableDiffusionPipeline", texts, UNET_PARTS),
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
        "": pipeline("StableDiffusionPipeline", texts, UNET_PARTS),
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
        "": pipeline(kind, texts, UNET_PARTS, force_zeros_for_empty_prompt=True),
        "unet": unet_config(shapes, heads=None),
        "vae": vae_config(shapes, 0.13025),
        "text_encoder": one,
        "text_encoder_2": two,
        "scheduler": {**NOISE, "prediction_type": "epsilon"},
    }
    return Layout("SDXL", configs, texts, {"epsilon": 1024, "v_prediction": 1024})


# What a file is taken for, by what its names show: a family more is a line more.
FAMILIES: tuple[tuple[Callable[[Shapes], bool], Callable[[Shapes], Layout]], ...] = (
    (checkpoint_sd3.shows, checkpoint_sd3.layout),
    (has(XL_OPEN_CLIP), _sdxl),
    (has(OPEN_CLIP), _sd2),
    (has(CLIP_L), _sd1),
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
