"""Random pipelines of the newer flow models, as small as those of :mod:`tests.tiny_models`: their
pictures have 16 x 16 pixels. Nothing of a network is zero at first."""

import copy
from pathlib import Path

import torch

from pocket.tokenizer import save_tokenizer
from tests.tiny_models import (
    WORDS,
    tiny_clip,
    tiny_flow_vae,
    tiny_t5,
    write_camera_encoder,
)

TOKENS = 16  # of CLIP's


def write_flux(folder: Path, guided: bool = False, camera_tokens: int = 0, seed: int = 0) -> Path:
    """A ``FluxPipeline``; ``guided``: its transformer is told a guidance scale."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=32,
            guidance_embeds=guided,
            axes_dims_rope=(2, 2, 4),
        )
        pipeline = FluxPipeline(
            vae=tiny_flow_vae(8),
            text_encoder=tiny_clip(CLIPTextModel, tokenizer, 32, TOKENS),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(tokenizer, 24),
            tokenizer_2=copy.deepcopy(tokenizer),
            transformer=transformer.eval(),
            # a picture of 16 tokens lies between the two sizes that the shift is known of
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
            ),
        )
    pipeline.save_pretrained(folder)
    if camera_tokens:
        write_camera_encoder(folder, 24, camera_tokens, seed)
    return folder


FAMILIES = {"flux": write_flux}
PIPELINES = {"flux": "FluxPipeline"}
