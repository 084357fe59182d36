"""The last phase of the training of ``pocket-shapes``: view words.

Front and back of an object have the same silhouette, so the loss of the first phase gains little
by telling them apart, and guidance then draws a face on every side. Here half of each batch is one
object seen from the front, the side and the back under the *same* noise and timestep: what the
three losses have in common cancels in the gradient, and what is left is the view word. The other
half is the first phase's, so that nothing is forgotten.
"""

from pathlib import Path

import numpy as np
import torch

from pocket.shapes.data import make, turn
from pocket.shapes.diffusion import (
    LENGTH,
    WORDS,
    Captions,
    build_models,
    encode_all,
    fit,
    stratified,
)
from pocket.tokenizer import save_tokenizer
from pocket.tools import whole_file


def pictures(work: Path, count: int, seed: int, workers: int):
    """Render ``count`` objects from three sides to ``work/turns.npz``, flattened."""
    file = work / "turns.npz"
    if not file.exists():
        images, _, labels = make(count, seed, workers=workers, one=turn)
        images, labels = images.reshape(-1, *images.shape[2:]), labels.reshape(-1, 4)
        with whole_file(file) as tmp, tmp.open("wb") as stream:
            np.savez(stream, images=images, labels=labels)


def train(
    work: Path,
    steps: int,
    count: int,
    seed: int = 0,
    workers: int = 2,
    plain: int = 16,
    turns: int = 5,
    rates=(1.2e-3, 6e-4),
    lowest: int = 200,
):
    """Train on from the average of ``work/unet_state.pt`` to ``work/views_state.pt``.

    Each batch has ``plain`` pictures of the first phase and ``turns`` objects from three sides,
    these at timesteps from ``lowest`` (below it only details are decided).
    """
    pictures(work, count, seed + 50_000, workers)
    latents, labels = encode_all(work), np.load(work / "train.npz")["labels"]
    turned = encode_all(work, "turns.npz", "turns_latents.pt").unflatten(0, (-1, 3))
    turned_labels = np.load(work / "turns.npz")["labels"].reshape(-1, 3, 4)
    tokenizer = save_tokenizer(work / "tokenizer", WORDS, LENGTH)
    captions = Captions(tokenizer)

    def draw(step):
        rng = np.random.default_rng((seed, 2, step))
        source = torch.Generator().manual_seed(seed * 1_000_003 + step + 500_000)
        pick, who = rng.integers(len(latents), size=plain), rng.integers(len(turned), size=turns)
        x = torch.cat([latents[pick], turned[who].flatten(0, 1)]).float()
        noise = torch.randn(plain + turns, *x.shape[1:], generator=source)
        noise = torch.cat([noise[:plain], noise[plain:].repeat_interleave(3, 0)])
        t = torch.cat(
            [stratified(rng, plain), stratified(rng, turns, lowest).repeat_interleave(3, 0)]
        )
        ids = torch.cat(
            [
                captions.draw(rng, labels[pick]),
                captions.draw(rng, turned_labels[who].reshape(-1, 4), unsaid=0.0),
            ]
        )
        return x.contiguous(memory_format=torch.channels_last), noise, t, ids

    torch.manual_seed(seed)
    models = torch.nn.ModuleList(build_models(tokenizer))
    models.load_state_dict(torch.load(work / "unet_state.pt", weights_only=True)["ema"])
    fit(work / "views_state.pt", "views", models, draw, steps, rates, warm=100)
