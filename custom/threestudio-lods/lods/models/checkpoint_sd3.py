"""Stable Diffusion 3 and 3.5 in one file, under the names of Stability AI's code."""

import math
from typing import Any

from lods.models import clip_tokens
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

BLOCKS = "joint_blocks."
CLIPS = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
T5 = "text_encoders.t5xxl."
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FLOW = {"_class_name": SCHEDULER, "num_train_timesteps": 1000, "shift": 3.0}
PIXELS = 1024
SCALE, SHIFT = 1.5305, 0.0609  # of the latents
NO_T5 = (
    "its T5 text encoder is left out, whose tokenizer is not in the file, and rows of zeros stand "
    "in its place: give the model's diffusers folder to have it"
)


def shows(shapes: Shapes) -> bool:
    """Whether a file is of this family, or a part of it."""
    return any(name.startswith((f"{NETWORK}{BLOCKS}", BLOCKS)) for name in shapes)


def lacks(shapes: Shapes) -> str:
    """What the file has not that a model needs, and what to give instead; "" for a whole one."""
    if not has(VAE)(shapes) or not has(NETWORK)(shapes):
        return (
            "has the network of a Stable Diffusion 3 and no autoencoder: give the model's "
            "diffusers folder"
        )
    lost = [prefix.split(".")[1] for prefix in CLIPS if not has(prefix)(shapes)]
    if lost:
        return (
            f"has no text encoder ({', '.join(lost)}), like most files of Stable Diffusion 3: give "
            "a file that includes them (often named incl_clips), or the model's diffusers folder"
        )
    return ""


def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """Of the transformer, whose heads are 64 wide."""
    width, channels, patch = shapes[f"{NETWORK}x_embedder.proj.weight"][:3]
    places = shapes[f"{NETWORK}pos_embed"][1]
    side = math.isqrt(places)
    if side**2 != places or width % HEAD:
        raise Unfit(
            f"has a transformer of an unusual shape, of {width} numbers for {places} places"
        )
    blocks = f"{NETWORK}{BLOCKS}"
    layers = numbers(shapes, blocks)
    return {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes[f"{NETWORK}final_layer.linear.weight"][0] // patch**2,
        "num_layers": len(layers),
        "attention_head_dim": HEAD,
        "num_attention_heads": width // HEAD,
        "joint_attention_dim": shapes[f"{NETWORK}context_embedder.weight"][1],
        "caption_projection_dim": shapes[f"{NETWORK}context_embedder.weight"][0],
        "pooled_projection_dim": shapes[f"{NETWORK}y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": side,
        # a second attention over the picture alone, as in SD3.5-medium
        "dual_attention_layers": [
            i for i in layers if f"{blocks}{i}.x_block.attn2.qkv.weight" in shapes
        ],
        "qk_norm": "rms_norm" if f"{blocks}0.x_block.attn.ln_q.weight" in shapes else None,
    }


def layout(shapes: Shapes) -> Layout:
    """Raises :class:`lods.models.checkpoint_parts.Unfit`."""
    kind = "CLIPTextModelWithProjection"
    configs: dict[str, dict[str, Any]] = {}
    texts: tuple[Text, ...] = ()
    for part, prefix, act, padding in (
        ("text_encoder", CLIPS[0], "quick_gelu", clip_tokens.MARKS[1]),
        ("text_encoder_2", CLIPS[1], "gelu", "!"),
    ):
        config = clip_config(shapes, f"{prefix}text_model.", kind, act=act)
        projection = shapes.get(f"{prefix}text_projection.weight")
        if part == "text_encoder_2" and projection is not None:
            config["projection_dim"] = projection[0]
        configs[part] = config
        texts += (Text(part, kind, prefix, config["num_hidden_layers"], padding),)
    parts = {"transformer": "SD3Transformer2DModel", "scheduler": SCHEDULER}
    none = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    configs |= {
        "": pipeline("StableDiffusion3Pipeline", texts, parts, **none),
        "transformer": transformer_config(shapes),
        "vae": {
            **vae_config(shapes, SCALE),
            "shift_factor": SHIFT,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "scheduler": dict(FLOW),
    }
    note = NO_T5 if has(T5)(shapes) else ""
    return Layout("Stable Diffusion 3", configs, texts, {"flow": PIXELS}, "transformer", note)
