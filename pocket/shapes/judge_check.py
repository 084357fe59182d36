"""How far the judge can be trusted: what it says of true renders, and of objects made wrong.

``python -m pocket.shapes.judge_check`` writes ``docs/evaluation/judge.csv``. Every picture is a
render that the judge was not trained on, of known kind, colour and view; the tests change it in
ways in which distilled objects go wrong, and the accuracies compare what the judge says with the
truth of what is shown.

    true renders                 as they are, on the white ground of the tests and on any ground
    another colour               a colourable kind in a colour that was not asked for: how often the
                                 judge sees the colour that is there, and the one that was asked for
    painted in one colour        every part of the object in the colour
    seen from behind             objects with a front, from azimuths where none is to be seen
    front mirrored to the back   a camera behind is shown what it would see from in front
    front on both sides          the object and its copy turned by 180 degrees in one
    blurred                      by a Gaussian of so many pixels (pictures have 64)
    noise                        of this standard deviation (values are 0..1)
    half-transparent             of this opacity, on white
    saturation                   of colours, 0 is grey and 1 as they are
    patches shuffled             squares of so many pixels in random places: colours without shape

``kind_accuracy`` is over all pictures, ``color_accuracy`` over those that have a colour,
``view_accuracy`` over those of kinds with a front; ``front_seen_behind`` is how often the judge
sees the front of such a kind from azimuths beyond 90 degrees, ``frechet`` the distance in judge
features to other true renders of the same labels (for true renders: its floor), and
``commonest_*`` the share of the most frequent answer where the accuracy is counted, which tells
chance from a fixed answer; ``commonest`` names the kind.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

from pocket.frechet import frechet
from pocket.shapes.data import SIZE, build, draw, sample_camera
from pocket.shapes.judge import load, verdict
from pocket.shapes.report import FRONTS, accuracies, balanced_labels
from pocket.shapes.scenes import COLOR_NAMES, COLORS, KIND_NAMES, KINDS, Scene
from pocket.tools import say, write_table

OUT = Path(__file__).resolve().parents[2] / "docs" / "evaluation" / "judge.csv"
SEED, OTHER_SEED = 9301, 9302
WHITE = np.ones((2, 3))
COLUMNS = (
    *("test", "level", "n", "kind_accuracy", "color_accuracy", "view_accuracy"),
    *("front_seen_behind", "frechet", "commonest", "commonest_kind", "commonest_color"),
    "commonest_view",
)
BLURS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
NOISES = (0.05, 0.1, 0.2, 0.4, 0.8)
OPACITIES = (0.75, 0.5, 0.25, 0.1)
SATURATIONS = (0.0, 0.5, 1.5, 2.0, 3.0)
PATCHES = (32, 16, 8, 4)
BEHIND = {"90 to 135 degrees": (90.0, 135.0), "over 135 degrees": (135.0, 180.0)}

Images = Float[np.ndarray, "N 64 64 3"]


@dataclass(frozen=True)
class Shown:
    """What a picture shows; ``color`` is -1 for kinds that have their own, ``azimuth`` is the
    camera's in degrees, or None to draw one of the ``view``."""

    kind: int
    color: int
    view: int
    azimuth: float | None = None


def everything(rounds: int) -> list[Shown]:
    """Every kind in every view, ``rounds`` times, colours in turn."""
    return [Shown(*label) for label in balanced_labels(np.random.default_rng(0), rounds)]


def from_behind(count: int, low: float, high: float) -> list[Shown]:
    """``count`` of every kind with a front, at random azimuths of ``low``..``high`` degrees on
    either side."""
    rng = np.random.default_rng((SEED, int(low)))
    return [
        Shown(
            int(kind),
            k % len(COLOR_NAMES) if KINDS[kind].natural else -1,
            2 if low >= 135 else 0,
            float(rng.uniform(low, high) * rng.choice((-1, 1))),
        )
        for kind in np.flatnonzero(FRONTS)
        for k in range(count)
    ]


def paint(scene: Scene, color) -> Scene:
    """Every part in one colour."""
    return replace(scene, colors=[np.asarray(color, float)] * len(scene.colors))


def both_sides(scene: Scene) -> Scene:
    """The object and its copy turned by 180 degrees about the vertical, in one."""
    turn = np.diag([-1.0, -1.0, 1.0])
    return Scene(
        scene.kinds * 2,
        scene.params * 2,
        scene.centers + [turn @ c for c in scene.centers],
        scene.axes + [turn @ a for a in scene.axes],
        scene.colors * 2,
    )


def pictures(
    shown: list[Shown],
    seed: int = SEED,
    change: Callable[[Scene, Shown], Scene] = lambda scene, _: scene,
    camera_of: Callable[[float], float] = lambda azimuth: azimuth,
    ground: np.ndarray | None = WHITE,
) -> tuple[Images, Float[np.ndarray, " N"]]:
    """Renders in 0..1 and the azimuths they are labelled with. Picture k has the same proportions,
    camera and light under every ``change`` of the object and ``camera_of`` the azimuth, which
    shows what another azimuth sees; a ``ground`` of None is any of the world's."""
    images, azimuths = [], []
    for k, s in enumerate(shown):
        rng = np.random.default_rng((seed, k))
        scene = change(build(rng, s.kind, max(s.color, 0)), s)
        camera = sample_camera(rng, s.view)
        azimuths.append(camera.azimuth if s.azimuth is None else s.azimuth)
        camera = replace(camera, azimuth=camera_of(azimuths[-1]))
        images.append(draw(rng, scene, camera, ground)[0])
    return np.stack(images).astype(np.float32) / 255, np.array(azimuths)


def blurred(images: Images, sigma: float) -> Images:
    return gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")


def noisy(images: Images, sigma: float) -> Images:
    noise = np.random.default_rng(SEED).standard_normal(images.shape, np.float32)
    return (images + np.float32(sigma) * noise).clip(0, 1)


def faded(images: Images, opacity: float) -> Images:
    return 1 + np.float32(opacity) * (images - 1)


def saturated(images: Images, factor: float) -> Images:
    grey = images @ np.array([[0.2126], [0.7152], [0.0722]], np.float32)
    return (grey + np.float32(factor) * (images - grey)).clip(0, 1)


def shuffled(images: Images, patch: int) -> Images:
    """The squares of ``patch`` pixels of each picture in a random order."""
    side = SIZE // patch
    rng = np.random.default_rng(SEED)
    x = images.reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3)
    x = x.reshape(len(images), side * side, patch, patch, 3)
    x = np.stack([picture[rng.permutation(side * side)] for picture in x])
    return x.reshape(-1, side, side, patch, patch, 3).swapaxes(2, 3).reshape(images.shape)


def said_of(judge, images: Images) -> dict[str, np.ndarray]:
    return verdict(judge, torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))


def score(said: dict, shown: list[Shown], azimuths, reference: dict) -> dict:
    """The columns after ``level``; a share of nothing is empty."""
    labels = np.array([(s.kind, s.color, s.view) for s in shown])
    kind, color, view = labels.T
    right = accuracies(said, labels)
    turned = np.abs((np.asarray(azimuths) + 180) % 360 - 180)
    behind = FRONTS[kind] & (view != 3) & (turned > 90)

    def commonest(name, where):
        return np.bincount(said[name][where]).max() / where.sum() if where.any() else None

    row = {
        "n": len(kind),
        "kind_accuracy": right["object"],
        "color_accuracy": right["color"] if right["n_color"] else None,
        "view_accuracy": right["view"] if right["n_view"] else None,
        "front_seen_behind": (said["view"] == 1)[behind].mean() if behind.any() else None,
        "frechet": frechet(said["features"], reference["features"]),
        "commonest": KIND_NAMES[np.bincount(said["kind"]).argmax()],
        "commonest_kind": commonest("kind", kind >= 0),
        "commonest_color": commonest("color", color >= 0),
        "commonest_view": commonest("view", FRONTS[kind]),
    }
    return {
        k: "" if v is None else v if k in ("n", "commonest") else round(float(v), 4)
        for k, v in row.items()
    }


def check(judge, rounds: int, report: Callable[[dict], None] = lambda row: None) -> list[dict]:
    """All tests; ``rounds`` pictures of every kind and view. Each row goes to ``report`` too."""
    rows = []

    def add(test, level, images, shown, azimuths, reference):
        scores = score(said_of(judge, images), shown, azimuths, reference)
        rows.append({"test": test, "level": level, **scores})
        report(rows[-1])

    shown = everything(rounds)
    reference = said_of(judge, pictures(shown, OTHER_SEED)[0])
    images, azimuths = pictures(shown)
    add("true renders", "white ground", images, shown, azimuths, reference)
    add("true renders", "any ground", pictures(shown, ground=None)[0], shown, azimuths, reference)

    asked = [s for s in shown if s.color >= 0]
    # A step of 1 to 7 through the eight colours: every one but the colour that was asked for.
    other = [
        replace(s, color=(s.color + 1 + k % (len(COLOR_NAMES) - 1)) % len(COLOR_NAMES))
        for k, s in enumerate(asked)
    ]
    wrong, around = pictures(other)
    there = said_of(judge, pictures(other, OTHER_SEED)[0])
    add("another colour", "the colour that is there", wrong, other, around, there)
    add("another colour", "the colour asked for", wrong, asked, around, there)

    painted = [replace(s, color=k % len(COLOR_NAMES)) for k, s in enumerate(shown)]
    one, around = pictures(
        painted, change=lambda scene, s: paint(scene, COLORS[COLOR_NAMES[s.color]])
    )
    add("painted in one colour", "", one, painted, around, reference)

    turns: dict[str, dict[str, Any]] = {
        "seen from behind": {},
        "front mirrored to the back": {"camera_of": lambda azimuth: 180 - azimuth},
        "front on both sides": {"change": lambda scene, _: both_sides(scene)},
    }
    for level, (low, high) in BEHIND.items():
        hidden = from_behind(4 * rounds, low, high)
        true = said_of(judge, pictures(hidden, OTHER_SEED)[0])
        for test, options in turns.items():
            made, around = pictures(hidden, **options)
            add(test, level, made, hidden, around, true)

    spoils: Any = (
        ("blurred", blurred, BLURS),
        ("noise", noisy, NOISES),
        ("half-transparent", faded, OPACITIES),
        ("saturation", saturated, SATURATIONS),
        ("patches shuffled", shuffled, PATCHES),
    )
    for test, spoil, levels in spoils:
        for level in levels:
            add(test, f"{level:g}", spoil(images, level), shown, azimuths, reference)
    return rows


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m pocket.shapes.judge_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=6, help="pictures of every kind and view")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rows = check(load(), options.rounds, report=lambda row: say(*row.values()))
    write_table(options.out, rows)


if __name__ == "__main__":
    main()
