"""What is looked at while a generating network trains: errors by time, and samples."""

from pathlib import Path

import numpy as np
import torch

from pocket.autoencoder import FACTOR, gradients, load_vae
from pocket.data import psnr, sheet, to_bytes
from pocket.latents import Latents
from pocket.tools import say

SCALE = 2.0
SHOWN, SAMPLED, COUNTED = 20, 40, 60  # held-out views in a sheet, in the PSNR and in the errors
STEPS = 20


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def wrong_text(latents: Latents, rng, row, view: bool) -> str:
    """The caption of a held-out view of another object."""
    slug = latents.series[row[0]][0]
    others = [r for r in latents.held_out if latents.series[r[0]][0] != slug]
    if not others:
        return ""
    return latents.text(rng, others[rng.integers(len(others))], view)


@torch.no_grad()
def errors(model, latents: Latents, rows) -> list[tuple[str, dict[str, float]]]:
    """The network's mean squared error on held-out views in each range of time, by what it was
    told: the right, no or a wrong caption, with the camera's rows ("+") and without. All have the
    same noise."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(5)
    z = latents.z(rows).to(device)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).to(device)
    right = latents.ids([latents.text(rng, r, True) for r in rows]).to(device)
    wrong = latents.ids([wrong_text(latents, rng, r, True) for r in rows]).to(device)
    empty = latents.ids([""] * len(rows)).to(device)
    cameras = latents.cameras_of(rows).to(device)
    table = []
    for name, t in model.bins():
        t = t.to(device).expand(len(z))
        noisy, target = model.noised(z, noise, t)
        line = {}
        for plus, seen in (("", None), ("+", cameras)):
            for what, ids in (("right", right), ("empty", empty), ("wrong", wrong)):
                made = model(noisy, t, ids, seen).float()
                line[what + plus] = float((made - target).square().mean())
        table.append((name, line))
    return table


@torch.no_grad()
def watch_model(model, latents: Latents, work: Path, name: str, file: str) -> dict[str, float]:
    """Say the errors by time, the PSNR of samples with camera rows (the caption without view word)
    and of samples by words only (with it) to the true held-out views, and write a sheet: truth,
    with the camera, words only."""
    device = next(model.parameters()).device
    rows = spread(latents.held_out, COUNTED)
    for when, line in errors(model, latents, rows):
        say(f"{name}: {when} " + " ".join(f"{k} {v:.4f}" for k, v in line.items()))
    rows = spread(latents.held_out, SAMPLED)
    vae = load_vae(work).to(device)
    rng = np.random.default_rng(6)
    cameras = latents.cameras_of(rows).to(device)
    truth = decode(vae, latents.z(rows).to(device))
    made = {}
    for what, seen, view in (("camera", cameras, False), ("words", None, True)):
        texts = [latents.text(rng, r, view, "{}") for r in rows]
        ids = latents.ids([""] * len(rows) + texts).to(device)
        made[what] = decode(vae, model.sample(ids, seen, SCALE, seed=6, steps=STEPS))
    result = {}
    for what, pictures in made.items():
        values = psnr(pictures, truth)
        result[what] = float(values.mean())
        sharp = float(gradients(pictures.clamp(-1, 1)) / gradients(truth))
        order = values.argsort()[:4].tolist()
        worst = ", ".join(f"{'-'.join(latents.series[rows[i][0]])} {values[i]:.1f}" for i in order)
        say(f"{name}: {what} {values.mean():.2f} dB, gradients {sharp:.3f}, worst {worst}")
    some = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
    half = -(-len(some) // 2)
    lines = [
        to_bytes(pictures[torch.from_numpy(part)])
        for part in (some[:half], some[half:])
        if len(part)
        for pictures in (truth, made["camera"], made["words"])
    ]
    sheet(lines, work / "sheets" / f"{file}.png")
    return result


@torch.no_grad()
def decode(vae, z: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Pictures float (N, 3, 8h, 8w) on the CPU, clamped."""
    parts = [vae.decode(part).sample.float().cpu().clamp(-1, 1) for part in z.split(batch)]
    pictures = torch.cat(parts)
    assert pictures.shape[-1] == FACTOR * z.shape[-1]
    return pictures
