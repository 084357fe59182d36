"""A Stable Diffusion of random weights, small enough to be made and saved in under a second.

It is a complete diffusers folder (tokenizer, text encoder, UNet with cross attention, VAE,
scheduler), so tests go through the same loading code as a real model, offline.
"""

import warnings
from pathlib import Path

import torch

from pocket.tokenizer import save_tokenizer

WORDS = (  # threestudio's view words, and some to make prompts of
    *("a", "an", "the", "of", "on", "is", "dslr", "image", "photo", "hamburger", "astronaut"),
    *("riding", "horse", "house", "car", "chair", "snowman", "red", "green", "blue", "yellow"),
    *("front", "side", "back", "backside", "overhead", "view"),
)


def make_tiny_sd(
    folder,
    prediction_type: str = "epsilon",
    width: int = 32,
    tokens: int = 16,
    sample_size: int = 8,
    seed: int = 0,
) -> Path:
    """Write a random ``StableDiffusionPipeline`` to ``folder`` and return the folder.

    ``width`` is the text width (a multiple of 4), ``tokens`` the length of a prompt,
    ``sample_size`` the latents' size; the VAE halves images once, so they have twice that size.
    The weights depend on ``seed`` only, and the global random state is left as it was.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import (
            AutoencoderKL,
            DDPMScheduler,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )
        from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(folder)
    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                # CLIP's default initialisation (0.02) would make all prompts look alike.
                initializer_factor=10.0,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            sample_size=2 * sample_size,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.7,
        )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder
