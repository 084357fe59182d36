"""Stable Diffusions of random weights, small enough to be made and saved in under a second.

Each is a complete diffusers folder (tokenizer, text encoder, UNet with cross attention, VAE,
scheduler), so tests go through the same loading code as a real model, offline.
"""

import copy
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pocket.portable import make_portable
from pocket.tokenizer import save_tokenizer

WORDS = (  # threestudio's view words, and some to make prompts of
    *("a", "an", "the", "of", "on", "is", "dslr", "image", "photo", "hamburger", "astronaut"),
    *("riding", "horse", "house", "car", "chair", "snowman", "red", "green", "blue", "yellow"),
    *("front", "side", "back", "backside", "overhead", "view"),
)


# What sets the models of the cards apart, at a 32nd of their widths (SDXL: 24 + 40 for 768 + 1280).
V2_UNET = {"attention_head_dim": (2, 4), "use_linear_projection": True}
KINDS = {
    "sd15": {"width": 24},
    "sd21-base": {"width": 32, "act": "gelu", "unet": V2_UNET},
    "sd21": {
        "width": 32,
        "act": "gelu",
        "unet": V2_UNET,
        "sample_size": 12,
        "prediction_type": "v_prediction",
    },
    "sdxl": {
        "width": 24,
        "width_2": 40,
        "sample_size": 16,
        "unet": {
            **V2_UNET,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 40,
        },
    },
}


def make_tiny_sd(folder, kind: str | None = None, **options) -> Path:
    """Write a random ``StableDiffusionPipeline`` to ``folder`` and return the folder.

    ``kind``, one of KINDS, shapes it like the model of that card ("sdxl": a
    ``StableDiffusionXLPipeline``); ``options`` are those of ``write_pipeline``.
    """
    return write_pipeline(Path(folder), **({**KINDS[kind], **options} if kind else options))


def write_pipeline(
    folder: Path,
    prediction_type: str = "epsilon",
    width: int = 32,
    width_2: int = 0,
    tokens: int = 16,
    sample_size: int = 8,
    act: str = "quick_gelu",
    unet: dict | None = None,
    seed: int = 0,
    camera_tokens: int = 0,
) -> Path:
    """``width`` is the text width (a multiple of 4), ``width_2`` that of a second text encoder (0:
    there is none), ``tokens`` the length of a prompt, ``sample_size`` the latents' size; the VAE
    halves images once, so they have twice that size. ``unet`` are more fields of the UNet's config.
    ``camera_tokens``: rows of an encoder of cameras, 0: there is none. The weights depend on
    ``seed`` only, and the global random state is left as it was.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import (
            DDPMScheduler,
            StableDiffusionPipeline,
            StableDiffusionXLPipeline,
            UNet2DConditionModel,
        )
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, tokens)

    def text_config(width: int, act: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act=act,
            max_position_embeddings=tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # CLIP's default initialisation (0.02) would make all prompts look alike.
            initializer_factor=10.0,
        )

    down = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    up = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    fields = {"attention_head_dim": 8, "layers_per_block": 1, **down, **up, **(unet or {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(text_config(width, act))
        net = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            cross_attention_dim=width + width_2,
            norm_num_groups=8,
            **fields,
        )
        vae = tiny_vae(sample_size)
        second = CLIPTextModelWithProjection(text_config(width_2, "gelu")) if width_2 else None
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    parts = {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": net.eval(),
        "scheduler": scheduler,
    }
    if second is None:
        pipeline = StableDiffusionPipeline(
            **parts,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        other = copy.deepcopy(tokenizer)
        other.pad_token = "!"  # SDXL's second tokenizer pads with another token than its first
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=second.eval(),
            tokenizer_2=other,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    make_portable(folder)
    if camera_tokens:
        write_camera_encoder(folder, width + width_2, camera_tokens, seed)
    return folder


CAMERA_MLP = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}


def make_tiny_multiview(folder, views: int = 4, **options) -> Path:
    """A random model that sees ``views`` pictures at once, whose cameras make a difference;
    ``options`` as for ``write_pipeline``."""
    folder = write_pipeline(Path(folder), **{"width": 32, "unet": CAMERA_MLP, **options})
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    config |= {"_class_name": "MultiViewUNet", "num_frames": views}
    file.write_text(json.dumps(config))
    return folder


def save_pipeline(pipeline, folder, width: int, camera_tokens: int, seed: int) -> Path:
    """Write a pipeline to ``folder``, with an encoder of cameras if it has ``camera_tokens``; and
    return the folder."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    if camera_tokens:
        write_camera_encoder(folder, width, camera_tokens, seed)
    return folder


# levels like those of Stable Diffusion 2.1, of which all but the last have attention
LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def make_tiny_adapted(folder, **options) -> Path:
    """A random model with an adapter (:mod:`lods.models.view_adapter`) in its folder, that lets it
    see six views; ``options`` as for ``write_pipeline``."""
    folder = write_pipeline(Path(folder), **{"width": 32, "unet": LEVELS, **options})
    write_view_adapter(folder, adapter_tensors(folder))
    return folder


def write_view_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The file of an adapter in the folder of a model."""
    path = folder / "mv_adapter" / "mvadapter_t2mv_sd21.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


def adapter_tensors(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ones, under the names of MV-Adapter's file."""
    from diffusers import T2IAdapter

    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(200 + seed)
        encoder = T2IAdapter(6, config["block_out_channels"], config["layers_per_block"], 8)
        found = dict(encoder.state_dict())
        for name, value in unet.items():
            block, _, projection = name.partition(".attn1.to_")
            if projection.split(".")[0] in ("q", "k", "v", "out"):
                new = projection.replace(".", "_mv.", 1)
                found[f"{block}.attn1.processor.to_{new}"] = 0.3 * torch.randn_like(value)
    return found


def write_camera_encoder(folder, width: int, tokens: int = 2, seed: int = 0) -> Path:
    """A random encoder of cameras in the folder of a model, whose rows are as large as those of a
    text (those of the default initialisation are a tenth of that)."""
    from lods.models.camera_tokens import CameraTokens

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        encoder = CameraTokens(width=width, tokens=tokens, hidden=16)
        with torch.no_grad():
            for weight in encoder.parameters():
                weight.mul_(4.0)
    return encoder.save(folder)


def make_tiny_sd3(folder, **options) -> Path:
    """Write a random ``StableDiffusion3Pipeline`` to ``folder`` and return the folder; ``options``
    are those of ``write_flow_pipeline``."""
    return write_flow_pipeline(Path(folder), **options)


def write_flow_pipeline(
    folder: Path,
    widths: tuple[int, int] = (24, 16),
    t5: int = 0,
    tokens: int = 16,
    sample_size: int = 8,
    shift: float = 3.0,
    dual: bool = False,
    seed: int = 0,
    camera_tokens: int = 0,
) -> Path:
    """``widths`` are those of the two CLIP encoders, ``t5`` that of a T5 encoder (0: there is
    none, and the transformer takes 48), ``dual``: a second attention in the first block, as in
    SD3.5. The rest as in ``write_pipeline``. Nothing of the network is zero at first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            SD3Transformer2DModel,
            StableDiffusion3Pipeline,
        )
        from transformers import CLIPTextModelWithProjection

    tokenizer = save_tokenizer(folder / "tokenizer", WORDS, tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = [
            tiny_clip(CLIPTextModelWithProjection, tokenizer, width, tokens) for width in widths
        ]
        third = tiny_t5(tokenizer, t5) if t5 else None
        transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=t5 or 48,
            caption_projection_dim=16,
            pooled_projection_dim=sum(widths),
            pos_embed_max_size=sample_size,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        ).eval()
        vae = tiny_flow_vae(sample_size)
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=third,
        tokenizer_3=copy.deepcopy(tokenizer) if t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    return save_pipeline(pipeline, folder, t5 or 48, camera_tokens, seed)


def tiny_clip(kind, tokenizer, width: int, tokens: int):
    """A random CLIP text encoder of this class of transformers."""
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=10.0,
    )
    return kind(config).eval()


def tiny_t5(tokenizer, width: int):
    """A random T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval()


def tiny_vae(sample_size: int, **more):
    """A random VAE whose latents are ``sample_size`` and pictures twice that."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=2 * sample_size,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
        **more,
    ).eval()


def tiny_flow_vae(sample_size: int):
    """One with a shift."""
    return tiny_vae(sample_size, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def write_pocket_flow(folder) -> Path:
    """An untrained ``pocket-flow`` in the format of ``pocket.flow.save_pipeline``."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from pocket import flow
    from pocket.latents import LENGTH

    folder = Path(folder)
    tokens = save_tokenizer(folder / "tokenizer", WORDS, LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = flow.Model(tokens, layers=1, heads=1, size=8)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=flow.LATENT_CHANNELS,
            norm_num_groups=4,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        third = flow.build_silent_encoder(tokens)
        for weight in model.transformer.parameters():
            if not weight.any():  # it begins as 0
                torch.nn.init.normal_(weight, std=0.1)
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokens,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokens,
        text_encoder_3=third,
        tokenizer_3=tokens,
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    model.camera_encoder.save(folder)
    return folder


def write_index(folder: Path, pipeline: str | None = None) -> None:
    """The ``model_index.json`` of a folder whose parts are there."""
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    more = {}
    if pipeline == "StableDiffusionXLPipeline":
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        more["force_zeros_for_empty_prompt"] = True
    else:
        more = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index = {"_class_name": pipeline or "StableDiffusionPipeline", **parts, **more}
    (folder / "model_index.json").write_text(json.dumps(index))
