"""The renders as latents, and the captions and cameras that go with them.

Each view is encoded once before a white background and once before another, to
``latents/<slug>.npy`` or ``latents/<slug>-<colour>.npy``: float16 (V, 2, C, h, w).
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pocket.autoencoder import encoder_digest, load_vae
from pocket.data import COLOURED, EVERY, Renders, Series, coloured, compose, white
from pocket.fast import autocast, fast
from pocket.tokenizer import save_tokenizer
from pocket.tools import say, whole_file
from pocket.world import COLOURS, OBJECTS, TEMPLATES, VIEWS, caption, view_of

LENGTH = 16  # tokens of a caption
NAMES = {o.slug: o.name for o in OBJECTS}
# How often a caption leaves the view word out, with camera rows (which say more) and without; as
# rows are absent from a quarter of the batches, a third of all captions do.
UNSAID = {True: 0.4, False: 0.15}
EMPTY = 0.1  # of the captions
NO_ROWS = 0.25  # of the batches have no camera rows
REFRESH = 500  # steps between two looks for new latents
WORDS = tuple(
    dict.fromkeys(
        " ".join(
            [t.format("a an the of") for t in TEMPLATES]
            + [*COLOURS, *NAMES.values(), *VIEWS, "view ,"]
        )
        .lower()
        .split()
    )
)


def vocabulary() -> dict[str, list[str]]:
    """What a model knows, for ``vocabulary.json``: the names of objects, colours and views, the
    objects that come in these colours, and all other words of its captions."""
    named = {"objects": [*NAMES.values()], "colors": [*COLOURS], "views": [*VIEWS]}
    said = {word for names in named.values() for name in names for word in name.split()}
    painted = [thing.name for thing in OBJECTS if thing.colours]
    others = [w for w in WORDS if w not in said and w.isalnum()]
    return {**named, "colored objects": painted, "other words": others}


def key_of(series: Series) -> str:
    return f"{series.slug}-{series.colour}" if series.colour else series.slug


def grounds(key: str, view: int) -> list[np.ndarray]:
    """The two backgrounds of a view, white and another; the same for all time."""
    rng = np.random.default_rng((11, zlib.crc32(key.encode()), view))
    return [white(rng), coloured(rng)]


def encode_all(work: Path, device: str = "cpu", most: int | None = None, batch: int = 4) -> None:
    """Encode the views under ``work/renders`` that have no latents yet, object by object, of each
    the first ``most``. Latents of another autoencoder, and of pictures that were rendered anew, are
    replaced. The ``batch`` views before both backgrounds are few enough for a CPU's caches: 64
    pictures at once take almost three times as long each."""
    renders, vae = Renders(work / "renders"), load_vae(work)
    index_file = work / "latents" / "made_with.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    digest = encoder_digest(vae)
    made = 0
    with fast(vae, device), torch.inference_mode():
        for series in renders.series:
            key = key_of(series)
            file = work / "latents" / f"{key}.npy"
            mark = f"{digest} {zlib.crc32(np.ascontiguousarray(series.rgba[0]).tobytes()):08x}"
            parts = [np.load(file)] if file.exists() and index.get(key) == mark else []
            have = sum(map(len, parts))
            wanted = len(series.rgba) if most is None else min(most, len(series.rgba))
            if have >= wanted:
                continue
            for start in range(have, wanted, batch):
                views = range(start, min(start + batch, wanted))
                behind = np.array([grounds(key, v) for v in views])
                rgba = series.rgba[views.start : views.stop]
                both = [compose(rgba, behind[:, k]) for k in (0, 1)]
                x = torch.cat(both).to(device, memory_format=torch.channels_last)
                with autocast(device):
                    z = vae.encode(x).latent_dist.mean.half().cpu().numpy()
                parts.append(np.stack([z[: len(views)], z[len(views) :]], axis=1))
            with whole_file(file) as tmp:
                np.save(tmp, np.concatenate(parts))
            index[key] = mark
            with whole_file(index_file) as tmp:
                tmp.write_text(json.dumps(index, indent=1))
            made += wanted - have
    say(f"{made} views encoded of {sum(len(s.rgba) for s in renders.series)} that there are")


class Batch(NamedTuple):
    """What a network is trained on in one step."""

    z: torch.Tensor  # latents, float (N, C, h, w)
    ids: torch.Tensor  # tokens of captions, (N, LENGTH)
    cameras: torch.Tensor | None  # (N, 4), or None for no camera rows
    rng: np.random.Generator  # for what else the step draws
    noise: torch.Tensor  # standard normal, like z


class Latents:
    """All latents under a work folder, with what captions need to know.

    ``training`` and ``held_out`` list (index into ``series``, view); held-out ones by view.
    """

    def __init__(self, work: Path, tokenizer):
        self.folder, self.tokenizer = Path(work), tokenizer
        self.known: dict[str, list[int]] = {}
        self.refresh()
        if not self.series:
            raise ValueError(f"{work} has no latents yet: run the stage latents first")

    def refresh(self) -> None:
        """Read again what is there."""
        self.series: list[tuple[str, str]] = []
        self.latents, self.cameras = [], []
        slugs = sorted(NAMES, key=len, reverse=True)
        files = (self.folder / "latents").glob("*.npy")
        for file in sorted(files, key=lambda f: f.stem):
            slug = next((s for s in slugs if file.stem == s or file.stem.startswith(s + "-")), None)
            if slug is None:
                continue  # an object that the world has no more
            z = np.load(file)
            cameras = np.load(self.folder / "renders" / slug / "cameras.npy")
            count = min(len(z), len(cameras))
            self.series.append((slug, file.stem[len(slug) + 1 :]))
            self.latents.append(z[:count])
            self.cameras.append(cameras[:count])
        counts = [np.arange(len(z)) for z in self.latents]
        self.views = [v[v % EVERY != EVERY - 1] for v in counts]
        held = [(i, v) for i, vs in enumerate(counts) for v in vs if v % EVERY == EVERY - 1]
        self.held_out = np.array(sorted(held, key=lambda row: row[1]), int).reshape(-1, 2)
        slugs = [slug for slug, _ in self.series]
        weights = np.array([slugs.count(slug) ** -0.9 for slug in slugs])
        self.weights = weights / weights.sum()

    def ids(self, texts: list[str]) -> torch.Tensor:
        """Tokens of captions, (N, LENGTH); each distinct text is tokenised once."""
        for text in set(texts) - set(self.known):
            self.known[text] = self.tokenizer(
                text, padding="max_length", max_length=LENGTH, truncation=True
            ).input_ids
        return torch.tensor([self.known[text] for text in texts])

    def text(self, rng, row, view: bool, template: str | None = None) -> str:
        """A caption of a row, with or without its view word."""
        slug, colour = self.series[row[0]]
        elevation, azimuth = self.cameras[row[0]][row[1]][:2]
        return caption(
            rng, NAMES[slug], colour or None, view_of(elevation, azimuth) if view else -1, template
        )

    def z(self, rows, ground: int | np.ndarray = 0) -> torch.Tensor:
        """Latents of rows, float (N, C, h, w), before the white background or (1) the other."""
        picked = np.broadcast_to(ground, len(rows))
        parts = [self.latents[i][v, g] for (i, v), g in zip(rows, picked, strict=True)]
        return torch.from_numpy(np.stack(parts)).float()

    def cameras_of(self, rows) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.cameras[i][v] for i, v in rows])).float()

    def draw(self, seed: int, step: int, count: int) -> Batch:
        """The batch of a step: rows by weight, backgrounds white but for a fifth, captions with
        the view word left out or empty at random, cameras or none for the whole batch. New
        latents are taken in every ``REFRESH`` steps."""
        if step % REFRESH == 0:
            self.refresh()
        rng = np.random.default_rng((seed, 1, step))
        with_rows = bool(rng.uniform() >= NO_ROWS)
        which = rng.choice(len(self.series), size=count, p=self.weights)
        rows = [(i, rng.choice(self.views[i])) for i in which]
        z = self.z(rows, (rng.uniform(size=count) < COLOURED).astype(int))
        texts = []
        for row in rows:
            u = rng.uniform()
            said = self.text(rng, row, view=bool(rng.uniform() >= UNSAID[with_rows]))
            texts.append("" if u < EMPTY else said)
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(z.shape, generator=source)
        cameras = self.cameras_of(rows) if with_rows else None
        return Batch(z, self.ids(texts), cameras, rng, noise)


def tokenizer(work: Path):
    return save_tokenizer(work / "tokenizer", WORDS, LENGTH)
