"""What the judge says of ``pocket-shapes``: tables as CSV, contact sheets as pictures.

``python -m pocket.shapes.report --model FOLDER`` writes

    pocket/shapes/results/accuracy.csv   object, colour and view accuracy on true renders (the
                                         ceiling), on their VAE reconstructions and on samples
    pocket/shapes/results/noise.csv      held-out noise-prediction error by timestep under the
                                         right, the empty and a wrong caption
    pocket/shapes/results/distance.csv   nearest training picture and feature Frechet distance
    docs/shapes-samples.png              100 samples, docs/shapes-world.png true renders
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pocket.frechet import frechet
from pocket.shapes.data import VIEWS, build, caption, draw, make, sample_camera
from pocket.shapes.judge import load, verdict
from pocket.shapes.scenes import COLOR_NAMES, KINDS
from pocket.tools import say, write_table
from pocket.training import to_tensor

RESULTS = Path(__file__).parent / "results"
FRONTS = np.array([k.front for k in KINDS])
GUIDANCE, STEPS = 5.0, 25


def load_pipeline(folder):
    """The model as a sampler: DPM-Solver++ over the folder's own noise schedule, float32. Raises
    ``ValueError``, one line, if weights of the text encoder are missing."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    # a pipeline would fill in random numbers for weights that are missing
    loaded: Any = CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", output_loading_info=True
    )
    text_encoder, told = loaded
    if lost := sorted(told["missing_keys"]):
        raise ValueError(f"{folder}/text_encoder lacks {len(lost)} tensors, such as {lost[0]}")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, text_encoder=text_encoder, safety_checker=None
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.to(dtype=torch.float32)  # the text encoder would stay in half precision
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, prompts, seed: int, batch: int = 40) -> np.ndarray:
    """Samples as float (N, 64, 64, 3) in 0..1."""
    parts = []
    for i in range(0, len(prompts), batch):
        generator = torch.Generator().manual_seed(seed * 1000 + i)
        parts.append(
            pipeline(
                prompts[i : i + batch],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generator,
                output_type="np",
            ).images
        )
    return np.concatenate(parts)


def balanced_labels(rng, rounds: int):
    """Labels (kind, color, view), every kind in every view ``rounds`` times, colours in turn."""
    labels = []
    for r in range(rounds):
        for kind in range(len(KINDS)):
            for view in range(len(VIEWS)):
                color = (kind + 3 * view + r) % len(COLOR_NAMES) if KINDS[kind].natural else -1
                labels.append((kind, color, view))
    return labels


def accuracies(said: dict, labels) -> dict:
    """Shares of right answers of a `verdict`; labels are (kind, color, view), color -1 for none."""
    kind, color, view = np.array(labels).T
    colored = color >= 0
    # The view is asked of kinds whose front, side and back differ.
    fronted = FRONTS[kind]
    return {
        "object": (said["kind"] == kind).mean(),
        "color": (said["color"] == color)[colored].mean(),
        "view": (said["view"] == view)[fronted].mean(),
        "n": len(kind),
        "n_color": int(colored.sum()),
        "n_view": int(fronted.sum()),
    }


def sheet(images: np.ndarray, columns: int, file: Path):
    """Pictures (N, H, W, 3) uint8 in a grid."""
    rows = [np.concatenate(images[i : i + columns], 1) for i in range(0, len(images), columns)]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(file, optimize=True)


def write_csv(name: str, rows: list[dict]) -> None:
    write_table(RESULTS / name, rows)
    for row in rows:
        say(name, row)


def accuracy_table(pipeline, judge, rounds: int) -> np.ndarray:
    rng = np.random.default_rng(9001)
    labels = balanced_labels(rng, rounds)
    true = np.stack(
        [draw(rng, build(rng, k, max(c, 0)), sample_camera(rng, v))[0] for k, c, v in labels]
    )
    with torch.no_grad():
        x = to_tensor(true)
        coded = [pipeline.vae(x[i : i + 100]).sample for i in range(0, len(x), 100)]
    coded = (torch.cat(coded) / 2 + 0.5).clamp(0, 1)
    prompts = [caption(rng, k, c, v, "a DSLR image of {}") for k, c, v in labels]
    samples = generate(pipeline, prompts, seed=1)
    rows = []
    for source, images in (
        ("true renders", x / 2 + 0.5),
        ("VAE reconstructions", coded),
        ("samples", torch.from_numpy(samples).permute(0, 3, 1, 2)),
    ):
        row = accuracies(verdict(judge, images), labels)
        rows.append({"source": source, **{k: round(float(v), 4) for k, v in row.items()}})
    error = (coded - (x / 2 + 0.5)).square()
    rows[1]["psnr"] = round(float(-10 * torch.log10(error.mean())), 2)
    rows[1]["psnr_center"] = round(float(-10 * torch.log10(error[:, :, 16:48, 16:48].mean())), 2)
    for row in rows:
        row.setdefault("psnr", "")
        row.setdefault("psnr_center", "")
    rows[2]["guidance"], rows[2]["steps"] = GUIDANCE, STEPS
    for row in rows:
        row.setdefault("guidance", "")
        row.setdefault("steps", "")
    write_csv("accuracy.csv", rows)
    shown = (samples * 255 + 0.5).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(shown))[:100]
    sheet(shown[np.sort(order)], 20, Path("docs/shapes-samples.png"))
    sheet(true[: 4 * len(KINDS)], 20, Path("docs/shapes-world.png"))
    return samples


@torch.no_grad()
def noise_table(pipeline, count: int, bins: int = 10):
    """Mean squared error of the predicted noise on held-out renders; the same pictures, noise and
    timesteps under three captions, so that the differences are paired."""
    images, _, labels = make(count, seed=9002)
    latents = pipeline.vae.encode(to_tensor(images)).latent_dist.mean
    rng = np.random.default_rng(9003)
    right = [caption(rng, int(k), int(c), int(v)) for k, _, c, v in labels]
    # Wrong: another kind, no colour, and another view (side for front and the reverse).
    wrong = [
        caption(
            rng, int(k + 1 + rng.integers(len(KINDS) - 1)) % len(KINDS), -1, int((1, 0, 1, 0)[v])
        )
        for k, _, _, v in labels
    ]
    alphas = pipeline.scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(9004)
    errors = {name: np.zeros((bins, count)) for name in ("right", "empty", "wrong")}
    texts = {"right": right, "empty": [""] * count, "wrong": wrong}
    embeddings = {name: pipeline.encode_prompt(t, "cpu", 1, False)[0] for name, t in texts.items()}
    for b in range(bins):
        t = torch.from_numpy(rng.integers(b * 1000 // bins, (b + 1) * 1000 // bins, count))
        a = alphas[t][:, None, None, None]
        noise = torch.randn(latents.shape, generator=generator)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        for name in errors:
            for i in range(0, count, 100):
                s = slice(i, i + 100)
                v = pipeline.unet(noisy[s], t[s], embeddings[name][s]).sample
                predicted = a[s].sqrt() * v + (1 - a[s]).sqrt() * noisy[s]
                errors[name][b, s] = (predicted - noise[s]).square().mean((1, 2, 3))
    rows = []
    for b in range(bins):
        row: dict = {"t_low": b * 1000 // bins, "t_high": (b + 1) * 1000 // bins, "n": count}
        for name in errors:
            row[name] = f"{errors[name][b].mean():.6f}"
        for name, (x, y) in {
            "empty_minus_right": ("empty", "right"),
            "wrong_minus_empty": ("wrong", "empty"),
        }.items():
            gap = errors[x][b] - errors[y][b]
            row[name], row[name + "_se"] = f"{gap.mean():.6f}", f"{gap.std() / count**0.5:.6f}"
        rows.append(row)
    write_csv("noise.csv", rows)


def distance_table(judge, samples: np.ndarray):
    """Frechet distance in judge features to fresh renders, and how near the nearest of 4,000
    training pictures is (per-pixel RMS), beside the same for fresh renders."""
    fresh, _, _ = make(len(samples), seed=9005)
    other, _, _ = make(len(samples), seed=9006)
    training, _, _ = make(4000, seed=0)

    def features(images):
        return verdict(judge, torch.from_numpy(images).permute(0, 3, 1, 2).float())["features"]

    def nearest(images):
        small = images[:, ::2, ::2].reshape(len(images), -1)
        bank = (training[:, ::2, ::2] / 255).reshape(len(training), -1).astype(np.float32)
        square = (small**2).sum(1)[:, None] + (bank**2).sum(1)[None] - 2 * small @ bank.T
        return float(np.sqrt(np.maximum(square.min(1), 0) / small.shape[1]).mean())

    fresh_f, other_f = (features(i / 255) for i in (fresh, other))
    samples = samples.astype(np.float32)
    rows = [
        {
            "source": name,
            "frechet_to_fresh_renders": round(frechet(fresh_f, f), 4),
            "nearest_training_rms": round(nearest(i.astype(np.float32)), 4),
        }
        for name, f, i in (
            ("fresh renders", other_f, other / 255),
            ("samples", features(samples), samples),
        )
    ]
    write_csv("distance.csv", rows)


def report(folder, rounds: int = 3, count: int = 300):
    pipeline, judge = load_pipeline(folder), load()
    samples = accuracy_table(pipeline, judge, rounds)
    noise_table(pipeline, count)
    distance_table(judge, samples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="custom/threestudio-lods/lods/models/pocket-shapes")
    parser.add_argument("--rounds", type=int, default=3, help="samples per object and view")
    parser.add_argument("--count", type=int, default=300, help="held-out pictures for noise.csv")
    options = parser.parse_args()
    report(options.model, options.rounds, options.count)
