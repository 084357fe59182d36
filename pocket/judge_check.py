"""How far the judge can be trusted: what it says of held-out views, and of the same views spoilt.

``python -m pocket.judge_check --work FOLDER`` writes ``pocket/results/judge.csv``: the shares of
right answers for objects, colours (of objects that come in colours), views and azimuths (within 45
degrees; of objects with a front).

    as they are        before white, and before any background
    blurred            by a Gaussian of so many pixels (pictures have 128)
    noise              of this standard deviation (values are 0..1)
    half-transparent   of this opacity, before white
    mirrored           left and right exchanged: the azimuths it sees should change their sign
    another colour     painted pictures, judged by the colour of the next paint: near 0
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from pocket.data import Renders, background
from pocket.judge import COLOURS, PALETTE, accuracies, labels_of, load, pictures, verdict
from pocket.tools import say, write_table

OUT = Path(__file__).parent / "results" / "judge.csv"
BLURS, NOISES, OPACITIES = (1.0, 2.0, 3.0, 4.0), (0.05, 0.1, 0.2), (0.75, 0.5)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).clamp(0, 1)


def faded(images: torch.Tensor, opacity: float) -> torch.Tensor:
    return 1 + opacity * (images - 1)


def next_colour(labels: dict) -> dict:
    """The labels, with each paint's place taken by the next one's."""
    order = [PALETTE.index(colour) for colour in COLOURS]
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return {**labels, "colour": np.array([following.get(c, c) for c in labels["colour"]])}


def check(judge, renders: Renders, count: int) -> list[dict]:
    """The table's rows, over ``count`` held-out views spread over all."""
    some = np.linspace(0, len(renders.held_out) - 1, min(count, len(renders.held_out)))
    rows = renders.held_out[some.astype(int)]
    rgba, labels = renders.rgba(rows), labels_of(renders, rows)
    plain = pictures(rgba)
    rng = np.random.default_rng(3)
    grounds = np.array([background(rng) for _ in rows], np.float32)[:, :, None, None]
    any_ground = torch.cat([pictures(r[None], g) for r, g in zip(rgba, grounds, strict=True)])
    tests = [("as they are", "white", plain, labels), ("as they are", "any", any_ground, labels)]
    for name, spoil, levels in (
        ("blurred", blurred, BLURS),
        ("noise", noisy, NOISES),
        ("half-transparent", faded, OPACITIES),
    ):
        tests += [(name, f"{level:g}", spoil(plain, level), labels) for level in levels]
    turned = {**labels, "azimuth": -labels["azimuth"]}
    tests.append(("mirrored", "", plain.flip(-1), turned))
    painted = np.array([bool(renders.series[i].colour) for i, _ in rows])
    if painted.any():
        only = {k: v[painted] for k, v in labels.items()}
        tests.append(("another colour", "", plain[torch.from_numpy(painted)], next_colour(only)))
    table = []
    for name, level, images, truth in tests:
        found = accuracies(verdict(judge, images), truth)
        shares = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
        table.append({"test": name, "level": level, **shares})
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.judge_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default="build/pocket", help="has the renders")
    parser.add_argument("--count", type=int, default=1000, help="held-out views")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    if args.count < 1:
        parser.error("--count must be at least 1")
    try:
        table = check(load(), Renders(args.work / "renders"), args.count)
        write_table(args.out, table)
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    for row in table:
        say(*row.values())


if __name__ == "__main__":
    main()
