"""The text encoder and the UNet of ``pocket-shapes``, trained together on cached latents.

Loss: mean |v' - v|^2 with v = sqrt(abar) eps - sqrt(1 - abar) x0 (v-prediction, Salimans and Ho,
arXiv 2202.00512): unlike the noise loss it does not vanish at high noise, where class, colour and
view are decided, so these are learned early. Captions are dropped with probability 0.1 for
classifier-free guidance; the weights saved are an exponential moving average.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocket.folders import finish, save_stable_diffusion
from pocket.shapes.autoencoder import build as build_vae
from pocket.shapes.data import TEMPLATES, VIEWS, caption
from pocket.shapes.scenes import COLOR_NAMES, KIND_NAMES
from pocket.tokenizer import save_tokenizer, text_config
from pocket.tools import say, whole_file
from pocket.training import build_scheduler, cosine, save_state, to_tensor

LENGTH, WIDTH = 16, 96
EVERY = 500  # steps between two states on disk
WORDS = tuple(
    dict.fromkeys(
        " ".join(
            [t.format("a an the of") for t in TEMPLATES]
            + [*COLOR_NAMES, *KIND_NAMES, *VIEWS, "view ,"]
        )
        .lower()
        .split()
    )
)


def vocabulary() -> dict[str, list[str]]:
    """What the model knows, for ``vocabulary.json``: the names of objects, colours and views, and
    all other words of its captions."""
    named = {"objects": [*KIND_NAMES], "colors": [*COLOR_NAMES], "views": [*VIEWS]}
    said = {word for names in named.values() for name in names for word in name.split()}
    return {**named, "other words": [w for w in WORDS if w not in said and w.isalnum()]}


def build_models(tokenizer):
    """The text encoder and the UNet, with random weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel(text_config(tokenizer, LENGTH, WIDTH, layers=2))
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return text_encoder, unet


class Captions:
    """Draws captions for labels and tokenises them, each distinct text once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def ids(self, text: str):
        if text not in self.known:
            self.known[text] = self.tokenizer(
                text, padding="max_length", max_length=LENGTH, truncation=True
            ).input_ids
        return self.known[text]

    def draw(self, rng, labels, unsaid: float = 0.13):
        """Token ids of a caption for each label; it leaves the view out with probability
        ``unsaid`` and is empty with probability 0.1."""
        texts = []
        for kind, _, named, view in labels:
            u = rng.uniform()
            view = -1 if u > 1 - unsaid else int(view)
            texts.append("" if u < 0.1 else caption(rng, int(kind), int(named), view))
        return torch.tensor([self.ids(t) for t in texts])


def encode_all(work: Path, pictures="train.npz", name="latents.pt") -> torch.Tensor:
    """Posterior means of the training pictures, float16 (N, 4, 16, 16), cached on disk."""
    file = work / name
    if not file.exists():
        vae: Any = load_vae(work)
        images = np.load(work / pictures)["images"]
        with torch.no_grad():
            parts = [
                vae.encode(to_tensor(images[i : i + 100])).latent_dist.mean.half()
                for i in range(0, len(images), 100)
            ]
        with whole_file(file) as tmp:
            torch.save(torch.cat(parts), tmp)
    return torch.load(file, weights_only=True)


def load_vae(work: Path):
    vae = build_vae().eval().requires_grad_(False)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["model"])
    return vae


def fit(state_file, name, models, draw, steps, rates, warm=200, decay=0.998):
    """Train (text encoder, UNet) on ``draw(step) -> (x, noise, t, ids)`` to ``state_file``.

    The cosine's peaks are ``rates``, one a model. Resumable; finished when the file's step equals
    ``steps``.
    """
    text_encoder, unet = models
    unet.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    ema = {k: v.clone() for k, v in models.state_dict().items()}
    groups = [{"params": list(m.parameters())} for m in models]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    scheduler = build_scheduler()
    start, running = 0, None
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        ema, start = state["ema"], state["step"]
        models.load_state_dict(state["model"])
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])
    for step in range(start, steps):
        x, noise, t, ids = draw(step)
        noisy = scheduler.add_noise(x, noise, t)
        target = scheduler.get_velocity(x, noise, t)
        loss = (unet(noisy, t, text_encoder(ids)[0]).sample - target).square().mean()
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = cosine(step, steps, peak, warm=warm)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        keep = min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, v in models.state_dict().items():
                if v.is_floating_point():
                    ema[k].lerp_(v, 1 - keep)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            say(f"{name} {step + 1}/{steps} loss {running:.4f}")
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            save_state(
                state_file,
                model=models.state_dict(),
                ema=ema,
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )


def stratified(rng, batch: int, low: int = 0) -> torch.Tensor:
    """Timesteps that cover [low, 1000) evenly in each batch, so that the loss is less noisy."""
    u = (np.arange(batch) + rng.uniform(size=batch)) / batch
    return torch.from_numpy((low + u * (1000 - low)).astype(int))


def train(work: Path, steps: int, seed: int = 0, batch: int = 32, peak: float = 1.2e-3):
    """Train both models on all pictures, to ``work/unet_state.pt``."""
    latents = encode_all(work)
    labels = np.load(work / "train.npz")["labels"]
    tokenizer = save_tokenizer(work / "tokenizer", WORDS, LENGTH)
    captions = Captions(tokenizer)

    def draw(step):
        rng = np.random.default_rng((seed, 1, step))
        noise_source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pick = rng.integers(len(latents), size=batch)
        x = latents[pick].float().contiguous(memory_format=torch.channels_last)
        noise = torch.randn(x.shape, generator=noise_source)
        t = stratified(rng, batch)
        return x, noise, t, captions.draw(rng, labels[pick])

    torch.manual_seed(seed)
    models = torch.nn.ModuleList(build_models(tokenizer))
    fit(work / "unet_state.pt", "unet", models, draw, steps, (peak, peak))


def save_pipeline(work: Path, folder: Path):
    """Write the averaged weights as a ``StableDiffusionPipeline`` folder in half precision."""
    tokenizer = save_tokenizer(work / "tokenizer", WORDS, LENGTH)
    models = torch.nn.ModuleList(build_models(tokenizer))
    models.load_state_dict(torch.load(work / "views_state.pt", weights_only=True)["ema"])
    save_stable_diffusion(
        folder,
        vae=load_vae(work),
        text_encoder=models[0].eval(),
        tokenizer=tokenizer,
        unet=models[1].eval(),
        scheduler=build_scheduler(),
    )
    finish(folder, WORDS, LENGTH, vocabulary())
