"""The text encoder, the encoder of cameras and the UNet, trained together on cached latents.

Loss: mean |v' - v|^2 with v = sqrt(abar) eps - sqrt(1 - abar) z (v-prediction, Salimans and Ho,
arXiv 2202.00512): unlike the noise loss it does not vanish at high noise, where object, colour and
view are decided, and four fifths of the timesteps are drawn there. Captions are empty with
probability 0.1 for classifier-free guidance; the rows of the camera, appended to those of the text,
are absent from a quarter of the batches, so that the UNet works with words only as well. The
weights saved are an exponential moving average.
"""

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn

from pocket.autoencoder import LATENT_CHANNELS, load_vae
from pocket.fast import autocast, fast
from pocket.folders import finish, save_stable_diffusion
from pocket.latents import LENGTH, WORDS, Batch, Latents, tokenizer, vocabulary
from pocket.tokenizer import text_config
from pocket.tools import CameraTokens
from pocket.training import Training, build_scheduler, load_state
from pocket.watching import watch_model

WIDTH = 128
CHANNELS = (64, 128, 192)
HIGH, HIGH_SHARE = 300, 0.8  # of the timesteps, the share that is drawn from 300..999
NAME = "unet"
BATCH = 48
PLAIN: dict[str, Any] = {"attn_implementation": "eager"}  # fused attention is slower on a CPU
M = TypeVar("M", bound=nn.Module)


def build_text_encoder(tokens, width: int = WIDTH, layers: int = 2):
    from transformers import CLIPTextModel

    return CLIPTextModel(text_config(tokens, LENGTH, width, layers, **PLAIN))


def build_unet(channels=CHANNELS, width: int = WIDTH, size: int = 16, **more: Any):
    from diffusers import UNet2DConditionModel

    levels = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels + ("UpBlock2D",),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
        **more,
    )


class Trained(nn.Module):
    """What :func:`train` asks of a model beside its prediction."""

    def begin(self, work: Path) -> None:
        """Before the first step of a training."""

    def drawn(self, latents: Latents, seed: int, step: int, count: int) -> Batch:
        """What a step is trained on."""
        return latents.draw(seed, step, count)

    def watch(self, latents: Latents, work: Path, name: str, file: str) -> None:
        """Look at how far the training is."""
        watch_model(self, latents, work, name, file)


class Model(Trained):
    """What is trained together; ``forward`` gives the prediction for noisy latents."""

    more: ClassVar[dict[str, Any]] = {}  # fields of the UNet

    def __init__(self, tokens, channels=CHANNELS, width: int = WIDTH, size: int = 16):
        super().__init__()
        self.text_encoder = build_text_encoder(tokens, width)
        self.camera_encoder = CameraTokens(width=width)
        self.unet = build_unet(channels, width, size, **self.more)
        self.scheduler = build_scheduler()

    def forward(self, noisy, t, ids, cameras=None):
        """v of (N, C, h, w); ``cameras`` (N, 4) appends their rows to the text's."""
        rows = self.text_encoder(ids)[0]
        if cameras is not None:
            rows = torch.cat([rows, self.camera_encoder(cameras).to(rows.dtype)], dim=1)
        return self.unet(noisy, t, rows).sample

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    def times(self, rng, batch: int) -> torch.Tensor:
        """Timesteps of a training step, evenly spread over 300..999 (four fifths) and 0..299."""
        u = (np.arange(batch) + rng.uniform(size=batch)) / batch
        low = u / (1 - HIGH_SHARE) * HIGH
        high = HIGH + (u - (1 - HIGH_SHARE)) / HIGH_SHARE * (1000 - HIGH)
        return torch.from_numpy(np.where(u < 1 - HIGH_SHARE, low, high).astype(int).clip(0, 999))

    def noised(self, z, noise, t):
        """(noisy latents, what the network should predict)."""
        schedule = self.scheduler
        return schedule.add_noise(z, noise, t), schedule.get_velocity(z, noise, t)

    def bins(self) -> list[tuple[str, torch.Tensor]]:
        """Five ranges of time by name, for the table of errors: (name, their middle)."""
        return [(f"t {low}-{low + 199}", torch.tensor([low + 100])) for low in range(0, 1000, 200)]

    @torch.no_grad()
    def sample(self, ids, cameras, scale: float, seed: int, steps: int = 25) -> torch.Tensor:
        """Latents of DDIM's ``steps`` steps. ``ids`` (2N, LENGTH): N empty captions and N others,
        and ``scale`` is the guidance from these to those; the cameras (N, 4) go with both."""
        from diffusers import DDIMScheduler

        schedule: Any = DDIMScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
        schedule.set_timesteps(steps)
        x = first_noise(self.unet, len(ids) // 2, seed)
        for t in schedule.timesteps:
            made = guided(self, x, t.to(x.device), ids, cameras, scale)
            x = schedule.step(made, t, x).prev_sample
        return x


def first_noise(denoiser, count: int, seed: int) -> torch.Tensor:
    """What sampling starts from, (count, C, h, w), on the device of the network."""
    size = denoiser.config["sample_size"]
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, LATENT_CHANNELS, size, size), generator=source)
    return noise.to(next(denoiser.parameters()).device)


def guided(model, x, t, ids, cameras, scale: float) -> torch.Tensor:
    """The prediction of ``model`` for x (N, C, h, w) at ``t``: with the first N captions of
    ``ids`` moved by ``scale`` to that with the others; the cameras (N, 4) go with both."""
    twice = None if cameras is None else torch.cat([cameras, cameras])
    null, said = model(torch.cat([x, x]), t, ids, twice).float().chunk(2)
    return null + scale * (said - null)


def train(
    work: Path,
    steps: int,
    seed: int = 0,
    batch: int = BATCH,
    device: str = "cpu",
    *,
    name: str = NAME,
    kind: type[nn.Module] = Model,
    peak: float = 1e-3,
    watch_s: float = 900,
) -> None:
    """Train a ``kind`` of model on all latents, to ``work/<name>_state.pt``; more steps than before
    continue it. ``peak`` is the rate for a batch of 48, and grows with the root of the batch."""
    torch.manual_seed(seed)
    model: Any = kind(tokenizer(work))
    latents = Latents(work, tokenizer(work))
    if not (work / f"{name}_state.pt").exists():
        model.begin(work)
    model.to(device)

    def loss(step):
        drawn = model.drawn(latents, seed, step, batch)
        t = model.times(drawn.rng, len(drawn.z))
        noisy, target = model.noised(drawn.z, drawn.noise, t)
        noisy = noisy.to(device, memory_format=torch.channels_last)
        cameras = None if drawn.cameras is None else drawn.cameras.to(device)
        with autocast(device):
            made = model(noisy, t.to(device), drawn.ids.to(device), cameras)
        return (made.float() - target.to(device)).square().mean()

    def watch(step):
        with autocast(device):
            model.watch(latents, work, f"{name} at {step}", f"{name}-{step:06d}")

    with fast(model.denoiser, device):
        training = Training(
            work / f"{name}_state.pt", model, loss, steps,
            peak=peak * (batch / BATCH) ** 0.5, warm=300, name=name, weight_decay=1e-2, muon=True,
        )  # fmt: skip
        training.run(watch, watch_s=watch_s, say_every=200)


def load_averaged(work: Path, name: str, model: M) -> M:
    """``model`` with the averaged weights of the state on disk, of a finished training or not."""
    file = work / f"{name}_state.pt"
    if not file.exists():
        raise ValueError(f"{work} has no {file.name} yet: run the stage {name} first")
    state = load_state(file)
    model.load_state_dict(state["model"])
    if "average" in state:  # else weights that came from another machine, averaged there
        average = state["average"]["shadow_params"]
        for parameter, value in zip(model.parameters(), average, strict=True):
            parameter.data.copy_(value)
    return model.eval()


def save_pipeline(work: Path, folder: Path):
    """Write the averaged weights as a ``StableDiffusionPipeline`` folder in half precision, with
    the encoder of cameras, which stock diffusers leaves alone, and ``vocabulary.json``."""
    model = load_averaged(work, NAME, Model(tokenizer(work)))
    save_stable_diffusion(
        folder,
        vae=load_vae(work),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer(work),
        unet=model.unet,
        scheduler=model.scheduler,
    )
    finish_folder(folder, model.camera_encoder)


def finish_folder(folder: Path, camera_encoder: CameraTokens) -> None:
    """What the folder of a pipeline of the pocket world needs besides what diffusers writes."""
    finish(folder, WORDS, LENGTH, vocabulary())
    camera_encoder.save(folder)
