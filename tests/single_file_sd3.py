"""A tiny Stable Diffusion 3 of random weights as a diffusers folder, and its weights in one file
under the names of Stability AI's code: the inverse of diffusers' conversion, written from the
names alone."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.single_files import vae_name, vae_value

WIDTH = 64  # of each text encoder, and of the transformer
NETWORK, T5 = "model.diffusion_model.", "text_encoders.t5xxl.transformer."
NOTED = {"modelspec.resolution": "16x16"}
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def write_folder(folder: Path, newer: bool = False, seed: int = 0) -> Path:
    """A random model; ``newer``: with what Stable Diffusion 3.5-medium adds, normed queries and
    keys and in the first block a second attention."""
    import diffusers
    from lods.models.clip_tokens import write_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    def text(act: str, projection: int):
        config = CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=1,
            hidden_act=act,
            bos_token_id=0,
            eos_token_id=2,
            initializer_factor=10.0,
        )
        return CLIPTextModelWithProjection(config).eval()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=WIDTH,
            num_attention_heads=1,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=WIDTH + 48,
            pos_embed_max_size=8,
            dual_attention_layers=(0,) if newer else (),
            qk_norm="rms_norm" if newer else None,
        )
        for name, weight in transformer.named_parameters():
            if "norm_" in name or not weight.any():
                torch.nn.init.normal_(weight, mean=float("norm_" in name), std=0.3)
        vae = diffusers.AutoencoderKL(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        encoders = [text("quick_gelu", WIDTH), text("gelu", 48)]
    # the code has the pooled vector of its first encoder as it is
    encoders[0].text_projection.weight.data = torch.eye(WIDTH)
    parts = {"transformer": transformer, "vae": vae, **dict(zip(ENCODERS.values(), encoders))}
    for part, module in parts.items():
        module.save_pretrained(folder / part, safe_serialization=True)
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", "!")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    names = {
        part: [type(m).__module__.split(".")[0], type(m).__name__] for part, m in parts.items()
    }
    names |= {"scheduler": ["diffusers", type(scheduler).__name__]}
    names |= {part: ["transformers", "CLIPTokenizer"] for part in ("tokenizer", "tokenizer_2")}
    names |= {part: [None, None] for part in ("text_encoder_3", "tokenizer_3")}
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline", **names}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_file(folder: Path, path: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """The weights of ``folder``, and ``extra`` tensors, in one file."""
    tensors = {k: v.contiguous() for k, v in {**original(folder), **(extra or {})}.items()}
    save_file(tensors, path, metadata=NOTED)
    return path


def original(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of ``folder`` under the names of the code."""
    network, vae = (
        load_file(folder / part / "diffusion_pytorch_model.safetensors")
        for part in ("transformer", "vae")
    )
    found = transformer_tensors(network)
    found |= {f"first_stage_model.{vae_name(k)}": vae_value(k, v) for k, v in vae.items()}
    for name, part in ENCODERS.items():
        text = load_file(folder / part / "model.safetensors")
        found |= {f"text_encoders.{name}.transformer.{k}": v for k, v in text.items()}
    del found["text_encoders.clip_l.transformer.text_projection.weight"]
    return found


OUTER = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
INNER = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINED = {  # query, key and value are one matrix
    "attn.to_q": ("x_block.attn.qkv", "attn.to_{}"),
    "attn.add_q_proj": ("context_block.attn.qkv", "attn.add_{}_proj"),
    "attn2.to_q": ("x_block.attn2.qkv", "attn2.to_{}"),
}


def transformer_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the transformer."""
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks"))
    found = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in OUTER:
            found[OUTER[name]] = value
        elif module in OUTER:
            found[f"{OUTER[module]}.{leaf}"] = swapped(value) if "norm_out" in name else value
        else:
            block, inner = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", module).groups()
            prefix = f"joint_blocks.{block}"
            if inner in INNER:
                # of the last block the context is no more than scaled and shifted, as the picture
                # is at the end
                odd = inner == "norm1_context.linear" and int(block) == last
                found[f"{prefix}.{INNER[inner]}.{leaf}"] = swapped(value) if odd else value
            elif inner in JOINED:
                new, old = JOINED[inner]
                names = [f"transformer_blocks.{block}.{old.format(x)}.{leaf}" for x in "qkv"]
                found[f"{prefix}.{new}.{leaf}"] = torch.cat([tensors[each] for each in names])
    return {f"{NETWORK}{name}": value for name, value in found.items()}


def swapped(value: torch.Tensor) -> torch.Tensor:
    """The code has the shift before the scale, diffusers the scale before the shift."""
    return torch.cat(value.chunk(2)[::-1])
