"""Speed of the hash-grid kernels on the CPU, as ratios to baselines measured in the same run.

``python benchmarks/hashgrid.py`` encodes 2^14 to 2^18 points, anywhere in the cube or along rays
through it, with 8 and 16 levels of at most 2^15 or 2^19 entries:

- ``forward_ms``: the features; ``both_ms``: with the gradient to the table;
- ``*_forward``, ``*_both``: the same in plain torch, in the ways of VERSIONS below, as ratios
  baseline / ours (above 1: ours is faster), and of these ``best_*``, that of the fastest way;
- ``over_gather``: ours / reading as many features, at the same places, on the same threads;
  ``over_scatter``: ours with the gradient / reading and then adding to them. It is the part of the
  work that cannot be left out.

Every figure is the minimum over repeats.
"""

import argparse
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F
from timing import ROOT, fastest, machine, peak_mib, write_table

from threestudio.models.hashgrid import grid_layout, hash_encode
from threestudio.utils.kernel_cache import kernel

FINEST = 4096  # cells a side, for any number of levels


def make_points(kind: str, n: int) -> torch.Tensor:
    """``anywhere``, or 64 points on each of a number of rays through the cube."""
    g = torch.Generator().manual_seed(0)
    if kind == "anywhere":
        return torch.rand(n, 3, generator=g)
    a, b = torch.rand(2, n // 64, 1, 3, generator=g)
    return torch.lerp(a, b, torch.linspace(0, 1, 64)[:, None]).view(-1, 3)


def make_layout(levels: int, log2_size: int):
    growth = (FINEST / 16) ** (1 / (levels - 1))
    return grid_layout(3, levels, 2, log2_size, 16, growth)


def corners(x, level):
    """Entries (N, 8) and weights (N, 8) of a level, for points inside. Integers of 32 bits are
    faster than 64 and wrap in the same way."""
    position = x * level.scale + 0.5
    cell = position.floor()
    t = position - cell
    strides = torch.tensor([s - 2**32 if s >= 2**31 else s for s in level.strides]).int()
    low = cell.int() * strides
    terms = torch.stack([low, low + strides], -1)  # N, 3, 2
    factors = torch.stack([1 - t, t], -1)
    weights = factors[:, 2, :, None, None] * factors[:, 1, None, :, None]
    weights = (weights * factors[:, 0, None, None, :]).flatten(1)
    x, y, z = terms[:, 0, None, None, :], terms[:, 1, None, :, None], terms[:, 2, :, None, None]
    if level.dense:
        entries = (x + y + z).flatten(1)
        entries = torch.where(entries >= level.size, entries - level.size, entries)
    else:
        entries = (x ^ y ^ z).flatten(1) & (level.size - 1)
    return entries + level.offset, weights


def all_corners(x, layout):
    """Entries and weights of all levels, (N, L, 8)."""
    entries, weights = zip(*(corners(x, level) for level in layout.levels))
    return torch.stack(entries, 1), torch.stack(weights, 1)


def corner_loop(x, table, layout):
    """Level by level and corner by corner: index, multiply, add."""
    out = []
    for level in layout.levels:
        entries, weights = corners(x, level)
        out.append(sum(weights[:, c, None] * table[entries[:, c].long()] for c in range(8)))
    return torch.cat(out, 1)


def level_gather(x, table, layout):
    """Level by level: one index, one weighted sum."""
    out = []
    for level in layout.levels:
        entries, weights = corners(x, level)
        out.append((weights[..., None] * table[entries.long()]).sum(1))
    return torch.cat(out, 1)


def one_gather(x, table, layout):
    """All levels at once: one index, one weighted sum."""
    entries, weights = all_corners(x, layout)
    return (weights[..., None] * table[entries.long()]).sum(2).flatten(1)


def select_matmul(x, table, layout):
    """index_select, and the weighted sums as small matrix products."""
    entries, weights = all_corners(x, layout)
    values = table.index_select(0, entries.flatten()).view(-1, 8, table.shape[1])
    return (weights.view(-1, 1, 8) @ values).view(len(x), -1)


def embedding_bag(x, table, layout):
    """torch's fused gather and weighted sum."""
    entries, weights = all_corners(x, layout)
    bags = entries.view(-1, 8), weights.view(-1, 8)
    out = F.embedding_bag(bags[0], table, per_sample_weights=bags[1], mode="sum")
    return out.view(len(x), -1)


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, entries, weights):
        ctx.save_for_backward(entries, weights)
        ctx.size = table.shape
        return F.embedding_bag(entries, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, g):
        entries, weights = ctx.saved_tensors
        values = (weights[..., None] * g[:, None]).flatten(0, 1)
        return g.new_zeros(ctx.size).index_add_(0, entries.flatten(), values), None, None


def index_add(x, table, layout):
    """The fused gather with a backward by index_add_."""
    entries, weights = all_corners(x, layout)
    return _Bag.apply(table, entries.view(-1, 8), weights.view(-1, 8)).view(len(x), -1)


class _Count(_Bag):
    @staticmethod
    def backward(ctx, g):
        entries, weights = ctx.saved_tensors
        flat = entries.flatten().long()
        columns = [
            torch.bincount(flat, (weights * g[:, f, None]).flatten(), ctx.size[0])
            for f in range(ctx.size[1])
        ]
        return torch.stack(columns, 1).to(g.dtype), None, None


def bincount(x, table, layout):
    """The fused gather with a backward by weighted counts of the entries, per feature."""
    entries, weights = all_corners(x, layout)
    return _Count.apply(table, entries.view(-1, 8), weights.view(-1, 8)).view(len(x), -1)


VERSIONS = {
    f.__name__: f
    for f in (
        corner_loop,
        level_gather,
        one_gather,
        select_matmul,
        embedding_bag,
        index_add,
        bincount,
    )
}


@kernel(parallel=True)
def bare_gather(table, entries, out):
    """Reads the two features of each entry (levels, points * 8), level by level on each thread."""
    workers, n = len(out), entries.shape[1]
    for worker in numba.prange(workers):
        a, b = np.float32(0), np.float32(0)
        for level in range(len(entries)):
            for i in range(worker * n // workers, (worker + 1) * n // workers):
                at = np.uint64(entries[level, i])
                a += table[at, np.uint64(0)]
                b += table[at, np.uint64(1)]
        out[worker] = a + b


@kernel(parallel=True)
def bare_scatter(table, entries, workers):
    """Adds to them, each thread to levels of its own."""
    for worker in numba.prange(workers):
        for level in range(worker, len(entries), workers):
            for i in range(entries.shape[1]):
                at = np.uint64(entries[level, i])
                table[at, np.uint64(0)] += np.float32(1)
                table[at, np.uint64(1)] += np.float32(1)


def both(encode, table, cotangent):
    """A function that encodes and differentiates."""
    leaf = table.clone().requires_grad_()
    return lambda: torch.autograd.grad(encode(leaf), leaf, cotangent)


def measure(kind: str, n: int, levels: int, log2_size: int, budget: float) -> dict:
    layout = make_layout(levels, log2_size)
    g = torch.Generator().manual_seed(1)
    x, params = make_points(kind, n), torch.rand(layout.n_params, generator=g)
    cotangent = torch.rand(n, layout.n_output_dims, generator=g)
    table = params.view(-1, 2)

    def ours(params):
        return hash_encode(x, params, layout, "cpu")

    with torch.no_grad():
        forward = fastest(lambda: ours(params), budget)
    whole = fastest(both(ours, params, cotangent), budget)
    row = {
        "kind": kind,
        "points": n,
        "levels": levels,
        "log2_size": log2_size,
        "forward_ms": round(forward * 1e3, 3),
        "both_ms": round(whole * 1e3, 3),
    }
    workers = numba.get_num_threads()
    entries = all_corners(x, layout)[0].transpose(0, 1).flatten(1).numpy().astype(np.uint32)
    sums, sink = np.empty(workers, np.float32), np.zeros(table.shape, np.float32)
    gather = fastest(lambda: bare_gather(table.numpy(), entries, sums), budget)
    scatter = fastest(lambda: bare_scatter(sink, entries, workers), budget)
    row["gather_ms"], row["scatter_ms"] = round(gather * 1e3, 3), round(scatter * 1e3, 3)
    row["over_gather"] = round(forward / gather, 2)
    row["over_scatter"] = round(whole / (gather + scatter), 2)
    times = []
    for name, version in VERSIONS.items():

        def encode(table, version=version):
            return version(x, table, layout)

        with torch.no_grad():
            torch.testing.assert_close(encode(table), ours(params), rtol=1e-3, atol=2e-3)
            one = fastest(lambda: encode(table), budget / 4, 1)
        two = fastest(both(encode, table, cotangent), budget / 4, 1)
        times.append((one, two))
        row[f"{name}_forward"] = round(one / forward, 1)
        row[f"{name}_both"] = round(two / whole, 1)
    row["best_forward"] = round(min(t[0] for t in times) / forward, 1)
    row["best_both"] = round(min(t[1] for t in times) / whole, 1)
    row["peak_mib"] = peak_mib()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/hashgrid.csv")
    parser.add_argument("--quick", action="store_true", help="2^14 points and small tables only")
    args = parser.parse_args()
    exponents, sizes = ((14,), (15,)) if args.quick else ((14, 16, 18), (15, 19))
    measure("anywhere", 128, 2, 10, 0.0)  # compiles
    about = machine()
    rows = []
    for kind in ("anywhere", "rays"):
        for exponent in exponents:
            for levels in (8, 16):
                for log2_size in sizes:
                    rows.append(measure(kind, 2**exponent, levels, log2_size, 0.3))
                    if len(rows) == 1:
                        print(*(f"{key:>8}" for key in rows[0]))
                    print(*(f"{v:>{max(8, len(k))}}" for k, v in rows[-1].items()), flush=True)
    write_table(args.out, [row | about for row in rows])
    print(f"{args.out}: {about}")


if __name__ == "__main__":
    main()
