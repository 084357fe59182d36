"""Random pipelines of the newer flow models, as small as those of :mod:`tests.tiny_models`: their
pictures have 16 x 16 pixels. Nothing of a network is zero at first."""

import copy
import json
from pathlib import Path

import torch

from pocket.tokenizer import save_tokenizer
from tests.tiny_models import (
    WORDS,
    save_pipeline,
    tiny_clip,
    tiny_flow_vae,
    tiny_t5,
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
    return save_pipeline(pipeline, folder, 24, camera_tokens, seed)


def chat_tokenizer(folder: Path):
    """One with a chat format: the message, and the beginning of an answer with thoughts or not."""
    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, TOKENS)
    answer = "{% if enable_thinking %} a car{% else %} a house{% endif %}"
    tokenizer.chat_template = "{% for each in messages %}{{ each.content }}{% endfor %}" + answer
    return tokenizer


def qwen3_config(tokenizer, width: int, layers: int):
    """Of a language model whose states differ by word."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        initializer_range=0.5,
    )


def write_flux2(folder: Path, guided: bool = False, distilled: bool = False, seed: int = 0) -> Path:
    """A ``Flux2KleinPipeline``; ``guided``: its transformer is told a guidance scale;
    ``distilled``: it says that it is."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3ForCausalLM

    tokenizer = chat_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guided,
        )
        vae = AutoencoderKLFlux2(
            sample_size=16,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        pipeline = Flux2KleinPipeline(
            vae=vae.eval(),
            text_encoder=Qwen3ForCausalLM(qwen3_config(tokenizer, 8, 28)).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            is_distilled=distilled,
        )
    pipeline.save_pretrained(folder)
    return folder


def write_zimage(folder: Path, shift: float = 3.0, camera_tokens: int = 0, seed: int = 0) -> Path:
    """A ``ZImagePipeline``."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Model

    tokenizer = chat_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 2, 2],
            axes_lens=[1024, 16, 16],
        )
        torch.nn.init.normal_(transformer.x_pad_token)
        torch.nn.init.normal_(transformer.cap_pad_token)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=tiny_flow_vae(8),
            text_encoder=Qwen3Model(qwen3_config(tokenizer, 24, 3)).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    return save_pipeline(pipeline, folder, 24, camera_tokens, seed)


def write_qwen(folder: Path, sample_size: int = 8, seed: int = 0) -> Path:
    """A ``QwenImagePipeline``; its VAE halves pictures once."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.5,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        sight = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
        sight |= {"out_hidden_size": 24, "fullatt_block_indexes": [0]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=sight)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 2, 2),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 1.5, 2.0, 1.0],
        )
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
            ),
            vae=vae.eval(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    pipeline.save_pretrained(folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": sample_size}))
    return folder


FAMILIES = {"flux": write_flux, "flux2": write_flux2, "zimage": write_zimage, "qwen": write_qwen}
