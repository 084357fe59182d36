"""The autoencoder of the shapes: a small ``AutoencoderKL`` trained on rendered pictures.

Loss: mean |x - x'| + 2 mean (x - x')^2 + 1e-6 KL, on random 32-pixel crops for the first 80 % of
the steps (cheap) and on whole pictures after (borders). A KL weight of 1e-5 let one latent channel
collapse. At the end a per-channel whitening of the
latents is folded into ``quant_conv`` and ``post_quant_conv``, so that latents have mean 0 and
standard deviation 1 and ``scaling_factor`` is 1.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocket.tools import say
from pocket.training import cosine, save_state, to_tensor

CHANNELS = (16, 32, 64)
POSTERIOR_STD = 0.02  # of latents with standard deviation 1


def build() -> Any:
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL  # whose annotations say tuples of one
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=1.0,
    )
    # Residual branches start at zero: the net begins as a plain pyramid and a high rate is safe.
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            torch.nn.init.zeros_(parameter)
    return vae


def whiten(vae, images: torch.Tensor):
    """Fold (z - mean) / std per latent channel into the two 1x1 convolutions around the latents,
    and make the posterior's standard deviation POSTERIOR_STD everywhere.

    The learned deviations do not survive the whitening: a channel that the decoder hardly uses has
    a small spread and a wide posterior, which would be scaled up to many times the spread of the
    means that the UNet is trained on.
    """
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        n = len(mean)
        vae.quant_conv.weight[:n] /= std[:, None, None, None]
        vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - mean) / std
        vae.quant_conv.weight[n:] = 0.0
        vae.quant_conv.bias[n:] = 2 * math.log(POSTERIOR_STD)
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]


def train(work: Path, steps: int, seed: int = 0, batch: int = 16, peak: float = 2e-3):
    """Train to ``work/vae.pt`` (finished) by way of ``work/vae_state.pt`` (resumable)."""
    done, state_file = work / "vae.pt", work / "vae_state.pt"
    if done.exists():
        return
    images = np.load(work / "train.npz")["images"]
    torch.manual_seed(seed)
    vae = build().to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        whole = step >= 0.8 * steps
        pick = rng.integers(len(images), size=batch // 2 if whole else batch)
        x = to_tensor(images[pick])
        if not whole:
            i, j = rng.integers(8, 25, size=2)
            x = x[:, :, i : i + 32, j : j + 32]
        x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=torch.Generator().manual_seed(step)
        )
        error = vae.decode(z).sample - x
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            psnr = -10 * torch.log10(error.square().mean() / 4)
            say(f"vae {step + 1}/{steps} loss {loss.item():.4f} psnr {psnr.item():.1f}")
        if (step + 1) % 500 == 0:
            save_state(
                state_file, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1
            )
    whiten(vae.eval(), to_tensor(images[:1000]))
    save_state(done, model=vae.state_dict())
