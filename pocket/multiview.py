"""The model ``pocket-views``: the UNet of the same latents and captions, trained on to see four
views of an object at once, as MVDream's does (Shi et al., arXiv 2308.16512).

The weights that it begins with are those of the stage unet. Attention of a view to itself becomes
attention to all four, and a camera is told by its pose alone, by an MLP whose last layer begins as
zero. Captions have no words for the view. The four views of a step are renders of one object whose
cameras are nearest to a first one's, turned by 90, 180 and 270 degrees; so they are not exactly
that far apart, and each is told its true pose. All four have one timestep.
"""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from pocket import diffusion
from pocket.autoencoder import load_vae
from pocket.data import COLOURED, psnr, sheet, to_bytes
from pocket.folders import finish, save_stable_diffusion
from pocket.latents import EMPTY, LENGTH, REFRESH, WORDS, Batch, Latents, tokenizer, vocabulary
from pocket.tools import MULTI_VIEW, Cameras, JointViews, join_views, say, whole_file
from pocket.watching import SCALE, STEPS, decode

NAME, PEAK = "views", 3e-4  # of the state's file, and of the rate
VIEWS = 4
SIZE_COUNTS = 100.0  # degrees for which a factor e in an object's size in the picture counts
SHOWN = 10  # objects of a sheet


class PlainViews(JointViews):
    """Computed in the plain way, whose backward pass is faster on a CPU in bfloat16."""

    def attend(self, q, k, v):
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return weights.to(v.dtype) @ v


def quadruples(cameras: np.ndarray, views: np.ndarray) -> np.ndarray:
    """For each of ``views`` (N,), indices into ``cameras`` (V, 4): itself and those of
    ``views`` that are nearest to its camera turned by 90, 180 and 270 degrees; (N, 4).

    Near is sqrt(dE^2 + (cos E dA)^2 + (100 d log S)^2), with elevation E and azimuth A in degrees
    and S = 1 / (distance tan(fovy / 2)), the size of an object in the picture.
    """
    elevation, azimuth, distance, fovy = cameras[views].astype(float).T
    size = SIZE_COUNTS * np.log(distance * np.tan(np.radians(fovy) / 2))
    flat = np.cos(np.radians(elevation))
    found = [views]
    for turn in (90, 180, 270):
        apart = (azimuth[None] - azimuth[:, None] - turn + 180) % 360 - 180
        away = (elevation[None] - elevation[:, None]) ** 2 + (flat[:, None] * apart) ** 2
        found.append(views[(away + (size[None] - size[:, None]) ** 2).argmin(1)])
    return np.stack(found, 1)


class Model(diffusion.Model):
    """What is trained together; rows are the four views of an object, then those of the next."""

    more: ClassVar[dict] = {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 16,
    }

    def __init__(self, tokens, **shape):
        super().__init__(tokens, **shape)
        del self.camera_encoder  # a camera is no row of the text here
        embedding: Any = self.unet.class_embedding
        nn.init.zeros_(embedding.linear_2.weight)
        nn.init.zeros_(embedding.linear_2.bias)
        join_views(self.unet, VIEWS, PlainViews)
        self._quadruples: dict[int, np.ndarray] = {}

    def begin(self, work: Path) -> None:
        """Take the averaged weights of the stage unet."""
        base = self.base(work)
        own = self.state_dict()
        own.update({k: v for k, v in base.state_dict().items() if k in own})
        self.load_state_dict(own)

    def base(self, work: Path) -> nn.Module:
        """The model of the stage unet."""
        model = diffusion.Model(tokenizer(work))
        return diffusion.load_averaged(work, diffusion.NAME, model)

    def forward(self, noisy, t, ids, cameras=None):
        """v of (N, C, h, w); without ``cameras`` (N, 4) their numbers are 0."""
        poses = noisy.new_zeros(len(noisy), 16)
        if cameras is not None:
            poses = Cameras(*cameras[:, :3].unbind(-1)).poses().to(poses)
        return self.unet(noisy, t, self.text_encoder(ids)[0], class_labels=poses).sample

    def times(self, rng, batch: int) -> torch.Tensor:
        """One timestep for the views of an object, drawn as for the UNet."""
        return super().times(rng, batch // VIEWS).repeat_interleave(VIEWS)

    def drawn(self, latents: Latents, seed: int, step: int, count: int) -> Batch:
        """``count`` / 4 objects (one at least) by their weights, of each four views."""
        if step % REFRESH == 0:
            latents.refresh()
            self._quadruples.clear()
        rng = np.random.default_rng((seed, 2, step))
        rows, texts, grounds = [], [], []
        objects = max(1, count // VIEWS)
        for i in rng.choice(len(latents.series), size=objects, p=latents.weights):
            if i not in self._quadruples:
                self._quadruples[i] = quadruples(latents.cameras[i], latents.views[i])
            views = rng.choice(self._quadruples[i])
            rows += [(i, v) for v in views]
            said = latents.text(rng, rows[-1], view=False)
            texts += ["" if rng.uniform() < EMPTY else said] * VIEWS
            grounds += [int(rng.uniform() < COLOURED)] * VIEWS
        z = latents.z(rows, np.array(grounds))
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(z.shape, generator=source)
        return Batch(z, latents.ids(texts), latents.cameras_of(rows), rng, noise)

    def watch(self, latents: Latents, work: Path, name: str, file: str) -> None:
        """Say the PSNR of samples to the true views, of each object from a held-out view and those
        around it, and write a sheet: truth above samples."""
        device = next(self.parameters()).device
        rows, rng = [], np.random.default_rng(6)
        firsts = {i: v for i, v in latents.held_out[::-1]}  # the first held-out view of each series
        for i in sorted(firsts)[:: max(1, len(firsts) // SHOWN)][:SHOWN]:
            views = np.append(latents.views[i], firsts[i])
            rows += [(i, v) for v in quadruples(latents.cameras[i], views)[-1]]
        texts = [latents.text(rng, row, False, "{}") for row in rows]
        ids = latents.ids([""] * len(rows) + texts).to(device)
        made = self.sample(ids, latents.cameras_of(rows).to(device), SCALE, seed=6, steps=STEPS)
        vae = load_vae(work).to(device)
        truth = decode(vae, latents.z(rows).to(device))
        pictures = decode(vae, made)
        values = psnr(pictures, truth)
        worst = latents.series[rows[int(values.argmin())][0]]
        say(f"{name}: views {values.mean():.2f} dB, worst {'-'.join(worst)} {values.min():.1f}")
        lines = [
            to_bytes(part[k : k + 2 * VIEWS])
            for k in range(0, len(rows), 2 * VIEWS)
            for part in (truth, pictures)
        ]
        sheet(lines, work / "sheets" / f"{file}.png")


def save_pipeline(work: Path, folder: Path):
    """Write the averaged weights as a folder in half precision that the multi-view family of the
    library loads, with ``vocabulary.json``."""
    tokens = tokenizer(work)
    model = diffusion.load_averaged(work, NAME, Model(tokens))
    save_stable_diffusion(
        folder,
        vae=load_vae(work),
        text_encoder=model.text_encoder,
        tokenizer=tokens,
        unet=model.unet,
        scheduler=model.scheduler,
    )
    finish(folder, WORDS, LENGTH, vocabulary())
    mark(folder)


def mark(folder: Path) -> None:
    """Say in the config of the UNet that it sees four views."""
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text()) | {"_class_name": MULTI_VIEW[0], "num_frames": VIEWS}
    with whole_file(file) as tmp:
        tmp.write_text(json.dumps(config, indent=2) + "\n")
