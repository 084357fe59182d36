"""The autoencoder: a stock ``AutoencoderKL`` trained on renders of 128 pixels.

Latents have 8 channels on a grid of an eighth of the picture's side. Loss, with e the error and c
what is left of it without its mean over red, green and blue: mean |e| + 2 mean e^2 +
0.5 mean |gradient of e| + 0.5 (mean |c| + 2 mean c^2) + 2 (mean |e_2| + mean |e_4|) +
top |e_4| + 1e-7 KL, where e_k is e averaged over k x k pixels and top the mean of the largest
hundredth in each picture. The averages keep an eye of four pixels and lose the grain of fur, which
is most of the error and which no latents can hold, and the largest of them are such eyes: without
them there were none. It is taken on whole pictures: group norm's statistics and the attention in
the middle are not those of a crop. The first steps see the pictures at half size, which takes a
quarter of the time. At the end a whitening of each channel is folded into ``quant_conv`` and
``post_quant_conv``, so that latents have mean 0 and standard deviation 1 and ``scaling_factor`` is
1. Then the whole is trained on at full size with Muon, and whitened again. The decoder can be
trained on alone after that; latents stay what they are.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocket.data import Renders, background, compose, psnr, sheet, to_bytes
from pocket.fast import autocast, fast
from pocket.tools import say
from pocket.training import Training, load_state, save_state

CHANNELS = (32, 32, 64, 96)
LATENT_CHANNELS = 8
SIZE, FACTOR = 128, 8
POSTERIOR_STD = 0.02  # of latents with standard deviation 1
HALF_SIZE = 1500  # steps at half size
REFRESH = 250  # steps between two looks for new renders
SHOWN, JUDGED = 20, 80  # held-out pictures in a sheet, and in the PSNR


def build(channels=CHANNELS, latent_channels: int = LATENT_CHANNELS, size: int = SIZE) -> Any:
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL  # whose annotations say tuples of one
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=1.0,
    )
    start_as_pyramid(vae)
    return vae


@torch.no_grad()
def start_as_pyramid(vae) -> None:
    """Weights with which the network makes a blurred picture in the right colours at once: three
    channels carry red, green and blue through both networks, averaged over 2 x 2 pixels at each
    level down; residual branches give 0; the posterior is narrow. From random weights colours were
    not learned in 1,300 steps, nothing but brightness was.
    """
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or ".to_out." in name:
            torch.nn.init.zeros_(parameter)
    encoder, decoder = vae.encoder, vae.decoder
    through = [encoder.conv_in, encoder.conv_out, decoder.conv_in, decoder.conv_out]
    through += [vae.quant_conv, vae.post_quant_conv]
    for block in (*encoder.down_blocks, *decoder.up_blocks):
        through += [r.conv_shortcut for r in block.resnets if r.conv_shortcut is not None]
    through += [each.conv for b in decoder.up_blocks for each in b.upsamplers or ()]
    for conv in through:
        _carry(conv, torch.tensor(1.0), conv.kernel_size[0] // 2)
    for block in encoder.down_blocks:
        for each in block.downsamplers or ():
            _carry(each.conv, torch.full((2, 2), 0.25), 0)
    channels = vae.config["latent_channels"]
    vae.quant_conv.weight[channels:] = 0.0
    vae.quant_conv.bias[channels:] = -5.0


def _carry(conv, kernel: torch.Tensor, corner: int) -> None:
    """Let the first three channels pass through a convolution, each under ``kernel`` at
    (``corner``, ``corner``)."""
    kernel = torch.atleast_2d(kernel)
    conv.weight[:3], conv.bias[:3] = 0.0, 0.0
    for k in range(3):
        conv.weight[k, k, corner : corner + len(kernel), corner : corner + len(kernel)] = kernel


def gradients(e: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours, across and down."""
    return (e[..., 1:] - e[..., :-1]).abs().mean() + (e[..., 1:, :] - e[..., :-1, :]).abs().mean()


def distance(made: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """mean |e| + 2 mean e^2 + 0.5 mean |gradient of e| + 0.5 (mean |c| + 2 mean c^2) +
    2 (mean |e_2| + mean |e_4|) + top |e_4| of pictures in -1..1, with c the part of the error e
    that is no grey, e_k its average over k x k pixels, and top the mean of the largest hundredth of
    a picture's values, rounded up."""
    e = made.float() - x
    c = e - e.mean(1, keepdim=True)
    colours = c.abs().mean() + 2 * c.square().mean()
    half, quarter = (nn.functional.avg_pool2d(e, k).abs() for k in (2, 4))
    worst = quarter.flatten(1).topk(-(-quarter[0].numel() // 100)).values
    fine = e.abs().mean() + 2 * e.square().mean() + 0.5 * gradients(e)
    return fine + 0.5 * colours + 2 * (half.mean() + quarter.mean()) + worst.mean()


class Pictures:
    """Batches of training pictures; objects that the network makes worst come a little more often.

    ``errors`` holds a running mean of the absolute error by series, and is part of the training's
    state.
    """

    def __init__(self, renders: Renders, seed: int, batch: int):
        self.renders, self.seed, self.batch = renders, seed, batch
        self.errors: dict[str, float] = {}

    def keys(self) -> list[str]:
        return [f"{s.slug} {s.colour}" for s in self.renders.series]

    def weights(self) -> np.ndarray:
        """By series: Renders.weights() times the error over its mean, within 0.6 and 1.8."""
        errors = np.array([self.errors.get(key, math.nan) for key in self.keys()])
        mean = np.nanmean(errors) if np.isfinite(errors).any() else 1.0
        weights = self.renders.weights() * np.clip(np.nan_to_num(errors / mean, nan=1.8), 0.6, 1.8)
        return weights / weights.sum()

    def draw(self, step: int):
        """(rows, pictures float (N, 3, H, W)) of a step."""
        if step % REFRESH == 0:
            try:
                if self.renders.refresh():
                    say(f"{len(self.renders.training)} pictures of {len(self.renders.series)}")
            except ValueError as error:  # a file that is being written
                say(f"new renders are left alone for now: {error}")
        rng = np.random.default_rng((self.seed, step))
        rows = self.renders.draw(rng, self.batch, self.weights())
        grounds = [background(rng) for _ in rows]
        x = compose(self.renders.rgba(rows), grounds)
        return rows, x.contiguous(memory_format=torch.channels_last)

    def note(self, rows, error: torch.Tensor):
        """Remember how badly these came out; ``error`` (N,)."""
        keys = self.keys()
        values: list[float] = error.tolist()
        for (i, _), value in zip(rows, values, strict=True):
            before = self.errors.get(keys[i], value)
            self.errors[keys[i]] = 0.9 * before + 0.1 * value


def judged(renders: Renders, count: int = JUDGED):
    """A fixed set of held-out pictures, spread over the objects: (rows, pictures)."""
    rows = renders.held_out[:count]
    grounds = [background(np.random.default_rng((7, int(i), int(v)))) for i, v in rows]
    return rows, compose(renders.rgba(rows), grounds)


@torch.no_grad()
def reconstruct(vae, x: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Pictures after encoding to the posterior's mean and decoding."""
    device = next(vae.parameters()).device
    parts = []
    for part in x.split(batch):
        part = part.to(device, memory_format=torch.channels_last)
        parts.append(vae.decode(vae.encode(part).latent_dist.mean).sample.float().cpu())
    return torch.cat(parts)


def look(vae, renders: Renders, name: str, file: Path | None = None) -> float:
    """Say the PSNR of held-out pictures, with the worst objects, write truth and reconstruction of
    twenty to ``file``; returns the mean PSNR in decibels."""
    rows, x = judged(renders)
    made = reconstruct(vae, x)
    values = psnr(made, x)
    order = values.argsort()[:5]
    worst = ", ".join(f"{renders.series[rows[i][0]].slug} {values[i]:.1f}" for i in order.tolist())
    sharp = float(gradients(made.clamp(-1, 1)) / gradients(x))
    say(
        f"{name}: {values.mean():.2f} dB on {len(x)} held-out pictures, gradients {sharp:.3f} of "
        f"the truth's, worst {worst}"
    )
    if file is not None:
        step = max(1, len(x) // SHOWN)
        some = torch.arange(0, len(x), step)[:SHOWN]
        half = -(-len(some) // 2)
        lines = [part for k in some.split(half) for part in (to_bytes(x[k]), to_bytes(made[k]))]
        sheet(lines, file)
    return float(values.mean())


def whiten(vae, pictures: torch.Tensor, batch: int = 50):
    """Fold (z - mean) / std per latent channel into the two 1x1 convolutions around the latents,
    and make the posterior's standard deviation POSTERIOR_STD everywhere.

    The learned deviations do not survive the whitening: a channel that the decoder hardly uses has
    a small spread and a wide posterior, which would be scaled up to many times the spread of the
    means that the UNet is trained on.
    """
    with torch.no_grad():
        z = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(batch)]).double()
        mean, std = z.mean((0, 2, 3)).float(), z.std((0, 2, 3)).float()
        n = len(mean)
        vae.quant_conv.weight[:n] /= std[:, None, None, None]
        vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - mean) / std
        vae.quant_conv.weight[n:] = 0.0
        vae.quant_conv.bias[n:] = 2 * math.log(POSTERIOR_STD)
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]


def train(work: Path, steps: int, seed: int = 0, batch: int = 8, peak: float = 1e-3, device="cpu"):
    """Train to ``work/vae.pt`` (finished) by way of ``work/vae_state.pt`` (resumable)."""
    done = work / "vae.pt"
    if done.exists():
        return
    renders = Renders(work / "renders")
    torch.manual_seed(seed)
    vae = build().to(device)
    pictures = Pictures(renders, seed, batch)

    loss = _loss(vae, pictures, device, HALF_SIZE)
    finished = _fit(work, "vae", vae, vae, pictures, loss, steps, peak, device)
    _finish(done, finished, renders, seed)


def train_on(
    work: Path, steps: int, seed: int = 0, batch: int = 8, peak: float = 1e-3, device="cpu"
):
    """Train encoder and decoder on at full size, from ``work/vae.pt`` to ``work/vae_on.pt``
    (finished) by way of ``work/vae_on_state.pt`` (resumable). Latents change, so that what is
    trained on them has to be trained on, too."""
    done = work / "vae_on.pt"
    if done.exists():
        return
    renders, vae = Renders(work / "renders"), load_vae(work).to(device)
    vae.requires_grad_(True)
    pictures = Pictures(renders, seed + 2, batch)
    loss = _loss(vae, pictures, device)
    finished = _fit(work, "vae_on", vae, vae, pictures, loss, steps, peak, device, muon=True)
    _finish(done, finished, renders, seed)


def _loss(vae, pictures: Pictures, device: str, half_size: int = 0):
    """The loss of a step that trains encoder and decoder; the first ``half_size`` steps see the
    pictures at half size."""

    def loss(step: int) -> torch.Tensor:
        rows, x = pictures.draw(step)
        if step < half_size:
            x = nn.functional.avg_pool2d(x, 2).contiguous(memory_format=torch.channels_last)
        x = x.to(device)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            z = posterior.mean + posterior.std * noise.to(device)
            made = vae.decode(z).sample
        pictures.note(rows, (made.detach().float() - x).abs().mean((1, 2, 3)))
        return distance(made, x) + 1e-7 * posterior.kl().float().mean()

    return loss


def _finish(file: Path, weights: dict[str, torch.Tensor], renders: Renders, seed: int) -> None:
    """Whiten the autoencoder of these weights, look at it and write it to ``file``."""
    vae = build().eval()
    vae.load_state_dict(weights)
    rng = np.random.default_rng((seed, 1))
    rows = renders.draw(rng, 1000)
    whiten(vae, compose(renders.rgba(rows), [background(rng) for _ in rows]))
    look(vae, renders, f"{file.stem}, whitened, in float32")
    save_state(file, model=vae.state_dict())


def _fit(
    work: Path, name: str, trained: nn.Module, vae, pictures: Pictures, loss, steps: int,
    peak: float, device: str, muon: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Train ``trained``, which is ``vae`` or parts of it, by way of ``work/<name>_state.pt``;
    returns its averaged weights."""

    def watch(step):
        with autocast(device):
            file = work / "sheets" / f"{name}-{step:06d}.png"
            look(vae, pictures.renders, f"{name} at {step}", file)

    with fast(vae, device):
        training = Training(
            work / f"{name}_state.pt", trained, loss, steps, peak=peak, weight_decay=1e-4,
            extra=pictures.errors, name=name, muon=muon,
        )  # fmt: skip
        training.run(watch, watch_s=240)
    with training.averaged():
        # copies: when the block ends, the parameters get back the weights that they had before it
        state = trained.state_dict().items()
        return {k: v.to("cpu", copy=True).contiguous() for k, v in state}


def load_vae(work: Path):
    """The finished autoencoder: that of ``vae_on.pt``, else of ``vae.pt``, with the decoder of
    ``decoder.pt`` if that has been trained on."""
    vae = build().eval().requires_grad_(False)
    vae.load_state_dict(_trained(work))
    if (work / "decoder.pt").exists():
        vae.load_state_dict(load_state(work / "decoder.pt")["model"], strict=False)
    return vae


def _trained(work: Path) -> dict[str, torch.Tensor]:
    """The weights of encoder and decoder as they were trained together."""
    files = [file for name in ("vae_on.pt", "vae.pt") if (file := work / name).exists()]
    if not files:
        raise ValueError(f"{work} has no autoencoder yet: run the stage vae first")
    return load_state(files[0])["model"]


def encoder_digest(vae) -> str:
    """A digest of the weights that latents depend on."""
    digest = hashlib.sha256()
    for module in (vae.encoder, vae.quant_conv):
        for key, value in sorted(module.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def train_decoder(
    work: Path, steps: int, seed: int = 0, batch: int = 8, peak: float = 7e-4, device="cpu"
):
    """Train the decoder on, the encoder fixed, to ``work/decoder.pt`` by way of
    ``work/decoder_state.pt``; more steps than before continue it."""
    weights = _trained(work)
    renders = Renders(work / "renders")
    vae = build().to(device)
    vae.load_state_dict(weights)
    vae.requires_grad_(False)
    trained = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    trained.requires_grad_(True)
    pictures = Pictures(renders, seed + 1, batch)

    def loss(step):
        rows, x = pictures.draw(step)
        x = x.to(device)
        with autocast(device):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step))
            made = vae.decode(z + POSTERIOR_STD * noise.to(device)).sample
        pictures.note(rows, (made.detach().float() - x).abs().mean((1, 2, 3)))
        return distance(made, x)

    finished = _fit(work, "decoder", trained, vae, pictures, loss, steps, peak, device)
    save_state(work / "decoder.pt", model=finished)
    look(load_vae(work), renders, "decoder, in float32")
