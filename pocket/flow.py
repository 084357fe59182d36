"""The model ``pocket-flow``: the same latents, captions and cameras as the UNet's, a small
``SD3Transformer2DModel``, and a folder that ``StableDiffusion3Pipeline`` loads.

Rectified flow (Liu, Gong and Liu, arXiv 2209.03003): z_t = (1 - t) z + t eps with t in (0, 1), the
network predicts the velocity eps - z, and t is the logistic function of a standard normal number
(Esser et al., arXiv 2403.03206).

The pipeline's third text encoder has nothing to say here: ``StableDiffusion3Pipeline`` appends rows
of zeros where there is none, 256 unless it is told another number, and as its folders must have
one, that of ours gives zeros too. Equal rows stay equal in every layer, so that n of them are one
whose weight in the attention is n times as large: the training has one row and log n added to its
attention scores, with another n from 1 to 256 in each step. So the network can be called with any
number.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocket.autoencoder import LATENT_CHANNELS, load_vae
from pocket.diffusion import PLAIN, Trained, finish_folder, first_noise, guided, load_averaged
from pocket.latents import LENGTH, tokenizer
from pocket.tokenizer import text_config
from pocket.tools import CameraTokens

NAME, PEAK = "flow", 6e-4  # of the state's file, and of the rate
WIDTHS = (128, 64)  # of the two text encoders
LAYERS = (3, 2)  # of these; the rows are those after the last but one
LAYERS_OF_TRANSFORMER, HEADS, PATCH = 6, 4, 2  # heads are 64 wide
ZERO_ROWS = 256  # as many as the pipeline appends


def build_text_encoder(tokens, width: int, layers: int):
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(text_config(tokens, LENGTH, width, layers, **PLAIN))


def build_silent_encoder(tokens):
    """A T5 encoder whose rows are zeros: the weights of its last norm are."""
    from transformers import T5Config, T5EncoderModel

    # read by our own loader, which gives so many rows and not 256
    more: dict[str, Any] = {"n_positions": LENGTH}
    config = T5Config(
        vocab_size=len(tokens),
        d_model=sum(WIDTHS),
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        **more,
    )
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def build_transformer(
    layers: int = LAYERS_OF_TRANSFORMER, heads: int = HEADS, patch: int = PATCH, size: int = 16
):
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=64 * heads,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=2 * size // patch,
        qk_norm="rms_norm",
    )
    # Each block begins as the identity, and the network as 0 (Peebles and Xie, arXiv 2212.09748).
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


class ZeroRows:
    """Joint attention as in ``JointAttnProcessor2_0``, computed in the plain way, where the last
    row of the text but ``after`` stands for ``count`` equal ones."""

    def __init__(self):
        self.count, self.after = 1.0, 0

    def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
        def split(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [attn.norm_q(split(attn.to_q(image))), attn.norm_added_q(split(attn.add_q_proj(text)))],
            dim=2,
        )
        key = torch.cat(
            [attn.norm_k(split(attn.to_k(image))), attn.norm_added_k(split(attn.add_k_proj(text)))],
            dim=2,
        )
        value = torch.cat([split(attn.to_v(image)), split(attn.add_v_proj(text))], dim=2)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        more = torch.zeros(key.shape[2], device=scores.device)
        more[key.shape[2] - 1 - self.after] = math.log(self.count)
        weights = (scores.float() + more).softmax(-1).to(value.dtype)
        out = (weights @ value).transpose(1, 2).flatten(2)
        image, text = out.split([image.shape[1], text.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


class Model(Trained):
    """What is trained together; ``forward`` gives the velocity for noisy latents."""

    def __init__(self, tokens, **shape):
        super().__init__()
        self.text_encoder = build_text_encoder(tokens, WIDTHS[0], LAYERS[0])
        self.text_encoder_2 = build_text_encoder(tokens, WIDTHS[1], LAYERS[1])
        self.camera_encoder = CameraTokens(width=sum(WIDTHS))
        self.transformer = build_transformer(**shape)
        self.zero_rows, self.count = ZeroRows(), 1.0
        processor: Any = self.zero_rows
        self.transformer.set_attn_processor(processor)

    def forward(self, noisy, t, ids, cameras=None):
        """eps - z for (N, C, h, w) at times t (N,) in 0..1; ``cameras`` (N, 4) appends their rows.

        There is one row of zeros; in training it stands for as many as ``times`` drew.
        """
        said = [
            encoder(ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        rows = torch.cat([each.hidden_states[-2] for each in said], dim=-1)
        rows = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)
        self.zero_rows.count, self.zero_rows.after = (self.count if self.training else 1.0), 0
        if cameras is not None:
            seen = self.camera_encoder(cameras).to(rows.dtype)
            rows, self.zero_rows.after = torch.cat([rows, seen], dim=1), seen.shape[1]
        pooled = torch.cat([each.text_embeds for each in said], dim=-1)
        return self.transformer(noisy, rows, pooled, 1000 * t).sample

    @property
    def denoiser(self) -> nn.Module:
        return self.transformer

    def times(self, rng, batch: int) -> torch.Tensor:
        """Times in (0, 1) of a training step: the logistic function of normal numbers, evenly
        spread over the quantiles. Also draws how many rows of zeros the step stands for."""
        self.count = ZERO_ROWS ** rng.uniform()
        u = (np.arange(batch) + rng.uniform(size=batch)) / batch
        normal = math.sqrt(2) * torch.erfinv(torch.from_numpy(2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        return torch.sigmoid(normal).float()

    def noised(self, z, noise, t):
        """(noisy latents, the velocity)."""
        part = t.to(z)[:, None, None, None]
        return (1 - part) * z + part * noise, noise - z

    def bins(self) -> list[tuple[str, torch.Tensor]]:
        """Five ranges of time by name, for the table of errors: (name, their middle)."""
        middles = (0.1, 0.3, 0.5, 0.7, 0.9)
        return [(f"t {m - 0.1:.1f}-{m + 0.1:.1f}", torch.tensor([m])) for m in middles]

    @torch.no_grad()
    def sample(self, ids, cameras, scale: float, seed: int, steps: int = 25) -> torch.Tensor:
        """Latents of ``steps`` steps of Euler's. ``ids`` (2N, LENGTH) are N empty captions and N
        others, and ``scale`` is the guidance from these to those; the cameras (N, 4) go with
        both."""
        x = first_noise(self.transformer, len(ids) // 2, seed)
        for k in range(steps):
            t = torch.full((len(ids),), 1 - k / steps, device=x.device)
            x = x - guided(self, x, t, ids, cameras, scale) / steps
        return x


def save_pipeline(work: Path, folder: Path):
    """Write the averaged weights as a ``StableDiffusion3Pipeline`` folder in half precision, with
    the encoder of cameras, which stock diffusers leaves alone, and ``vocabulary.json``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    tokens = tokenizer(work)
    model = load_averaged(work, NAME, Model(tokens))
    model.transformer.set_attn_processor(JointAttnProcessor2_0())
    vae = load_vae(work)
    vae.register_to_config(shift_factor=0.0)  # this pipeline adds it
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokens,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokens,
        text_encoder_3=build_silent_encoder(tokens),
        tokenizer_3=tokens,
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    finish_folder(folder, model.camera_encoder)
