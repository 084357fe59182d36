"""What a prompt of the world of shapes truly looks like: renders of random objects it describes."""

import hashlib
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from pocket.shapes.data import SIZE, Camera, build, draw, sample_camera
from pocket.shapes.judge import WEIGHTS, load, verdict
from pocket.shapes.scenes import COLOR_NAMES, KINDS
from pocket.tools import whole_file

SHAPES = 8  # random objects of the reference, each seen in all test views
FRONTS = 192  # random objects of the reference of latents, each seen once
GROUND = np.ones((2, 3))  # white
HERE = Path(__file__).resolve().parent
KEPT = HERE.parents[1] / "build" / "shapes-truth"


@dataclass(frozen=True)
class Orbit:
    """Test views evenly around the object from azimuth 0: angles in degrees, world units."""

    elevation: float
    distance: float
    fovy: float
    views: int


@dataclass
class Pictures:
    """Views of one object, or of several (``azimuth`` None)."""

    rgb: Float[torch.Tensor, "V 3 H W"]  # 0..1
    opacity: Float[torch.Tensor, "V H W"] | None = None
    azimuth: Float[np.ndarray, " V"] | None = None  # degrees


@dataclass
class Reference:
    """The judge's features of true pictures, and the silhouettes of true shapes (3D only)."""

    features: Float[np.ndarray, "M D"]
    masks: Bool[np.ndarray, "S V H W"] | None


def _object(rng, kind: int, color: int):
    """A random object; one whose colour is not named mostly has its usual one, as in training."""
    natural = KINDS[kind].natural
    if natural and color < 0:
        usual = rng.uniform() < 0.7
        color = COLOR_NAMES.index(natural) if usual else int(rng.integers(len(COLOR_NAMES)))
    return build(rng, kind, max(color, 0))


def around(
    rng, kind: int, color: int, orbit: Orbit
) -> tuple[UInt8[np.ndarray, "V 64 64 3"], Float[np.ndarray, "V 64 64"]]:
    """One random object from all test views: pictures and opacities."""
    scene = _object(rng, kind, color)
    fill = 1 / (orbit.distance * math.sin(math.radians(orbit.fovy) / 2))
    views = [
        draw(rng, scene, Camera(orbit.elevation, a, orbit.fovy, fill, np.zeros(3)), GROUND)
        for a in azimuths(orbit.views)
    ]
    return np.stack([v[0] for v in views]), np.stack([v[1] for v in views])


def azimuths(views: int) -> Float[np.ndarray, " V"]:
    return np.arange(views) * 360.0 / views


def fronts(rng, kind: int, color: int, count: int) -> UInt8[np.ndarray, "V 64 64 3"]:
    """Random objects, each from a random camera whose caption says "front view"."""
    pictures = []
    for _ in range(count):
        thing = _object(rng, kind, color)
        pictures.append(draw(rng, thing, sample_camera(rng, 1), GROUND)[0])
    return np.stack(pictures)


def to_tensor(pictures: UInt8[np.ndarray, "V H W 3"]) -> Float[torch.Tensor, "V 3 H W"]:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def example(kind: int, color: int, orbit: Orbit | None, seed: int, count: int) -> Pictures:
    """True pictures as if they were a run's: ``count`` views of one object, or ``count`` objects
    from the front where there is no orbit. Never one of the reference's."""
    rng = np.random.default_rng((seed, 1, kind, color + 1))
    if orbit is None:
        return Pictures(to_tensor(fronts(rng, kind, color, count)))
    rgb, opacity = around(rng, kind, color, orbit)
    return Pictures(to_tensor(rgb), torch.from_numpy(opacity), azimuths(orbit.views))


def reference(kind: int, color: int, orbit: Orbit | None, folder: Path = KEPT) -> Reference:
    """Features and masks of SHAPES objects in all test views, or the features of FRONTS objects
    from the front; kept in ``folder`` as long as judge, scenes and renderer stay what they are."""
    names = ("data", "judge", "raycast", "scenes")
    sources = (WEIGHTS, *(HERE / f"{name}.py" for name in names))
    digest = hashlib.sha256(repr((kind, color, orbit and astuple(orbit), SHAPES, FRONTS)).encode())
    for file in (*sources, Path(__file__)):
        digest.update(file.read_bytes())
    path = folder / f"{digest.hexdigest()[:24]}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            return Reference(kept["features"], kept["masks"] if orbit else None)
    rng = np.random.default_rng((0, 2, kind, color + 1))
    masks = None
    if orbit is None:
        pictures = fronts(rng, kind, color, FRONTS)
    else:
        drawn = [around(rng, kind, color, orbit) for _ in range(SHAPES)]
        pictures = np.concatenate([rgb for rgb, _ in drawn])
        masks = np.stack([opacity for _, opacity in drawn]) > 0.5
    assert pictures.shape[1:] == (SIZE, SIZE, 3)
    features = verdict(load(), to_tensor(pictures))["features"]
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as tmp, tmp.open("wb") as stream:
        more: dict[str, Any] = {} if masks is None else {"masks": masks}
        np.savez(stream, features=features, **more)
    return Reference(features, masks)
