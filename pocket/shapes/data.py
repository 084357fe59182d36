"""Pictures and captions of the world of shapes.

``sample(rng)`` draws one object, camera, light and background and renders it; ``make`` renders a
data set with all cores; captions use threestudio's view suffixes (side / front / back / overhead
view, thresholds 45, 45 and 60 degrees).
"""

import multiprocessing
import re
from dataclasses import dataclass, replace

import numpy as np

from pocket.shapes.raycast import render
from pocket.shapes.scenes import COLOR_NAMES, COLORS, KINDS, Scene
from pocket.views import TEMPLATES, VIEWS, view_of  # noqa: F401

SIZE = 64


def caption(rng, kind: int, color: int, view: int, template: str | None = None) -> str:
    """A caption; ``color`` and ``view`` are -1 to leave the word out."""
    words = KINDS[kind].name if color < 0 else f"{COLOR_NAMES[color]} {KINDS[kind].name}"
    article = "an" if words[0] in "aeio" else "a"
    template = template or TEMPLATES[rng.integers(len(TEMPLATES))]
    text = template.format(f"{article} {words}")
    return text if view < 0 else f"{text}, {VIEWS[view]} view"


def asked(prompt: str) -> tuple[int, int]:
    """(kind, color) that a prompt names, as indices; -1 for no colour. Capitals do not matter, as
    to the tokenizer.

    Raises ``ValueError`` for a prompt that does not name exactly one kind, or several colours, or
    one for a kind that has no choice of them.
    """
    text = prompt.lower()
    kinds = [i for i, k in enumerate(KINDS) if re.search(rf"\b{k.name}\b", text)]
    if len(kinds) != 1:
        names = ", ".join(k.name for k in KINDS)
        raise ValueError(f"{prompt!r} must name exactly one of: {names}")
    colors = [i for i, name in enumerate(COLOR_NAMES) if re.search(rf"\b{name}\b", text)]
    if len(colors) > 1:
        raise ValueError(f"{prompt!r} must name one colour at most, for the whole object")
    if colors and KINDS[kinds[0]].natural is None:
        raise ValueError(f"{prompt!r}: a {KINDS[kinds[0]].name} comes in its own colours only")
    return kinds[0], colors[0] if colors else -1


def _vary(rng, color, amount=0.04):
    return np.clip(np.asarray(color) + rng.uniform(-amount, amount, 3), 0.0, 1.0)


def _background(rng):
    u = rng.uniform()
    if u < 0.64:
        flat = np.full(3, rng.uniform(0.96, 1.0))
    elif u < 0.74:
        flat = np.full(3, rng.uniform(0.3, 0.9))
    elif u < 0.80:
        flat = np.full(3, rng.uniform(0.0, 0.08))
    else:
        flat = 1 - rng.uniform(0.05, 0.45) * rng.uniform(0, 1, 3)
    if u > 0.94:
        return np.stack([flat * rng.uniform(0.7, 1.0), flat])
    return np.stack([flat, flat])


@dataclass
class Camera:
    elevation: float
    azimuth: float
    fovy: float
    fill: float
    shift: np.ndarray


def sample_camera(rng, view: int) -> Camera:
    """A camera whose ``view_of`` is ``view``; ``fill`` is the part of the half frame that a unit
    ball takes."""
    elevation = rng.uniform(62, 88) if view == 3 else rng.uniform(-10, 45)
    low, high = {0: (45, 135), 1: (-45, 45), 2: (135, 225), 3: (-180, 180)}[view]
    azimuth = rng.uniform(low, high) * (rng.choice((-1, 1)) if view == 0 else 1)
    return Camera(
        elevation,
        azimuth,
        rng.uniform(30, 60),
        rng.uniform(0.68, 0.95),
        rng.uniform(-0.07, 0.07, 3),
    )


def build(rng, kind: int, color: int) -> Scene:
    """The scene of a kind; ``color`` indexes COLORS."""
    scene = Scene()
    KINDS[kind].build(scene, rng, _vary(rng, COLORS[COLOR_NAMES[color]]))
    return scene


def draw(rng, scene: Scene, camera: Camera, sky=None, light=None, size: int = SIZE):
    """Render one picture: uint8 (size, size, 3) and opacity float (size, size)."""
    e, a = np.radians([camera.elevation, camera.azimuth])
    back = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    rotation = np.stack([right, np.cross(back, right), back], axis=1)
    tan_half = np.tan(np.radians(camera.fovy) / 2)
    origin = back / (camera.fill * np.sin(np.radians(camera.fovy) / 2)) + camera.shift
    if light is None:
        direction = rotation @ np.array(
            [rng.uniform(-0.8, 0.8), rng.uniform(0.1, 1.0), rng.uniform(0.5, 1.0)]
        )
        ambient = rng.uniform(0.5, 0.7)
        light = np.concatenate([direction / np.linalg.norm(direction), [ambient, 1.08 - ambient]])
    sky = _background(rng) if sky is None else sky
    rgb, opacity = render(*scene.arrays(), origin, rotation, tan_half, size, 2, light, sky)
    return (rgb * 255 + 0.5).astype(np.uint8), opacity


def sample(rng):
    """One training picture and its labels ``(kind, true color, named color, view)``; the named
    colour is -1 where a caption should not name one."""
    kind = int(rng.integers(len(KINDS)))
    view = int(rng.choice(4, p=(0.34, 0.27, 0.27, 0.12)))
    color = named = -1
    if KINDS[kind].natural is not None:
        color = int(rng.integers(len(COLORS)))
        named = color
        if rng.uniform() < 0.2:
            named = -1
            color = COLOR_NAMES.index(KINDS[kind].natural) if rng.uniform() < 0.7 else color
    picture, opacity = draw(rng, build(rng, kind, max(color, 0)), sample_camera(rng, view))
    return picture, (opacity * 255).astype(np.uint8), (kind, color, named, view)


def turn(rng):
    """One object that has a front, seen from the front, the side and the back under the same
    light, sky and elevation: images (3, 64, 64, 3), masks (3, 64, 64), labels (3, 4)."""
    kind = int(rng.choice([i for i, k in enumerate(KINDS) if k.front]))
    color = int(rng.integers(len(COLORS))) if KINDS[kind].natural else -1
    scene, camera, sky = build(rng, kind, max(color, 0)), sample_camera(rng, 1), _background(rng)
    front, light_seed = camera.azimuth, rng.integers(1 << 31)
    parts = []
    for view, azimuth in ((1, front), (0, front + 90 * rng.choice((-1, 1))), (2, front + 180)):
        seen = replace(camera, azimuth=azimuth)
        picture, opacity = draw(np.random.default_rng(light_seed), scene, seen, sky)
        parts.append((picture, (opacity * 255).astype(np.uint8), (kind, color, color, view)))
    return tuple(np.array(part) for part in zip(*parts, strict=True))


def _work(task):
    seed, count, one = task
    rng = np.random.default_rng(seed)
    pictures, masks, labels = zip(*(one(rng) for _ in range(count)), strict=True)
    return np.stack(pictures), np.stack(masks), np.array(labels, np.int8)


def make(count: int, seed: int, workers: int = 2, chunk: int = 250, one=sample):
    """``count`` draws of ``one``: images uint8 (N, 64, 64, 3), masks uint8 (N, 64, 64), labels
    int8 (N, 4); with ``turn`` each has an axis of three views after N. The result depends on
    (count, seed) only, not on the number of workers."""
    tasks = [((seed, k), min(chunk, count - k * chunk), one) for k in range(-(-count // chunk))]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_work, tasks, chunksize=1)
    return tuple(np.concatenate([p[i] for p in parts]) for i in range(3))
