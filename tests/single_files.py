"""Tiny Stable Diffusions of random weights as diffusers folders, and the same weights in one file
under the names of the original codes: the inverse of diffusers' conversion, written from the
names alone."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import write_index

KINDS = ("sd1", "sd2", "sdxl")
WIDTH = 64  # of each text encoder


def unet_of(kind: str) -> dict[str, Any]:
    """The fields that a UNet of this kind has beside its widths."""
    if kind == "sd1":
        return {"attention_head_dim": 8, "cross_attention_dim": WIDTH}
    common = {"attention_head_dim": [1, 1], "use_linear_projection": True}
    if kind == "sd2":
        return {**common, "cross_attention_dim": WIDTH}
    return {
        **common,
        "cross_attention_dim": 2 * WIDTH,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + WIDTH,
    }


def write_folder(folder: Path, kind: str, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A random model of this kind in diffusers' layout, with CLIP's own tokenizer."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from lods.models.clip_tokens import write_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(cls, act: str):
        config = CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=1,
            hidden_act=act,
            bos_token_id=0,
            eos_token_id=2,
            initializer_factor=10.0,
        )
        return cls(config).eval()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **unet_of(kind),
        )
        vae = AutoencoderKL(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
        )
        parts: dict[str, Any] = {"unet": unet, "vae": vae}
        parts["text_encoder"] = text(CLIPTextModel, "gelu" if kind == "sd2" else "quick_gelu")
        if kind == "sdxl":
            parts["text_encoder_2"] = text(CLIPTextModelWithProjection, "gelu")
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
    )
    scheduler.save_pretrained(folder / "scheduler")
    for part, module in parts.items():
        module.save_pretrained(folder / part, safe_serialization=True)
    write_tokenizer(folder / "tokenizer", "!" if kind == "sd2" else "<|endoftext|>")
    if kind == "sdxl":
        write_tokenizer(folder / "tokenizer_2", "!")
    write_index(folder, "StableDiffusionXLPipeline" if kind == "sdxl" else None)
    return folder


def write_file(folder: Path, kind: str, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """The weights of ``folder`` in one file, with what a trainer notes of the size."""
    tensors = original(folder, kind)
    noted = {"modelspec.resolution": "16x16", **(metadata or {})}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=noted)
    return path


def original(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of ``folder`` under the names of the original codes."""
    unet, vae = (
        load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae")
    )
    found = {f"model.diffusion_model.{unet_name(k, unet)}": v for k, v in unet.items()}
    found |= {f"first_stage_model.{vae_name(k)}": vae_value(k, v) for k, v in vae.items()}
    text = load_file(folder / "text_encoder" / "model.safetensors")
    if kind == "sd2":
        found |= open_clip(text, "cond_stage_model.model.", more=1)
        return found
    where = "conditioner.embedders.0" if kind == "sdxl" else "cond_stage_model"
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    found |= {f"{where}.transformer.{k}": v for k, v in text.items()}
    if kind == "sdxl":
        two = load_file(folder / "text_encoder_2" / "model.safetensors")
        found |= open_clip(two, "conditioner.embedders.1.model.")
    return found


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, all_names, layers: int = 1) -> str:
    """Of a tensor of a UNet with ``layers`` residual blocks a level."""
    for ours, theirs in WHOLE.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs)
    found = re.match(r"(down|up|mid)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.(.*)", name)
    assert found, name
    where, kind, rest = found[1], found[3], found[5]
    block, i = int(found[2] or 0), int(found[4])
    if kind == "resnets":
        part, _, last = rest.partition(".")
        rest = f"{RESNET[part]}.{last}"
    if where == "mid":
        return f"middle_block.{2 * i if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        attends = any(n.startswith(f"up_blocks.{block}.attentions") for n in all_names)
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + attends}.{rest}"
    place = 1 + block * (layers + 1) + i if where == "down" else block * (layers + 1) + i
    side = "input" if where == "down" else "output"
    return f"{side}_blocks.{place}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_name(name: str, levels: int = 2) -> str:
    """Of a tensor of an autoencoder."""
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, theirs in (
        *(("down_blocks", "down"), ("resnets", "block"), ("downsamplers.0", "downsample")),
        *(("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut")),
        *(("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q")),
        *(("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("conv_norm_out", "norm_out")),
    ):
        name = name.replace(ours, theirs)
    return name


def vae_value(name: str, value: torch.Tensor) -> torch.Tensor:
    """The original's attention projects by convolutions of one pixel."""
    projects = re.search(r"to_(q|k|v|out\.0)\.weight", name)
    return value[:, :, None, None] if projects else value


def open_clip(text: dict[str, torch.Tensor], prefix: str, more: int = 0) -> dict[str, torch.Tensor]:
    """A text encoder under OpenCLIP's names, with ``more`` layers that are not used."""
    text = {k.removeprefix("text_model."): v for k, v in text.items()}
    found: dict[str, torch.Tensor] = {}
    for name, value in text.items():
        new = name.replace("encoder.layers", "transformer.resblocks")
        for ours, theirs in (
            *(("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc")),
            *(("mlp.fc2", "mlp.c_proj"), ("final_layer_norm", "ln_final")),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):
            new = new.replace(ours, theirs)
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T
        elif "position_ids" in name:
            continue
        elif joined := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", new):
            three = [text[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            found[f"{prefix}{joined[1]}attn.in_proj_{joined[2]}"] = torch.cat(three)
        elif "self_attn" not in new:
            found[prefix + new] = value
    count = len({k.split("resblocks.")[1].split(".")[0] for k in found if "resblocks." in k})
    for i in range(count, count + more):
        first = {k: v for k, v in found.items() if ".resblocks.0." in k}
        found |= {k.replace(".resblocks.0.", f".resblocks.{i}."): v + 1 for k, v in first.items()}
    return found
