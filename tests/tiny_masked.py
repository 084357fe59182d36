"""Random pipelines of SANA and PixArt-Sigma, whose texts have a mask, as small as those of
:mod:`tests.tiny_models`."""

import warnings
from pathlib import Path

import torch

from pocket.tokenizer import save_tokenizer
from tests.tiny_models import WORDS, save_pipeline, tiny_t5, tiny_vae


def write_sana(
    folder: Path,
    width: int = 32,
    sample_size: int = 4,
    shift: float = 3.0,
    timestep_scale: float = 1.0,
    seed: int = 0,
    camera_tokens: int = 0,
) -> Path:
    """A ``SanaPipeline``. ``width`` is that of the text encoder's rows; the autoencoder halves
    pictures twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import (
            AutoencoderDC,
            DPMSolverMultistepScheduler,
            SanaPipeline,
            SanaTransformer2DModel,
        )
        from transformers import Gemma2Config, Gemma2Model

    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, 2_000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=width,
            sample_size=sample_size,
            timestep_scale=timestep_scale,
        ).eval()
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(4, 4, 8),
            decoder_block_out_channels=(4, 4, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.7,
        ).eval()
        _louder(transformer, text_encoder)
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
    )
    return save_pipeline(pipeline, folder, width, camera_tokens, seed)


def write_pixart(
    folder: Path, width: int = 32, sample_size: int = 8, seed: int = 0, camera_tokens: int = 0
) -> Path:
    """A ``PixArtSigmaPipeline``. ``width`` is that of T5's rows; the VAE halves pictures once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import (
            DPMSolverMultistepScheduler,
            PixArtSigmaPipeline,
            PixArtTransformer2DModel,
        )

    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = tiny_t5(tokenizer, width)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=sample_size,
            caption_channels=width,
            norm_num_groups=4,
            use_additional_conditions=False,
        ).eval()
        vae = tiny_vae(sample_size)
        _louder(transformer, text_encoder)
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )
    return save_pipeline(pipeline, folder, width, camera_tokens, seed)


def _louder(transformer, text_encoder) -> None:
    """With the default initialisation neither the text nor the time would be seen in the output."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "attn2" in name or "linear" in name or "caption" in name:
                weight.mul_(3.0)
        text_encoder.get_input_embeddings().weight.normal_()
