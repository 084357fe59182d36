"""The renders of the world's objects, read for training.

A folder ``renders/<slug>/`` holds ``cameras.npy`` (float32 (V, 4): elevation, azimuth, distance,
field of view; angles in degrees), ``rgba.npy`` (uint8 (V, H, W, 4), colour times opacity and
opacity) and, for an object that comes in colours, ``rgba-<colour>.npy`` of the first of the same
cameras. One view in 25 is held out: no training sees it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

EVERY = 25  # of the views, one is held out
COLOURED = 0.2  # of the pictures in training, those before another background than white


class Series(NamedTuple):
    """The renders of one object in one colour; ``colour`` is "" for the object as it is."""

    slug: str
    colour: str
    rgba: np.ndarray  # uint8 (V, H, W, 4), read from disk when it is indexed
    cameras: np.ndarray  # float32 (V, 4)


def read(folder: Path) -> list[Series]:
    """All series under ``folder``, by object and colour.

    Raises ``ValueError`` for a file that is no such array.
    """
    found = []
    for cameras_file in sorted(Path(folder).glob("*/cameras.npy")):
        files = {"": cameras_file.with_name("rgba.npy")}
        for file in sorted(cameras_file.parent.glob("rgba-*.npy")):
            files[file.stem.removeprefix("rgba-")] = file
        if not files[""].exists():
            continue  # being rendered
        cameras = _array(cameras_file, np.float32, (4,))
        for colour, file in files.items():
            rgba = _array(file, np.uint8, (None, None, 4), mmap_mode="r")
            count = min(len(rgba), len(cameras))
            if count:
                slug = cameras_file.parent.name
                found.append(Series(slug, colour, rgba[:count], cameras[:count]))
    return found


def _array(file: Path, dtype, tail: tuple, **options) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False, **options)
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as an array: {error}") from None
    fits = array.ndim == len(tail) + 1 and array.dtype == dtype
    if not fits or any(n not in (None, m) for n, m in zip(tail, array.shape[1:], strict=True)):
        raise ValueError(f"{file} holds {array.dtype} {array.shape}: render the object again")
    return array


class Renders:
    """The series under a folder, and which of their views train and which are held out.

    ``training`` and ``held_out`` are integer arrays (N, 2) of (index into ``series``, view); the
    held-out ones are in the order of views, so that the first of them are of all series.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.series: list[Series] = []
        self.refresh()
        if not self.series:
            raise ValueError(f"no renders under {folder}: make them first (--stages render)")

    def refresh(self) -> bool:
        """Read again what is there; whether anything came."""
        before = sum(len(s.cameras) for s in self.series)
        series = read(self.folder)
        rows = [(i, v) for i, s in enumerate(series) for v in range(len(s.cameras))]
        rows = np.array(rows, int).reshape(-1, 2)
        held = rows[:, 1] % EVERY == EVERY - 1
        self.series, self.training = series, rows[~held]
        self.held_out = rows[held][np.argsort(rows[held][:, 1], kind="stable")]
        self.views = [self.training[self.training[:, 0] == i, 1] for i in range(len(series))]
        return len(rows) != before

    def weights(self) -> np.ndarray:
        """How often training draws each series: an object in k colours has k series and is drawn
        sqrt(k) times as often as an object in one."""
        slugs = [s.slug for s in self.series]
        weights = np.array([slugs.count(slug) ** -0.5 for slug in slugs])
        return weights / weights.sum()

    def draw(self, rng, count: int, weights: np.ndarray | None = None) -> np.ndarray:
        """``count`` training rows (series, view)."""
        which = rng.choice(
            len(self.series), size=count, p=self.weights() if weights is None else weights
        )
        return np.array([(i, rng.choice(self.views[i])) for i in which])

    def rgba(self, rows) -> np.ndarray:
        """The pictures of ``rows``, uint8 (N, H, W, 4)."""
        return np.stack([self.series[i].rgba[v] for i, v in rows])

    def cameras(self, rows) -> np.ndarray:
        """The cameras of ``rows``, float32 (N, 4)."""
        return np.stack([self.series[i].cameras[v] for i, v in rows])


def white(rng) -> np.ndarray:
    """A background that passes for white, (3,) in 0.96..1."""
    return np.full(3, rng.uniform(0.96, 1.0))


def coloured(rng) -> np.ndarray:
    """A background that does not: of any colour (half), grey (a quarter) or nearly black."""
    u = rng.uniform()
    if u < 0.5:
        return rng.uniform(0.0, 1.0, 3)
    return np.full(3, rng.uniform(0.2, 0.9) if u < 0.75 else rng.uniform(0.0, 0.08))


def background(rng) -> np.ndarray:
    """A background for training: white, and in a fifth of the draws another."""
    return coloured(rng) if rng.uniform() < COLOURED else white(rng)


def compose(rgba: np.ndarray, grounds) -> torch.Tensor:
    """Pictures before their backgrounds: uint8 (N, H, W, 4) premultiplied, and (N, 3) in 0..1, to
    float (N, 3, H, W) in -1..1."""
    x = torch.from_numpy(np.array(rgba)).permute(0, 3, 1, 2).float().div_(255)
    ground = torch.from_numpy(np.asarray(grounds, np.float32))[:, :, None, None]
    return (x[:, :3] + (1 - x[:, 3:]) * ground).mul_(2).sub_(1)


def to_bytes(pictures: torch.Tensor) -> np.ndarray:
    """float (N, 3, H, W) in -1..1 to uint8 (N, H, W, 3)."""
    x = pictures.float().add(1).mul(127.5).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio of each picture in decibels; (N, 3, H, W) in -1..1, clamped."""
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square().mean((1, 2, 3)) / 4
    return -10 * torch.log10(error.clamp_min(1e-10))


def sheet(rows: list[np.ndarray], file: Path) -> None:
    """Write rows of pictures, uint8 (N, H, W, 3) each, as one PNG, one row below the other."""
    from PIL import Image

    from pocket.tools import whole_file

    height, width = rows[0].shape[1:3]
    page = np.full((height * len(rows), width * max(map(len, rows)), 3), 255, np.uint8)
    for j, row in enumerate(rows):
        for i, picture in enumerate(row):
            page[j * height : (j + 1) * height, i * width : (i + 1) * width] = picture
    with whole_file(file) as tmp:
        Image.fromarray(page).save(tmp)
