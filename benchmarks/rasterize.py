"""Speed of the CPU rasteriser, as ratios to baselines measured in the same run.

``python benchmarks/rasterize.py`` times one camera for 1k to 80k Gaussians at 64 to 256 pixels:

- ``project_ms``, ``lists_ms``: projection, and depth sort with tile lists, apart from the rest;
- ``forward_ms``, ``both_ms``: blending, and blending with its backward pass;
- ``torch_tiled``: the same blending in plain torch, tiled and culled like ours (below), and
  ``torch_dense``: the twin that the tests compare with; both forward and backward, as ratios
  baseline / ours (above 1: ours is faster);
- ``bare_exp``: ours / the time of one scalar ``exp`` for each (pixel, Gaussian) pair that is really
  blended, on the same threads: the part of the work that cannot be left out;
- ``pairs``, ``radius_px`` (mean 3-sigma radius on the screen) and peak memory.

Every figure is the minimum over repeats. Baselines whose cost is out of proportion are not run, and
their cells say so.
"""

import argparse
import importlib
import math
from pathlib import Path

import numba
import numpy as np
import torch
from timing import ROOT, fastest, machine, peak_mib, show, write_table

from threestudio.utils.extensions import load_extension
from threestudio.utils.kernel_cache import kernel

TILE = 16


def scene(n: int, size: int, seed: int = 0):
    """``n`` Gaussians in a ball, seen from outside; at 5,000 and 128 pixels their mean 3-sigma
    radius on the screen is near 3 pixels, and their number times their volume is constant."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(n, 3, generator=g)
    means *= torch.rand(n, 1, generator=g) ** (1 / 3) / means.norm(dim=1, keepdim=True)
    scale = 0.0175 * (5000 / n) ** (1 / 3)
    scales = scale * (0.6 + 0.8 * torch.rand(n, 3, generator=g))
    quats = torch.randn(n, 4, generator=g)
    opacities = 0.1 + 0.85 * torch.rand(n, generator=g)
    colors = torch.rand(n, 3, generator=g)
    view = torch.eye(4)[None].clone()
    view[0, 2, 3] = 3.6
    focal = 0.5 * size / math.tan(math.radians(20))
    K = torch.tensor([[[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]]])
    return means, quats, scales, opacities, colors, view, K


def tiled(means2d, conics, opacities, colors, depths, extents, width, height):
    """Blending of one camera in plain torch: per 16x16 tile, only the Gaussians that reach it, up
    to where the tile is opaque. Same formulas as the twin's."""
    means2d, conics, depths, extents = means2d[0], conics[0], depths[0], extents[0]
    with torch.no_grad():
        order = depths.argsort()
        order = order[(extents[order] > 0).all(-1)]
        low = (means2d - extents)[order]
        high = (means2d + extents)[order]
    rows = []
    for top in range(0, height, TILE):
        in_rows = (high[:, 1] > top) & (low[:, 1] < top + TILE)
        row = []
        for left in range(0, width, TILE):
            ids = order[in_rows & (high[:, 0] > left) & (low[:, 0] < left + TILE)]
            py, px = torch.meshgrid(
                torch.arange(top, top + TILE) + 0.5,
                torch.arange(left, left + TILE) + 0.5,
                indexing="ij",
            )
            done, image = torch.ones(TILE * TILE, 1), torch.zeros(TILE * TILE, 3)
            for part in ids.split(256):
                if len(part) == 0 or float(done.detach().max()) <= 1e-4:
                    break
                dx = px.reshape(-1, 1) - means2d[part, 0]
                dy = py.reshape(-1, 1) - means2d[part, 1]
                a, b, c = conics[part].unbind(-1)
                power = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                alpha = (opacities[part] * torch.exp(-power)).clamp(max=0.999)
                alpha = alpha * (alpha >= 1 / 255)
                after = torch.cumprod(1 - alpha, dim=-1) * done
                before = torch.cat([done, after[:, :-1]], dim=-1)
                weights = alpha * before * (after > 1e-4)
                image = image + weights @ colors[part]
                done = after[:, -1:]
            row.append(torch.cat([image, 1 - done], -1).view(TILE, TILE, 4))
        rows.append(torch.cat(row, 1))
    out = torch.cat(rows, 0)
    return out[None, ..., :3], out[None, ..., 3:]


@kernel()
def count_pairs(means2d, conics, opacities, extents, order, width, height):
    """How many (pixel, Gaussian) pairs are blended."""
    left = np.ones((height, width), np.float32)
    total = 0
    for g in order:
        x, y, ex, ey = means2d[g, 0], means2d[g, 1], extents[g, 0], extents[g, 1]
        for i in range(max(0, int(y - ey)), min(height, int(y + ey) + 1)):
            for j in range(max(0, int(x - ex)), min(width, int(x + ex) + 1)):
                dx, dy = j + 0.5 - x, i + 0.5 - y
                power = 0.5 * (conics[g, 0] * dx * dx + conics[g, 2] * dy * dy)
                power += conics[g, 1] * dx * dy
                alpha = min(0.999, opacities[g] * math.exp(-power))
                if alpha < 1 / 255 or left[i, j] == 0:
                    continue
                after = left[i, j] * (1 - alpha)
                left[i, j] = after if after > 1e-4 else 0  # the first that does not fit ends it
                total += after > 1e-4
    return total


@kernel(parallel=True)
def bare_exp(x, repeats):
    """One scalar exp per element of x, ``repeats`` times."""
    total = 0.0
    for i in numba.prange(x.shape[0]):
        value = x[i]
        for _ in range(repeats):
            value = math.exp(-value)
        total += value
    return total


def both(composite, inputs, size):
    """A function that blends and differentiates."""
    means2d, conics, opacities, colors, depths, extents = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (means2d, conics, opacities, colors)]
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.rand(1, size, size, k, generator=g) for k in (3, 1)]

    def call():
        out = composite(*leaves, depths, extents, size, size)
        torch.autograd.grad(out, leaves, cotangents)

    return call


def measure(modules, n: int, size: int, budget: float, baselines: bool) -> dict:
    cpu, twin, lists, backend = modules
    means, quats, scales, opacities, colors, view, K = scene(n, size)
    arguments = (means, quats, scales, opacities, view, K, size, size, 0.01, 100.0, 0.3)
    project = fastest(lambda: cpu.project(*arguments), budget)
    means2d, conics, depths, extents = cpu.project(*arguments)
    inputs = (means2d, conics, opacities, colors, depths, extents)
    workers = backend.workers_for(n)
    tile = cpu.tile_for(1, size, size, workers)
    arrays = [x.numpy() for x in (means2d, conics, opacities, extents, depths)]
    tiles = -(-size // tile)
    sorting = fastest(lambda: lists.make_lists(*arrays, tile, tiles, tiles, workers), budget)
    with torch.no_grad():
        forward = fastest(lambda: cpu.composite(*inputs, size, size), budget) - sorting
    ours = fastest(both(cpu.composite, inputs, size), 2 * budget) - sorting
    order = np.argsort(depths[0].numpy(), kind="stable")
    order = order[(extents[0].numpy()[order] > 0).all(1)]
    flat = [x.numpy() for x in (means2d[0], conics[0], opacities, extents[0])]
    pairs = count_pairs(*flat, order, size, size)
    x = np.random.default_rng(0).uniform(0, 1, max(pairs, 1))
    one = fastest(lambda: bare_exp(x, 1), budget)
    # the 3-sigma radius, as 3DGS has it: of the larger axis of the projected covariance
    a, b, c = conics[0, torch.from_numpy(order)].double().unbind(-1)
    det = a * c - b * b
    mid = 0.5 * (a + c) / det
    radius = 3 * (mid + (mid * mid - 1 / det).clamp(min=0).sqrt()).sqrt().mean()
    row = {
        "gaussians": n,
        "pixels": size,
        "project_ms": round(project * 1e3, 3),
        "lists_ms": round(sorting * 1e3, 3),
        "forward_ms": round(forward * 1e3, 3),
        "both_ms": round(ours * 1e3, 3),
        "bare_exp_ms": round(one * 1e3, 4),
        "over_bare_exp": round(ours / one, 2),
        "pairs": pairs,
        "radius_px": round(float(radius), 2),
        "torch_tiled": "not run",
        "torch_dense": "not run",
    }
    if baselines:
        row["torch_tiled"] = round(fastest(both(tiled, inputs, size), 0, 1) / ours, 1)
        if n * size * size <= 9e7:
            row["torch_dense"] = round(fastest(both(twin.composite, inputs, size), 0, 1) / ours, 1)
    row["peak_mib"] = peak_mib()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/rasterize.csv")
    parser.add_argument("--quick", action="store_true", help="5k Gaussians at 128 pixels only")
    args = parser.parse_args()
    load_extension(ROOT / "custom" / "threestudio-lods")
    names = ("backends.cpu", "reference", "backends.lists", "backends.simd")
    modules = [importlib.import_module(f"lods.gaussians.{name}") for name in names]
    sizes = (
        [(5000, 128)]
        if args.quick
        else [(n, size) for n in (1000, 5000, 20000, 80000) for size in (64, 128, 256)]
    )
    measure(modules, 500, 64, 0.0, False)  # compiles
    about = machine()
    # Ours first, in order of size: peak memory only rises, and the baselines need more.
    rows = [measure(modules, n, size, 0.3, False) for n, size in sizes]
    for row, (n, size) in zip(rows, sizes):
        full = measure(modules, n, size, 0.05, n <= 20000 or size <= 128)
        row.update({k: full[k] for k in ("torch_tiled", "torch_dense")})
        row.update(about)
        show(row, about)
    write_table(args.out, rows)
    print(f"{args.out}: {about}")


if __name__ == "__main__":
    main()
