"""Speed of the CPU rasteriser of triangles, as ratios to baselines measured in the same run.

``python benchmarks/mesh.py`` times four cameras around a dented ball of 1,280 to 81,920 triangles
with a texture, at 128 to 512 pixels:

- ``visible_ms``: which triangle each pixel shows, and where on it; ``forward_ms``: whole pictures,
  textured and with smoothed silhouettes; ``both_ms``: with their backward pass to texture and
  vertices;
- ``bare_pass``: ours (forward) / the time of one pass over the covered pixels on the same threads,
  that reads a triangle's number and three weights and writes four numbers: what no rasteriser can
  leave out;
- ``torch_tiled``, ``torch_tiled_both``: plain torch, each triangle against the pixels of the tiles
  of 16 x 16 that it meets (:mod:`lods.meshes.backends.tiles`), then the dense reference's texture
  and silhouettes: baseline / ours, above 1: ours is faster;
- ``pixels``, how many are covered, and peak memory.

Every figure is the minimum over repeats. The baseline is not run where it would take minutes, and
the cell says so.
"""

import argparse
from pathlib import Path

import numba
import numpy as np
import torch
from timing import ROOT, fastest, machine, peak_mib, show, write_table

from threestudio.utils.extensions import load_extension
from threestudio.utils.kernel_cache import kernel

CAMERAS = 4
MOST = 1.5e10  # pairs of a triangle and a pixel of its tiles, above which torch is left out


@kernel(parallel=True)
def bare(face, weights, out):
    """One pass over the covered pixels."""
    for row in numba.prange(face.shape[0]):
        for x in range(face.shape[1]):
            if face[row, x] >= 0:
                a, b, c = weights[row, x, 0], weights[row, x, 1], weights[row, x, 2]
                out[row, x, 0], out[row, x, 1], out[row, x, 2], out[row, x, 3] = a, b, c, 1.0


def scene(subdivisions: int, size: int, texture_size: int = 512, seed: int = 0):
    """A ball with dents, of 20 * 4^n triangles, each with texture coordinates by its direction; and
    cameras around it."""
    import trimesh
    from lods.gaussians.cameras import intrinsics, orbit, world_to_camera

    random = torch.Generator().manual_seed(seed)
    ball = trimesh.creation.icosphere(subdivisions=subdivisions)
    vertices = torch.tensor(np.array(ball.vertices), dtype=torch.float32)
    waves = torch.randn(3, 3, generator=random) * 4
    vertices = vertices * (0.9 + 0.05 * (vertices @ waves).sin().sum(1, keepdim=True))
    azimuth = torch.atan2(vertices[:, 1], vertices[:, 0]) / (2 * torch.pi)
    height = torch.nn.functional.normalize(vertices, dim=1)[:, 2] / 2 + 0.5
    texture = torch.rand(texture_size, texture_size, 3, generator=random)
    views = world_to_camera(orbit(CAMERAS, 3.0, 20.0))
    Ks = intrinsics(torch.full((CAMERAS,), 0.75), size, size)
    faces = torch.tensor(np.array(ball.faces), dtype=torch.int64)
    return vertices, faces, torch.stack([azimuth, height], 1), texture, views, Ks


def measure(subdivisions: int, size: int, budget: float, baselines: bool) -> dict:
    from lods.meshes import backends
    from lods.meshes.rasterize import rasterization
    from lods.meshes.topology import neighbours

    vertices, faces, uv, texture, views, Ks = scene(subdivisions, size)
    across = neighbours(faces)
    points = torch.einsum("cij,vj->cvi", views[:, :3, :3], vertices) + views[:, None, :3, 3]
    cpu, tiles = backends.get("cpu"), backends.get("tiles")
    random = torch.Generator().manual_seed(1)
    cotangent = torch.rand(CAMERAS, size, size, 3, generator=random)
    leaves = [x.clone().requires_grad_() for x in (vertices, texture)]

    def forward(points=vertices, picture=texture):
        options = {"texture": picture, "uv": uv, "neighbours": across, "backend": "cpu"}
        return rasterization(points, faces, views, Ks, size, size, **options)[0]

    def both(draw=forward):
        torch.autograd.grad(draw(*leaves), leaves, cotangent)

    def tiled(points=vertices, picture=texture):
        seen = torch.einsum("cij,vj->cvi", views[:, :3, :3], points) + views[:, None, :3, 3]
        found = tiles.rasterize(seen, faces, Ks, size, size, 0.01, 1e10)
        image = tiles.sample(picture, tiles.interpolate(uv, faces, found), found)
        return tiles.antialias(image, found, seen, faces, across, Ks)

    found = cpu.rasterize(points, faces, Ks, size, size, 0.01, 1e10)
    face = found.face.view(-1, size).numpy()
    weights = found.weights.detach().view(-1, size, 3).numpy()
    out = np.zeros((*face.shape, 4), np.float32)
    times = {
        "visible": fastest(
            lambda: cpu.rasterize(points, faces, Ks, size, size, 0.01, 1e10), budget
        ),
        "forward": fastest(forward, budget),
        "both": fastest(both, budget),
        "bare": fastest(lambda: bare(face, weights, out), budget),
    }
    covered = int((face >= 0).sum())
    # about: each triangle meets its own tile, and a large one several
    pairs = CAMERAS * (len(faces) * 256 + 2 * covered)
    slow = "not run" if not baselines or pairs * 60 > MOST else ""
    with torch.no_grad():
        one = slow or fastest(tiled, budget, 1) / times["forward"]
    two = slow or fastest(lambda: both(tiled), budget, 1) / times["both"]
    return {
        "triangles": len(faces),
        "size": size,
        "cameras": CAMERAS,
        "pixels": covered,
        **{f"{name}_ms": round(1e3 * times[name], 3) for name in ("visible", "forward", "both")},
        "bare_pass": round(times["forward"] / times["bare"], 1),
        "torch_tiled": one if slow else round(float(one), 1),
        "torch_tiled_both": two if slow else round(float(two), 1),
        "peak_mib": round(peak_mib()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subdivisions", type=int, nargs="+", default=[3, 5, 6])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each figure")
    parser.add_argument("--no-baselines", action="store_true", help="without torch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mesh.csv")
    args = parser.parse_args()
    load_extension(ROOT / "custom" / "threestudio-lods")
    torch.set_num_threads(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    about, rows = machine(), []
    for subdivisions in args.subdivisions:
        for size in args.sizes:
            row = measure(subdivisions, size, args.budget, not args.no_baselines) | about
            show(row, about)
            rows.append(row)
    write_table(args.out, rows)


if __name__ == "__main__":
    main()
