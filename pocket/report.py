"""What a model of the pocket world makes of views that no training saw: tables and a sheet.

``python -m pocket.report --model FOLDER --work FOLDER`` writes to ``pocket/results/<name>/``, with
the name of the model's folder,

    vae.csv        PSNR and sharpness of the autoencoder's reconstructions, by object
    accuracy.csv   what the judge says of true views (the ceiling), of their reconstructions and of
                   the model's samples: object, colour, view, azimuth
    samples.csv    samples against the true view of the same camera, by object: object accuracy,
                   PSNR, SSIM, sharpness
    noise.csv      error of the predicted noise by time, under the right, the empty and a wrong
                   caption, and with the camera (or view word) of the opposite side
    nearest.csv    distance to the nearest training picture of the same object
    samples.webp   the true views, and below them the samples

A model is told of cameras in each of the ways that ``--cameras`` lists. Sharpness is the mean
length of the pictures' gradients over that of the true views' (:mod:`pocket.sharpness`).
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from pocket.data import EVERY, Renders, psnr, sheet, to_bytes
from pocket.judge import (
    FRONTS,
    SLUGS,
    WEIGHTS,
    accuracies,
    labels_of,
    load,
    pictures,
    verdict,
)
from pocket.sharpness import gradients
from pocket.tools import Cameras, load_model, say, write_table
from pocket.world import NAMES, VIEWS, caption, view_of

RESULTS = Path(__file__).parent / "results"
TOLD = ("tokens", "words", "both")
ASKED = ("tokens", "words")  # of these, the ways that are reported
TEMPLATE = "a DSLR image of {}"
BATCH = 40
SMALL = 32  # pixels of a side, at which the nearest training picture is looked for
SHOWN = 100  # views in the sheet
OPPOSITE = {"front": "back", "back": "front"}

Pictures = Float[torch.Tensor, "N 3 H W"]  # in 0..1


def chosen(renders: Renders, rounds: int) -> np.ndarray:
    """Held-out rows (series, view): each object ``rounds`` times, its colours in turn, and other
    views for each object. Raises ``ValueError`` where an object is not rendered."""
    held = {i: renders.held_out[renders.held_out[:, 0] == i, 1] for i in range(len(renders.series))}
    rows = []
    for k, slug in enumerate(SLUGS):
        mine = [i for i, s in enumerate(renders.series) if s.slug == slug and len(held[i])]
        if not mine:
            raise ValueError(f"{renders.folder} has too few views of {slug}: render it first")
        mine.sort(key=lambda i: renders.series[i].colour)
        for r in range(rounds):
            views = held[mine[r % len(mine)]]
            rows.append((mine[r % len(mine)], views[(k + 5 * r) % len(views)]))
    return np.array(rows)


def texts_of(
    renders: Renders, rows, told: str, names: Callable[[str], str] = str, turned: bool = False
) -> list[str]:
    """The captions of rows: colours are named where they are not the object's own, views unless
    cameras are told as tokens alone; ``turned`` names the view from the opposite side. ``names``
    may exchange the object, which then goes without a colour."""
    texts = []
    for (i, _), (elevation, azimuth) in zip(rows, renders.cameras(rows)[:, :2], strict=True):
        series = renders.series[i]
        name = NAMES[SLUGS.index(series.slug)]
        colour = (series.colour or None) if names(name) == name else None
        view = view_of(elevation, azimuth)
        if turned:
            view = VIEWS.index(OPPOSITE.get(VIEWS[view], VIEWS[view]))
        said = -1 if told == "tokens" else view
        texts.append(caption(None, names(name), colour, said, TEMPLATE))
    return texts


def cameras_of(renders: Renders, rows, turned: bool = False) -> Cameras:
    """The cameras of rows, or those on the opposite side."""
    elevation, azimuth, distance, fovy = torch.from_numpy(renders.cameras(rows)).float().T
    if turned:
        azimuth = torch.remainder(azimuth + 360, 360) - 180
    return Cameras(elevation, azimuth, distance, fovy=fovy)


def _part(cameras: Cameras, where: slice) -> Cameras:
    return Cameras(**{k: v[where] for k, v in vars(cameras).items() if v is not None})


@torch.no_grad()
def generate(
    model,
    texts: list[str],
    cameras: Cameras,
    scale: float,
    steps: int,
    seed: int,
    batch: int = BATCH,
) -> Pictures:
    """One sample for each text and camera, by DDIM (eta 0) over the model's own schedule:

    x_s = alpha_s x0 + sigma_s eps,  x0 = (x_t - sigma_t eps) / alpha_t,

    with eps guided against the empty text by ``scale`` and t falling in ``steps`` even parts from
    the last timestep; for a flow model this is Euler's method.
    """
    total = model.schedule.steps
    times = (total * (1 - torch.arange(steps) / steps)).round().long() - 1
    null = model.text([""])
    done = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        said = model.text(texts[part])
        n = len(said)
        both = torch.cat([null.expand_as(said), said])
        twice = _part(cameras, part).repeat(2)
        generator = torch.Generator().manual_seed(seed * 1000 + start)
        x = torch.randn((n, *model.latent_shape), generator=generator).to(model.device)
        for k, t in enumerate(times):
            now = t.expand(2 * n).to(model.device)
            empty, right = model.predict(torch.cat([x, x]), now, both, twice).chunk(2)
            eps = empty + scale * (right - empty)
            alpha, sigma = (a.view(-1, 1, 1, 1) for a in model.schedule.alpha_sigma(now[:n]))
            x = (x - sigma * eps) / alpha
            if k + 1 < steps:
                later = times[k + 1].expand(n).to(model.device)
                alpha, sigma = (a.view(-1, 1, 1, 1) for a in model.schedule.alpha_sigma(later))
                x = alpha * x + sigma * eps
        done.append(model.decode(x).float().cpu())
    return torch.cat(done)


@torch.no_grad()
def reconstructions(model, images: Pictures, batch: int = BATCH) -> Pictures:
    parts = [model.decode(model.encode(p.to(model.device))).cpu() for p in images.split(batch)]
    return torch.cat(parts)


def steepness(made: Pictures, truth: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Mean lengths of the gradients of each picture and of its truth: means of the first over those
    of the second are a sharpness."""
    both = (gradients(images.permute(0, 2, 3, 1)).mean((1, 2)).numpy() for images in (made, truth))
    return next(both), next(both)


def ssim(made: Pictures, truth: Pictures) -> np.ndarray:
    """Structural similarity of each pair of pictures (Wang et al. 2004, Gaussian window)."""
    from skimage.metrics import structural_similarity

    return np.array(
        [
            structural_similarity(
                a, b, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
                use_sample_covariance=False,
            )
            for a, b in zip(made.numpy(), truth.numpy(), strict=True)
        ]
    )  # fmt: skip


def decibels(made: Pictures, truth: Pictures) -> np.ndarray:
    """PSNR of each picture."""
    return psnr(2 * made - 1, 2 * truth - 1).numpy()


def by_object(
    objects: np.ndarray, **columns: np.ndarray | tuple[np.ndarray, np.ndarray]
) -> list[dict]:
    """Rows with the mean of each column by object, and over all of them ("all"); a column that is a
    pair is the first's mean over the second's."""
    rows = []
    for name, where in [
        *((NAMES[k], objects == k) for k in np.unique(objects)),
        ("all", np.ones(len(objects), bool)),
    ]:
        row: dict = {"object": name, "n": int(where.sum())}
        for key, values in columns.items():
            if isinstance(values, tuple):
                value = values[0][where].mean() / (values[1][where].mean() or np.nan)
            else:
                value = values[where].mean()
            row[key] = round(float(value), 3)
        rows.append(row)
    return rows


def vae_table(model, renders: Renders, count: int) -> list[dict]:
    """Reconstructions of ``count`` held-out views, spread over all."""
    some = np.linspace(0, len(renders.held_out) - 1, min(count, len(renders.held_out)))
    rows = renders.held_out[some.astype(int)]
    truth = pictures(renders.rgba(rows))
    made = reconstructions(model, truth)
    return by_object(
        labels_of(renders, rows)["object"],
        psnr=decibels(made, truth),
        sharpness=steepness(made, truth),
    )


def judged(judge, source: str, images: Pictures, labels, **more) -> dict:
    """A row of accuracy.csv."""
    found = accuracies(verdict(judge, images), labels)
    shares = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    return {"source": source, **shares, "guidance": "", "steps": "", **more}


def sample_rows(judge, told: str, made: Pictures, truth: Pictures, labels) -> list[dict]:
    """Rows of samples.csv."""
    objects = labels["object"]
    rows = by_object(
        objects,
        accuracy=(verdict(judge, made)["object"] == objects).astype(float),
        psnr=decibels(made, truth),
        ssim=ssim(made, truth),
        sharpness=steepness(made, truth),
    )
    return [{"told": told, **row} for row in rows]


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over the pictures, and its standard error; no numbers of less than two."""
    d = a - b
    if len(d) < 2:
        return np.nan, np.nan
    return round(float(d.mean()), 6), round(float(d.std(ddof=1) / np.sqrt(len(d))), 6)


@torch.no_grad()
def noise_rows(model, renders: Renders, rows, told: str, bins: int = 10) -> list[dict]:
    """Rows of noise.csv: mean squared errors of the predicted noise for the same views, noise and
    timesteps, so that the differences are paired. A wrong caption names another object in no
    colour. Turned is the opposite side, of objects that have a front; the word for it, if the model
    is told words, so that only front and back views count then."""
    rng = np.random.default_rng(9003)
    labels = labels_of(renders, rows)
    away = 1 + rng.integers(len(NAMES) - 1, size=len(NAMES))
    other = {name: NAMES[(k + away[k]) % len(NAMES)] for k, name in enumerate(NAMES)}
    right, behind = (cameras_of(renders, rows, turned) for turned in (False, True))
    told_what = {
        "right": (texts_of(renders, rows, told), right),
        "empty": ([""] * len(rows), right),
        "wrong": (texts_of(renders, rows, told, other.__getitem__), right),
        "turned": (texts_of(renders, rows, told, turned=True), behind),
    }
    embedded = {k: (model.text(texts), cameras) for k, (texts, cameras) in told_what.items()}
    images = pictures(renders.rgba(rows)).to(model.device)
    z = torch.cat([model.encode(part) for part in images.split(BATCH)])
    generator = torch.Generator().manual_seed(9004)
    total, table = model.schedule.steps, []
    front = FRONTS[labels["object"]]
    if told != "tokens":
        front &= np.isin(labels["view"], [VIEWS.index(view) for view in OPPOSITE])
    for b in range(bins):
        low, high = b * total // bins, (b + 1) * total // bins
        t = torch.from_numpy(rng.integers(low, high, len(rows))).to(model.device)
        eps = torch.randn(z.shape, generator=generator).to(model.device)
        noisy = model.add_noise(z, eps, t)
        errors = {}
        for name, (said, cameras) in embedded.items():
            parts = []
            for start in range(0, len(rows), BATCH):
                part = slice(start, start + BATCH)
                made = model.predict(noisy[part], t[part], said[part], _part(cameras, part))
                parts.append((made - eps[part]).square().mean((1, 2, 3)).cpu())
            errors[name] = torch.cat(parts).double().numpy()
        row = {"told": told, "t_low": low, "t_high": high, "n": len(rows)}
        row |= {name: round(float(e.mean()), 6) for name, e in errors.items()}
        row["turned"] = round(float(errors["turned"][front].mean()), 6) if front.any() else np.nan
        for name, a, c, where in (
            ("empty_minus_right", "empty", "right", slice(None)),
            ("wrong_minus_empty", "wrong", "empty", slice(None)),
            ("turned_minus_right", "turned", "right", front),
        ):
            row[name], row[f"{name}_se"] = _difference(errors[a][where], errors[c][where])
        table.append(row)
    return table


def _small(images: Pictures) -> torch.Tensor:
    return F.interpolate(images, (SMALL, SMALL), mode="area").flatten(1)


def nearest(renders: Renders, images: Pictures, objects: np.ndarray) -> np.ndarray:
    """Root mean square distance, at 32 pixels, of each picture to the nearest training view of the
    same object in any colour."""
    best = np.full(len(images), np.inf)
    small = _small(images)
    for series in renders.series:
        mine = np.flatnonzero(objects == SLUGS.index(series.slug))
        views = [v for v in range(len(series.cameras)) if v % EVERY != EVERY - 1]
        if len(mine) and views:
            bank = _small(pictures(series.rgba[views]))
            found = torch.cdist(small[mine], bank).min(1).values / bank.shape[1] ** 0.5
            best[mine] = np.minimum(best[mine], found.numpy())
    return best


def write(folder: Path, name: str, rows: list[dict], told: Iterable[dict] | None = None) -> None:
    write_table(folder / name, rows)
    for row in rows if told is None else told:
        say(name, *(f"{k} {v}" for k, v in row.items() if v != ""))


def report(
    folder: Path, work: Path, out: Path, told: Sequence[str] = ASKED, scale: float = 2.0,
    steps: int = 30, rounds: int = 6, count: int = 120, model_of: Callable = load_model,
    judge_file: Path = WEIGHTS,
) -> None:  # fmt: skip
    """All tables of the model in ``folder``, from the renders under ``work``: samples of ``steps``
    steps with guidance ``scale``, ``rounds`` of each object, and errors of noise for ``count``
    views."""
    renders, judge = Renders(work / "renders"), load(judge_file)
    rows = chosen(renders, rounds)
    labels, truth = labels_of(renders, rows), pictures(renders.rgba(rows))
    some = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    model = model_of(str(folder), "cpu", cameras=told[0])
    table = vae_table(model, renders, 4 * count)
    write(out, "vae.csv", table, table[-1:])
    accuracy = [
        judged(judge, "true views", truth, labels),
        judged(judge, "reconstructions", reconstructions(model, truth), labels),
    ]
    samples, noise, shown = [], [], [truth]
    for way in told:
        model = model if way == told[0] else model_of(str(folder), "cpu", cameras=way)
        texts, cameras = texts_of(renders, rows, way), cameras_of(renders, rows)
        made = generate(model, texts, cameras, scale, steps, seed=1)
        shown.append(made)
        row = judged(judge, f"samples, {way}", made, labels, guidance=scale, steps=steps)
        accuracy.append(row)
        samples += sample_rows(judge, way, made, truth, labels)
        noise += noise_rows(model, renders, some, way)
    write(out, "accuracy.csv", accuracy)
    write(out, "samples.csv", samples, [row for row in samples if row["object"] == "all"])
    write(out, "noise.csv", noise)
    rms_of_all = nearest(renders, torch.cat(shown), np.tile(labels["object"], len(shown)))
    sources = ["true views", *(f"samples, {way}" for way in told)]
    near = zip(sources, np.split(rms_of_all, len(shown)), strict=True)
    write(
        out,
        "nearest.csv",
        [
            {"source": source, "n": len(rms)}
            | {k: round(float(f(rms)), 4) for k, f in (("least", np.min), ("median", np.median))}
            for source, rms in near
        ],
    )
    places = np.random.default_rng(0).permutation(len(rows))[:SHOWN]
    lines = []
    for part in np.array_split(np.sort(places), max(1, len(places) // 20)):
        lines += [to_bytes(2 * each[part] - 1) for each in shown]
    sheet(lines, out / "samples.webp")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default="custom/threestudio-lods/lods/models/pocket")
    parser.add_argument("--work", type=Path, default="build/pocket", help="has the renders")
    parser.add_argument("--out", type=Path, help="by default pocket/results/ and the model's name")
    parser.add_argument("--cameras", nargs="+", choices=TOLD, default=ASKED)
    parser.add_argument("--scale", type=float, default=2.0, help="of the guidance in samples")
    parser.add_argument("--steps", type=_positive, default=30)
    parser.add_argument("--rounds", type=_positive, default=6, help="samples of each object")
    parser.add_argument("--count", type=_positive, default=120, help="views in noise.csv")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / args.model.resolve().name
    told = list(dict.fromkeys(args.cameras))
    try:
        report(args.model, args.work, out, told, args.scale, args.steps, args.rounds, args.count)
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    main()
