"""Speed of ray marching on the CPU, as ratios to baselines measured in the same run.

``python benchmarks/raymarch.py`` renders a ball of fog in a grid of 32^3 cells, 512 steps along the
box's diagonal, at 64, 128 and 256 pixels:

- ``march_ms``: choosing the samples (count, then write); ``march_torch``: the twin / ours;
- ``render_ms``: weights and sums of three channels, forward and backward; ``render_torch``: the
  twin / ours; ``render_padded``: the other way to write it in torch, a dense array of rays times
  the longest ray's samples, without packing / ours;
- ``over_bare_pass``: ours / one pass that only takes an exponential of each sample, reading and
  writing as many floats as the forward pass does, on the same threads: what cannot be left out;
- ``samples``, and peak memory.

Ratios of baselines are above 1 where ours is faster. Every figure is the minimum over repeats.
"""

import argparse
import math
from pathlib import Path

import numba
import torch
from timing import ROOT, fastest, machine, peak_mib, show, write_table

from threestudio.models.raymarch import march, march_torch
from threestudio.utils.kernel_cache import kernel

BOX = torch.tensor([-1.0, -1, -1, 1, 1, 1])
STEP = 1.732 * 2 / 512
RADIUS = 0.6


def rays(size: int):
    """One camera at distance 2.5 whose view is just filled by the box."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, z = torch.meshgrid(line, line, indexing="ij")
    dirs = torch.nn.functional.normalize(torch.stack([-2.5 * torch.ones_like(y), y, z], -1), dim=-1)
    origins = torch.tensor([2.5, 0.0, 0.0]).expand(size, size, 3)
    return origins.reshape(-1, 3).contiguous(), dirs.reshape(-1, 3)


def ball() -> torch.Tensor:
    """The cells whose centres lie in a ball."""
    centres = (torch.arange(32) + 0.5) / 16 - 1
    return torch.cartesian_prod(*[centres] * 3).norm(dim=-1).view(32, 32, 32) < RADIUS


@kernel(parallel=True)
def bare_pass(sigmas, t_starts, t_ends, values, out):
    """Reads five floats of each sample, takes one exponential, writes three floats."""
    for i in numba.prange(len(sigmas)):
        e = math.exp(-sigmas[i] * (t_ends[i] - t_starts[i]))
        for c in range(3):
            out[i, c] = e * values[i, c]


def padded(sigmas, t_starts, t_ends, ray_indices, n_rays, values):
    """Weights and sums with a dense array: (rays, samples of the longest ray)."""
    offsets = march_torch.ray_offsets(ray_indices, n_rays)
    place = torch.arange(len(sigmas)) - offsets[ray_indices]
    width = int(place.max()) + 1
    depth = torch.zeros(n_rays, width).index_put((ray_indices, place), sigmas * (t_ends - t_starts))
    colors = torch.zeros(n_rays, width, 3).index_put((ray_indices, place), values)
    weights = torch.exp(depth - depth.cumsum(1)) * -torch.expm1(-depth)
    return (weights[:, None] @ colors)[:, 0]


def both(backend: str, samples, n_rays: int, sigmas, values, cotangent):
    """A function that renders and differentiates."""
    leaves = [x.clone().requires_grad_() for x in (sigmas, values)]
    ray_indices, t_starts, t_ends = samples

    def call():
        s, v = leaves
        if backend == "padded":
            image = padded(s, t_starts, t_ends, ray_indices, n_rays, v)
        else:
            weights, _, _ = march.render_weights(s, t_starts, t_ends, ray_indices, n_rays, backend)
            image = march.accumulate_along_rays(weights, v, ray_indices, n_rays, backend)
        torch.autograd.grad(image, leaves, cotangent)

    return call


def measure(size: int, budget: float, baselines: bool) -> dict:
    rays_o, rays_d = rays(size)
    n_rays = len(rays_o)
    scene = rays_o, rays_d, ball(), BOX, torch.zeros(n_rays), 1e10, STEP
    marching = fastest(lambda: march.traverse(*scene, "cpu"), budget)
    samples = march.traverse(*scene, "cpu")
    g = torch.Generator().manual_seed(0)
    n = len(samples[0])
    sigmas, values = 5 * torch.rand(n, generator=g), torch.rand(n, 3, generator=g)
    inputs = samples, n_rays, sigmas, values, torch.rand(n_rays, 3, generator=g)
    ours = fastest(both("cpu", *inputs), budget)
    arrays = [x.numpy() for x in (sigmas, *samples[1:], values, torch.empty(n, 3))]
    bare = fastest(lambda: bare_pass(*arrays), budget)
    row = {
        "pixels": size,
        "samples": n,
        "march_ms": round(marching * 1e3, 3),
        "render_ms": round(ours * 1e3, 3),
        "bare_pass_ms": round(bare * 1e3, 3),
        "over_bare_pass": round(ours / bare, 2),
        "march_torch": "not run",
        "render_torch": "not run",
        "render_padded": "not run",
        "peak_mib": peak_mib(),
    }
    if baselines:
        twin = fastest(lambda: march.traverse(*scene, "torch"), budget)
        row["march_torch"] = round(twin / marching, 1)
        for name in ("torch", "padded"):
            row[f"render_{name}"] = round(fastest(both(name, *inputs), budget) / ours, 1)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/raymarch.csv")
    parser.add_argument("--quick", action="store_true", help="64 pixels only")
    args = parser.parse_args()
    sizes = [64] if args.quick else [64, 128, 256]
    measure(8, 0.0, False)  # compiles
    about = machine()
    # Ours first, in order of size: peak memory only rises, and the baselines need more.
    rows = [measure(size, 0.3, False) for size in sizes]
    for row, size in zip(rows, sizes):
        full = measure(size, 0.3, True)
        row.update({k: full[k] for k in ("march_torch", "render_torch", "render_padded")})
        row.update(about)
        show(row, about)
    write_table(args.out, rows)
    print(f"{args.out}: {about}")


if __name__ == "__main__":
    main()
