"""Compiled for the CPU: rays side by side on all cores, samples of a ray one after the other.

The functions have the signatures and the results of their namesakes in ``march_torch``. Every
kernel writes only what belongs to its own rays, so the results do not depend on the number of
threads.
"""

import math

import numpy as np
import torch
from numba import njit, prange

from threestudio.utils.kernel_cache import kernel
from threestudio.utils.parallel import run_kernel, worker_count
from threestudio.utils.typing import *

from .march_torch import FLAT, MAX_STEPS, ray_offsets

# No fused multiply-add: a midpoint falls into the same cell as in torch, to the last bit.
INNER = {"error_model": "numpy"}
OPTIONS = {**INNER, "parallel": True, "nogil": True}
BLOCK = 64  # rays that a thread takes at a time
SERIAL_WORK = 20_000  # samples


F = np.float32
HALF, ONE, INF = F(0.5), F(1), F(np.inf)
TINY, LIMIT = F(FLAT), F(MAX_STEPS)


def run(kernel, work: int, *args):
    """Call a kernel, which takes the number of its threads first."""
    workers = worker_count(work, SERIAL_WORK)
    return run_kernel(kernel, workers, workers, *args)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


# --- sampling -----------------------------------------------------------------------------------


@njit(**INNER)
def slab(o, d, low, high, t_in, t_out):
    """One axis of ``march_torch.ray_box``: narrows (t_in, t_out)."""
    if abs(d) < TINY:
        return (INF, t_out) if o < low or o > high else (t_in, t_out)
    inverse = ONE / d
    a, b = (low - o) * inverse, (high - o) * inverse
    return max(t_in, min(a, b)), min(t_out, max(a, b))


@njit(**INNER)
def leave(o, d, low, scale, cell, t):
    """The smaller of ``t`` and the t at which a ray leaves its cell along one axis."""
    if abs(d) < TINY:
        return t
    face = low + (cell + (ONE if d > 0 else F(0))) / scale
    return min(t, (face - o) / d)


@njit(**INNER)
def walk(r, rays_o, rays_d, box, scale, occupied, start, far, step, at, rays, t_starts, t_ends):
    """Counts the samples of ray r, and writes them from ``at`` on if that is not negative.

    In an empty cell the march jumps to the last step before the ray leaves it, one too early
    rather than one too late: what is taken is decided by the midpoints alone.
    """
    ox, oy, oz = rays_o[r, 0], rays_o[r, 1], rays_o[r, 2]
    dx, dy, dz = rays_d[r, 0], rays_d[r, 1], rays_d[r, 2]
    t_in, t_out = slab(ox, dx, box[0], box[3], -INF, far)
    t_in, t_out = slab(oy, dy, box[1], box[4], t_in, t_out)
    t_in, t_out = slab(oz, dz, box[2], box[5], t_in, t_out)
    if not (t_in <= t_out) or t_in == -INF:  # misses the box, goes nowhere, or is not a number
        return 0
    k = int(min(max(np.floor((t_in - start) / step - HALF), F(0)), LIMIT))
    last = int(min(max(np.ceil((t_out - start) / step - HALF) + ONE, F(0)), LIMIT))
    nx, ny, nz = occupied.shape
    count = 0
    while k < last:
        t = start + (F(k) + HALF) * step
        if t > far:
            break
        x = (ox + t * dx - box[0]) * scale[0]
        y = (oy + t * dy - box[1]) * scale[1]
        z = (oz + t * dz - box[2]) * scale[2]
        inside = x >= 0 and x < nx and y >= 0 and y < ny and z >= 0 and z < nz
        if not inside:
            k += 1
            continue
        i, j, l = int(x), int(y), int(z)  # not negative, so this rounds down
        if occupied[i, j, l]:
            if at >= 0:
                rays[at + count] = r
                t_starts[at + count] = start + F(k) * step
                t_ends[at + count] = start + F(k + 1) * step
            count += 1
            k += 1
            continue
        t = leave(ox, dx, box[0], scale[0], F(i), INF)
        t = leave(oy, dy, box[1], scale[1], F(j), t)
        t = leave(oz, dz, box[2], scale[2], F(l), t)
        exit_step = np.ceil(min((t - start) / step - HALF, LIMIT))
        k = max(k + 1, int(exit_step) - 1)
    return count


@kernel(**OPTIONS)
def march(
    workers, rays_o, rays_d, box, scale, occupied, starts, far, step, offsets, rays, t_starts,
    t_ends,
):  # fmt: skip
    """Without room for samples (``rays`` empty) writes the number of samples of ray r to
    ``offsets[r + 1]``, else the samples themselves from ``offsets[r]`` on."""
    n = len(rays_o)
    counting = len(rays) == 0
    blocks = (n + BLOCK - 1) // BLOCK
    for worker in prange(workers):
        for block in range(worker, blocks, workers):
            for r in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                at = -1 if counting else offsets[r]
                count = walk(
                    r, rays_o, rays_d, box, scale, occupied, starts[r], far, step, at, rays,
                    t_starts, t_ends,
                )  # fmt: skip
                if counting:
                    offsets[r + 1] = count


def traverse(rays_o, rays_d, occupied, aabb, starts, far_plane, step):
    """See ``march.traverse``. Two passes: the samples are counted, then written."""
    scale = torch.tensor(occupied.shape, dtype=aabb.dtype) / (aabb[3:] - aabb[:3])
    inputs = [_array(x) for x in (rays_o, rays_d, aabb, scale, occupied, starts)]
    inputs += [F(far_plane), F(step)]
    offsets = np.zeros(len(rays_o) + 1, np.int64)
    work = 100 * len(rays_o)

    def call(n):
        out = torch.empty(n, dtype=torch.int64), torch.empty(n), torch.empty(n)
        run(march, work, *inputs, offsets, *(x.numpy() for x in out))
        return out

    call(0)
    np.cumsum(offsets, out=offsets)
    return call(int(offsets[-1]))


# --- weights ------------------------------------------------------------------------------------


@kernel(**OPTIONS)
def weigh(workers, sigmas, t_starts, t_ends, offsets, weights, trans, alphas):
    """Forward: w_i = T_i alpha_i and T_{i+1} = T_i (1 - alpha_i), in double."""
    n = len(offsets) - 1
    blocks = (n + BLOCK - 1) // BLOCK
    for worker in prange(workers):
        for block in range(worker, blocks, workers):
            for r in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                left = 1.0
                for i in range(offsets[r], offsets[r + 1]):
                    passed = math.exp(-np.float64(sigmas[i] * (t_ends[i] - t_starts[i])))
                    trans[i], alphas[i] = left, 1.0 - passed
                    weights[i] = left * (1.0 - passed)
                    left *= passed


@kernel(**OPTIONS)
def unweigh(
    workers, t_starts, t_ends, offsets, weights, trans, alphas, d_weights, d_trans, d_alphas,
    d_sigmas,
):  # fmt: skip
    """Backward, from the last sample of a ray to its first. A denser sample i, in terms of its
    depth s_i = sigma_i dt_i, has a larger alpha_i and lowers every T_j and w_j behind it:

        dL/ds_i = (T_i dL/dw_i + dL/dalpha_i) (1 - alpha_i)
                  - sum_{j > i} (w_j dL/dw_j + T_j dL/dT_j),      dL/dsigma_i = dt_i dL/ds_i
    """
    n = len(offsets) - 1
    blocks = (n + BLOCK - 1) // BLOCK
    for worker in prange(workers):
        for block in range(worker, blocks, workers):
            for r in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                behind = 0.0
                for i in range(offsets[r + 1] - 1, offsets[r] - 1, -1):
                    own = (trans[i] * d_weights[i] + d_alphas[i]) * (ONE - alphas[i])
                    d_sigmas[i] = (own - behind) * (t_ends[i] - t_starts[i])
                    behind += weights[i] * d_weights[i] + trans[i] * d_trans[i]


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigmas, t_starts, t_ends, ray_indices, n_rays):
        offsets = ray_offsets(ray_indices, n_rays)
        out = [torch.empty_like(t_starts) for _ in range(3)]
        run(
            weigh, len(sigmas), _array(sigmas), _array(t_starts), _array(t_ends),
            offsets.numpy(), *(x.numpy() for x in out),
        )  # fmt: skip
        ctx.save_for_backward(t_starts, t_ends, offsets, *out)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        saved = [_array(x) for x in (*ctx.saved_tensors, *grads)]
        d_sigmas = torch.empty(len(saved[0]))
        run(unweigh, len(d_sigmas), *saved, d_sigmas.numpy())
        return d_sigmas, None, None, None, None


def render_weights(sigmas, t_starts, t_ends, ray_indices, n_rays):
    """See ``march.render_weights``."""
    return _Weights.apply(sigmas, t_starts.contiguous(), t_ends.contiguous(), ray_indices, n_rays)


# --- sums ---------------------------------------------------------------------------------------


@kernel(**OPTIONS)
def gather(workers, weights, values, offsets, out):
    """out[r] = sum_i w_i v_i over the samples i of ray r."""
    n, channels = out.shape
    blocks = (n + BLOCK - 1) // BLOCK
    for worker in prange(workers):
        for block in range(worker, blocks, workers):
            for r in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                for i in range(offsets[r], offsets[r + 1]):
                    for c in range(channels):
                        out[r, c] += weights[i] * values[i, c]


@kernel(**OPTIONS)
def ungather(workers, weights, values, offsets, d_out, d_weights, d_values):
    """dL/dw_i = v_i . dL/dout_r and dL/dv_i = w_i dL/dout_r; one that is not wanted is empty."""
    n, channels = d_out.shape
    blocks = (n + BLOCK - 1) // BLOCK
    for worker in prange(workers):
        for block in range(worker, blocks, workers):
            for r in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                for i in range(offsets[r], offsets[r + 1]):
                    if len(d_weights) > 0:
                        total = F(0)
                        for c in range(channels):
                            total += values[i, c] * d_out[r, c]
                        d_weights[i] = total
                    if len(d_values) > 0:
                        for c in range(channels):
                            d_values[i, c] = weights[i] * d_out[r, c]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, values, ray_indices, n_rays):
        offsets = ray_offsets(ray_indices, n_rays)
        out = torch.zeros(n_rays, values.shape[1])
        run(gather, values.numel(), _array(weights), _array(values), offsets.numpy(), out.numpy())
        ctx.save_for_backward(weights, values, offsets)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        weights, values, offsets = ctx.saved_tensors
        d_weights = torch.empty(len(weights) if ctx.needs_input_grad[0] else 0)
        d_values = torch.empty(len(values) if ctx.needs_input_grad[1] else 0, values.shape[1])
        run(
            ungather, values.numel(), _array(weights), _array(values), offsets.numpy(),
            _array(d_out), d_weights.numpy(), d_values.numpy(),
        )  # fmt: skip
        wanted = zip((d_weights, d_values), ctx.needs_input_grad)
        return *[g if wants else None for g, wants in wanted], None, None


def accumulate(weights, values, ray_indices, n_rays):
    """See ``march.accumulate_along_rays``."""
    return _Sums.apply(weights, values, ray_indices, n_rays)
