"""The text encoder, the encoder of cameras and the UNet, trained together on cached latents.

Loss: mean |v' - v|^2 with v = sqrt(abar) eps - sqrt(1 - abar) z (v-prediction, Salimans and Ho,
arXiv 2202.00512): unlike the noise loss it does not vanish at high noise, where object, colour and
view are decided, and four fifths of the timesteps are drawn there. Captions are empty with
probability 0.1 for classifier-free guidance; the rows of the camera, appended to those of the text,
are absent from a quarter of the batches, so that the UNet works with words only as well. The
weights saved are an exponential moving average.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pocket.autoencoder import LATENT_CHANNELS, load_vae
from pocket.fast import autocast, fast
from pocket.latents import LENGTH, WORDS, Latents, tokenizer, vocabulary
from pocket.portable import make_portable
from pocket.tokenizer import save_tokenizer
from pocket.tools import CameraTokens, whole_file
from pocket.training import Training, build_scheduler, load_state
from pocket.watching import watch_model

WIDTH = 128
CHANNELS = (64, 128, 192)
HIGH, HIGH_SHARE = 300, 0.8  # of the timesteps, the share that is drawn from 300..999
NAME = "unet"
BATCH = 48


def build_text_encoder(tokens, width: int = WIDTH, layers: int = 2):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        projection_dim=width,
        attn_implementation="eager",  # fused attention is slower on a CPU
    )
    return CLIPTextModel(config)


def build_unet(channels=CHANNELS, width: int = WIDTH, size: int = 16):
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
    )


class Model(nn.Module):
    """What is trained together; ``forward`` gives the prediction for noisy latents."""

    def __init__(self, tokens, channels=CHANNELS, width: int = WIDTH, size: int = 16):
        super().__init__()
        self.text_encoder = build_text_encoder(tokens, width)
        self.camera_encoder = CameraTokens(width=width)
        self.unet = build_unet(channels, width, size)
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

        schedule = DDIMScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
        schedule.set_timesteps(steps)
        device = next(self.parameters()).device
        size = self.unet.config["sample_size"]
        shape = len(ids) // 2, LATENT_CHANNELS, size, size
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        twice = None if cameras is None else torch.cat([cameras, cameras])
        for t in schedule.timesteps:
            both = torch.cat([x, x])
            null, said = self(both, t.to(device), ids, twice).float().chunk(2)
            x = schedule.step(null + scale * (said - null), t, x).prev_sample
        return x


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
    model = kind(tokenizer(work))
    latents = Latents(work, tokenizer(work))
    model.to(device)

    def loss(step):
        drawn = latents.draw(seed, step, batch)
        t = model.times(drawn.rng, batch)
        noisy, target = model.noised(drawn.z, drawn.noise, t)
        noisy = noisy.to(device, memory_format=torch.channels_last)
        cameras = None if drawn.cameras is None else drawn.cameras.to(device)
        with autocast(device):
            made = model(noisy, t.to(device), drawn.ids.to(device), cameras)
        return (made.float() - target.to(device)).square().mean()

    def watch(step):
        with autocast(device):
            watch_model(model, latents, work, f"{name} at {step}", f"{name}-{step:06d}")

    with fast(model.denoiser, device):
        training = Training(
            work / f"{name}_state.pt", model, loss, steps,
            peak=peak * (batch / BATCH) ** 0.5, warm=300, name=name, weight_decay=1e-2,
        )  # fmt: skip
        training.run(watch, watch_s=watch_s, say_every=200)


def load_averaged(work: Path, name: str, model: nn.Module) -> nn.Module:
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
    from diffusers import StableDiffusionPipeline

    model = load_averaged(work, NAME, Model(tokenizer(work)))
    pipeline = StableDiffusionPipeline(
        vae=load_vae(work),
        text_encoder=model.text_encoder,
        tokenizer=tokenizer(work),
        unet=model.unet,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    finish_folder(folder, model.camera_encoder)


def finish_folder(folder: Path, camera_encoder: CameraTokens):
    """What a pipeline's folder needs besides what diffusers writes."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):  # which safetensors writes for the owner alone
        file.chmod(0o666 & ~mask)
    for config in folder.glob("text_encoder*/config.json"):
        # transformers goes by this where diffusers goes by its own default, float32: they must
        # agree
        text = config.read_text().replace('"dtype": "float16"', '"dtype": "float32"')
        config.write_text(text)
    for part in folder.glob("tokenizer*"):  # also what older transformers read
        save_tokenizer(part, WORDS, LENGTH)
    make_portable(folder)
    camera_encoder.save(folder)
    with whole_file(folder / "vocabulary.json") as tmp:
        tmp.write_text(json.dumps(vocabulary(), indent=1) + "\n")
