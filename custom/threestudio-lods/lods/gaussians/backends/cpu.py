"""The CPU rasteriser: compiled projection, and the compiled kernels behind two autograd functions.

``project`` and ``composite`` have the signatures and the results of their namesakes in
``lods.gaussians.reference`` (plus what only speed needs), so either can stand in for the other.
"""

import math
from typing import Any

import numpy as np
import torch
from lods.gaussians.backends import kernels
from lods.gaussians.backends.base import (
    PLAIN,
    Drawn,
    channels_of,
    project_and_blend,
    unsupported,
)
from lods.gaussians.backends.lists import count_pairs, deal, fill_lists, make_lists, sort_cameras
from lods.gaussians.backends.simd import INNER, OPTIONS, run, workers_for
from lods.gaussians.kernel_cache import are_kept, kernel
from lods.gaussians.reference import ALPHA_MIN, EXTENT_MAX
from numba import njit, prange

TILE = 32  # pixels; the 6 planes of a tile's state (24 KB) fit into the L1 cache
CHANNELS = 4  # that the kernels blend at a time
SMALL_TILE = 16  # for images with too few large tiles for the threads


# ---------------------------------------------------------------------------- projection
@njit(**INNER)
def rotation(quat, R):
    """R of a quaternion (w, x, y, z), normalised here; returns the unit quaternion and 1 / |q|."""
    w, x, y, z = 1.0 * quat[0], 1.0 * quat[1], 1.0 * quat[2], 1.0 * quat[3]
    scale = 1 / max(math.sqrt(w * w + x * x + y * y + z * z), 1e-12)
    w, x, y, z = w * scale, x * scale, y * scale, z * scale
    R[0, 0], R[0, 1], R[0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    R[1, 0], R[1, 1], R[1, 2] = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    R[2, 0], R[2, 1], R[2, 2] = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    return w, x, y, z, scale


@njit(**INNER)
def rotation_backward(unit, D, out):
    """Adds to ``out`` the gradient of a quaternion, from the gradient ``D`` of its rotation."""
    w, x, y, z, scale = unit
    dw = 2 * (x * (D[2, 1] - D[1, 2]) + y * (D[0, 2] - D[2, 0]) + z * (D[1, 0] - D[0, 1]))
    dx = 2 * (y * (D[0, 1] + D[1, 0]) + z * (D[0, 2] + D[2, 0]) + w * (D[2, 1] - D[1, 2]))
    dy = 2 * (x * (D[0, 1] + D[1, 0]) + z * (D[1, 2] + D[2, 1]) + w * (D[0, 2] - D[2, 0]))
    dz = 2 * (x * (D[0, 2] + D[2, 0]) + y * (D[1, 2] + D[2, 1]) + w * (D[1, 0] - D[0, 1]))
    dx -= 4 * x * (D[1, 1] + D[2, 2])
    dy -= 4 * y * (D[0, 0] + D[2, 2])
    dz -= 4 * z * (D[0, 0] + D[1, 1])
    along = dw * w + dx * x + dy * y + dz * z  # normalisation removes what only changes |q|
    out[0], out[1] = (dw - along * w) * scale, (dx - along * x) * scale
    out[2], out[3] = (dy - along * y) * scale, (dz - along * z) * scale


@njit(**INNER)
def covariance(quat, scales, R, S):
    """S = R diag(s)^2 R^T, and R on the way."""
    unit = rotation(quat, R)
    for i in range(3):
        for j in range(i, 3):
            total = 0.0
            for k in range(3):
                s = 1.0 * scales[k]
                total += R[i, k] * R[j, k] * s * s
            S[i, j] = S[j, i] = total
    return unit


@njit(**INNER)
def affine(view, K, x, y, z, width, height, M):
    """M = J W (2 x 3) of reference.project, with u' and v' and whether they are unclamped."""
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    mx, my = 0.15 * width / fx, 0.15 * height / fy
    u, v = x / z, y / z
    u_ = min(max(u, -cx / fx - mx), (width - cx) / fx + mx)
    v_ = min(max(v, -cy / fy - my), (height - cy) / fy + my)
    for j in range(3):
        M[0, j] = fx / z * (view[0, j] - u_ * view[2, j])
        M[1, j] = fy / z * (view[1, j] - v_ * view[2, j])
    return u_, v_, u_ == u, v_ == v


@njit(**INNER)
def transform(view, mean):
    """W m + t."""
    x, y, z = 1.0 * mean[0], 1.0 * mean[1], 1.0 * mean[2]
    return (
        view[0, 0] * x + view[0, 1] * y + view[0, 2] * z + view[0, 3],
        view[1, 0] * x + view[1, 1] * y + view[1, 2] * z + view[1, 3],
        view[2, 0] * x + view[2, 1] * y + view[2, 2] * z + view[2, 3],
    )


@njit(**INNER)
def times(M, S, Y):
    """Y = M S for the 2 x 3 matrix M, and the three entries of M S M^T."""
    for j in range(3):
        Y[0, j] = M[0, 0] * S[0, j] + M[0, 1] * S[1, j] + M[0, 2] * S[2, j]
        Y[1, j] = M[1, 0] * S[0, j] + M[1, 1] * S[1, j] + M[1, 2] * S[2, j]
    xx = Y[0, 0] * M[0, 0] + Y[0, 1] * M[0, 1] + Y[0, 2] * M[0, 2]
    xy = Y[0, 0] * M[1, 0] + Y[0, 1] * M[1, 1] + Y[0, 2] * M[1, 2]
    yy = Y[1, 0] * M[1, 0] + Y[1, 1] * M[1, 1] + Y[1, 2] * M[1, 2]
    return xx, xy, yy


@kernel(**OPTIONS)
def project_forward(
    means, quats, scales, opacities, views, Ks, width, height, near, far, eps2d,
    scratch, means2d, conics, depths, extents,
):  # fmt: skip
    """Writes the last four, the results of reference.project. ``scratch`` (workers, 8, 3, 3)."""
    n, workers = len(means), len(scratch)
    for worker in prange(workers):
        R, S, M, Y = scratch[worker, 0], scratch[worker, 1], scratch[worker, 2], scratch[worker, 3]
        for g in range(worker * n // workers, (worker + 1) * n // workers):
            covariance(quats[g], scales[g], R, S)
            faint = not opacities[g] >= ALPHA_MIN
            sigmas = min(EXTENT_MAX, math.sqrt(2 * math.log(max(opacities[g] / ALPHA_MIN, 1.0))))
            for c in range(len(views)):
                means2d[c, g, 0] = means2d[c, g, 1] = 0
                conics[c, g, 0], conics[c, g, 1], conics[c, g, 2] = 1, 0, 1
                depths[c, g] = 1
                extents[c, g, 0] = extents[c, g, 1] = 0
                x, y, z = transform(views[c], means[g])
                if faint or not (near < z < far):
                    continue
                affine(views[c], Ks[c], x, y, z, width, height, M)
                xx, xy, yy = times(M, S, Y)
                xx, yy = xx + eps2d, yy + eps2d
                det = xx * yy - xy * xy
                if not (0 < det < math.inf):
                    continue
                x = Ks[c, 0, 0] * x / z + Ks[c, 0, 2]
                y = Ks[c, 1, 1] * y / z + Ks[c, 1, 2]
                means2d[c, g, 0], means2d[c, g, 1], depths[c, g] = x, y, z
                conics[c, g, 0], conics[c, g, 1], conics[c, g, 2] = yy / det, -xy / det, xx / det
                ex, ey = sigmas * math.sqrt(xx), sigmas * math.sqrt(yy)
                rx, ry = math.ceil(ex), math.ceil(ey)
                if x + rx > 0 and x - rx < width and y + ry > 0 and y - ry < height:
                    extents[c, g, 0], extents[c, g, 1] = ex, ey


@kernel(**OPTIONS)
def project_backward(
    means, quats, scales, views, Ks, width, height, extents, conics,
    g_means2d, g_conics, g_depths, scratch, d_means, d_quats, d_scales, d_views,
):  # fmt: skip
    """Gradients from those of means2d, conics and depths. With C = M S M^T + eps2d I, Q = C^-1,
    G the gradient of Q: H = dL/dC = -Q G Q, dL/dS = M^T H M, dL/dM = 2 H M S; then M = J W,
    S = (R s)(R s)^T, and the perspective division. ``d_views`` (workers, C, 3, 4)."""
    n, workers = len(means), len(scratch)
    for worker in prange(workers):
        own = scratch[worker]
        R, S, D, M, Y, dM, dS, point = (
            own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7, 0],
        )  # fmt: skip
        for g in range(worker * n // workers, (worker + 1) * n // workers):
            unit = covariance(quats[g], scales[g], R, S)
            for i in range(3):
                for j in range(3):
                    dS[i, j] = 0
            m0, m1, m2 = 0.0, 0.0, 0.0
            for c in range(len(views)):
                if extents[c, g, 0] == 0:
                    continue
                view, K, d_view = views[c], Ks[c], d_views[worker, c]
                x, y, z = transform(view, means[g])
                u, v, u_free, v_free = affine(view, K, x, y, z, width, height, M)
                times(M, S, Y)
                qa, qb, qc = 1.0 * conics[c, g, 0], 1.0 * conics[c, g, 1], 1.0 * conics[c, g, 2]
                ga, gb, gc = (
                    1.0 * g_conics[c, g, 0],
                    0.5 * g_conics[c, g, 1],
                    1.0 * g_conics[c, g, 2],
                )
                p, q = qa * ga + qb * gb, qa * gb + qb * gc
                r, s = qb * ga + qc * gb, qb * gb + qc * gc
                hxx, hxy, hyy = -(p * qa + q * qb), -(p * qb + q * qc), -(r * qb + s * qc)
                jx, jy = K[0, 0] / z, K[1, 1] / z
                djx, djy, du, dv = 0.0, 0.0, 0.0, 0.0
                for j in range(3):
                    dM[0, j] = 2 * (hxx * Y[0, j] + hxy * Y[1, j])
                    dM[1, j] = 2 * (hxy * Y[0, j] + hyy * Y[1, j])
                    djx += dM[0, j] * (view[0, j] - u * view[2, j])
                    djy += dM[1, j] * (view[1, j] - v * view[2, j])
                    du -= jx * dM[0, j] * view[2, j]
                    dv -= jy * dM[1, j] * view[2, j]
                    hx, hy = hxx * M[0, j] + hxy * M[1, j], hxy * M[0, j] + hyy * M[1, j]
                    for i in range(3):
                        dS[i, j] += M[0, i] * hx + M[1, i] * hy
                du = (du if u_free else 0.0) + K[0, 0] * g_means2d[c, g, 0]
                dv = (dv if v_free else 0.0) + K[1, 1] * g_means2d[c, g, 1]
                point[0], point[1] = du / z, dv / z
                point[2] = g_depths[c, g] - (djx * jx + djy * jy + (du * x + dv * y) / z) / z
                m0 += view[0, 0] * point[0] + view[1, 0] * point[1] + view[2, 0] * point[2]
                m1 += view[0, 1] * point[0] + view[1, 1] * point[1] + view[2, 1] * point[2]
                m2 += view[0, 2] * point[0] + view[1, 2] * point[1] + view[2, 2] * point[2]
                for i in range(3):
                    for j in range(3):
                        d_view[i, j] += point[i] * means[g, j]
                    d_view[i, 3] += point[i]
                for j in range(3):
                    d_view[0, j] += jx * dM[0, j]
                    d_view[1, j] += jy * dM[1, j]
                    d_view[2, j] -= jx * u * dM[0, j] + jy * v * dM[1, j]
            d_means[g, 0], d_means[g, 1], d_means[g, 2] = m0, m1, m2
            for k in range(3):
                s, total = 1.0 * scales[g, k], 0.0
                for i in range(3):  # dL/d(R s) = 2 dS (R s)
                    d = 2 * s * (dS[i, 0] * R[0, k] + dS[i, 1] * R[1, k] + dS[i, 2] * R[2, k])
                    total += d * R[i, k]
                    D[i, k] = d * s
                d_scales[g, k] = total
            rotation_backward(unit, D, d_quats[g])


# ----------------------------------------------------------------------------- autograd
def _array(tensor):
    """A contiguous numpy view (or copy) of a tensor."""
    return tensor.detach().contiguous().numpy()


def tile_for(cameras: int, width: int, height: int, workers: int) -> int:
    """The tile size: large, unless that leaves threads without work."""
    tiles = cameras * -(-width // TILE) * -(-height // TILE)
    return TILE if tiles >= 4 * workers else SMALL_TILE


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, viewmats, Ks, *settings):
        n, cameras = len(means), len(viewmats)
        means2d, conics = torch.empty(cameras, n, 2), torch.empty(cameras, n, 3)
        depths, extents = torch.empty(cameras, n), torch.empty(cameras, n, 2)
        ctx.workers = workers_for(n * cameras)
        run(
            project_forward, ctx.workers, _array(means), _array(quats), _array(scales),
            _array(opacities), _array(viewmats.double()), _array(Ks.double()), *settings,
            np.empty((ctx.workers, 8, 3, 3)),
            means2d.numpy(), conics.numpy(), depths.numpy(), extents.numpy(),
        )  # fmt: skip
        ctx.size = settings[:2]
        ctx.save_for_backward(means, quats, scales, viewmats, Ks, extents, conics)
        ctx.mark_non_differentiable(extents)
        return means2d, conics, depths, extents

    @staticmethod
    def backward(ctx, g_means2d, g_conics, g_depths, _):
        means, quats, scales, viewmats, Ks, extents, conics = ctx.saved_tensors
        grads = [torch.empty(x.shape) for x in (means, quats, scales)]
        d_views = torch.zeros(ctx.workers, len(viewmats), 3, 4, dtype=torch.float64)
        run(
            project_backward, ctx.workers, _array(means), _array(quats), _array(scales),
            _array(viewmats.double()), _array(Ks.double()), *ctx.size, _array(extents),
            _array(conics), _array(g_means2d), _array(g_conics), _array(g_depths),
            np.empty((ctx.workers, 8, 3, 3)), *(g.numpy() for g in grads), d_views.numpy(),
        )  # fmt: skip
        d_viewmats = torch.zeros(len(viewmats), 4, 4)
        d_viewmats[:, :3] = d_views.sum(0)
        return (*grads, None, d_viewmats, *[None] * 6)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, means2d, conics, opacities, colors, depths, backgrounds, with_depth, extents, width,
        height, keep_absgrad, tile,
    ):  # fmt: skip
        cameras, n = depths.shape
        channels = colors.shape[-1] + int(with_depth)
        color, depth, opacity = _array(colors), _array(depths), _array(opacities)
        color = color[None] if color.ndim == 2 else color
        workers = workers_for(n * cameras)
        tile = tile or tile_for(cameras, width, height, workers)
        records, rank, starts, begins, ids, slots = make_lists(
            _array(means2d), _array(conics), opacity, _array(extents), depth, tile,
            -(-width // tile), -(-height // tile), workers,
        )  # fmt: skip
        order, shape = deal(begins, workers), (cameras, channels, height, width)
        image, left = torch.empty(shape), torch.empty(cameras, height, width)
        background = np.zeros((cameras, channels), np.float32)
        if backgrounds is not None:
            background[:, : colors.shape[-1]] = _array(backgrounds)
        states, ends = kernels.new_states(workers, 5, tile), np.empty(len(order), np.int64)
        for first in range(0, channels, CHANNELS):
            last = min(first + CHANNELS, channels)
            run(kernels.set_channels, workers, records, rank, color, depth, first, last)
            run(
                kernels.blend, workers, records, ids, begins, order, tile, background, first,
                shape, states, ends, image.numpy().ravel(), left.numpy().ravel(),
            )  # fmt: skip
        # Planes are what the kernels and a VAE like; callers see gsplat's (C, H, W, D).
        image, alpha = image.permute(0, 2, 3, 1), (1 - left).unsqueeze(-1)
        ctx.lists = records, rank, starts, begins, ids, slots, ends, order
        ctx.settings = shape, tile, workers, backgrounds is not None, keep_absgrad
        ctx.save_for_backward(opacities, colors, depths, image, left)
        return image, alpha

    @staticmethod
    def backward(ctx, g_image, g_alpha):
        records, rank, starts, begins, ids, slots, ends, order = ctx.lists
        opacities, colors, depths, image, left = ctx.saved_tensors
        shape, tile, workers, has_background, keep_absgrad = ctx.settings
        cameras, n = depths.shape
        g_image = g_image.permute(0, 3, 1, 2)
        maps = [_array(x).ravel() for x in (image.permute(0, 3, 1, 2), left, g_image, g_alpha)]
        color, depth, opacity = _array(colors), _array(depths), _array(opacities)
        color = color[None] if color.ndim == 2 else color
        shapes = [(cameras, n, 2), (cameras, n, 3), (n,), color.shape, (cameras, n)]
        grads = [torch.zeros(x) for x in shapes]
        absolute = torch.zeros(cameras, n, 2) if keep_absgrad else None
        states = kernels.new_states(workers, 6, tile)
        sums, totals = (
            np.empty(len(slots) * kernels.SLOT, np.float32),
            np.empty((workers, 16), "f4"),
        )
        for first in range(0, shape[1], CHANNELS):
            last = min(first + CHANNELS, shape[1])
            if first > 0:
                maps[3] = 0 * maps[3]  # the alphas' share is counted once
            if shape[1] > CHANNELS:
                run(kernels.set_channels, workers, records, rank, color, depth, first, last)
            run(
                kernels.unblend, workers, records, ids, slots, begins, ends, order, tile, first,
                shape, states, *maps, True if keep_absgrad else None, sums,
            )  # fmt: skip
            run(
                kernels.collect, workers, rank, starts, sums, opacity, totals, first, last,
                *(g.numpy() for g in grads), None if absolute is None else absolute.numpy(),
            )  # fmt: skip
        d_means2d, d_conics, d_opacities, d_colors, d_depths = grads
        if keep_absgrad:
            keep_absgrad(absolute)
        d_background = None
        if has_background:
            d_background = (left[:, None] * g_image[:, : colors.shape[-1]]).sum((2, 3))
        d_colors = d_colors.view(colors.shape)
        return d_means2d, d_conics, d_opacities, d_colors, d_depths, d_background, *[None] * 6


def _float(tensor):
    """On the CPU in single precision (differentiably)."""
    return tensor.to("cpu", torch.float32)


def project(
    means, quats, scales, opacities, viewmats, Ks, width, height, near_plane, far_plane, eps2d
):
    """See ``reference.project``; single precision, on the CPU. No gradient to Ks."""
    inputs = [_float(x) for x in (means, quats, scales, opacities.detach(), viewmats, Ks)]
    return _Project.apply(*inputs, width, height, near_plane, far_plane, eps2d)


def composite(
    means2d, conics, opacities, colors, depths, extents, width, height, backgrounds=None,
    with_depth=False, keep_absgrad=None, tile=None,
):  # fmt: skip
    """See ``reference.composite``; single precision, on the CPU. ``colors`` (N, D) shared by
    the cameras, or (C, N, D). ``keep_absgrad(Tensor (C, N, 2))`` is called during backward with
    the sums over pixels of |dL/dmean2d| (AbsGS, arXiv 2404.10484). ``tile``: 16 or 32 pixels; by
    itself it takes the one that keeps the threads busy."""
    inputs = [_float(x) for x in (means2d, conics, opacities, colors, depths)]
    backgrounds = None if backgrounds is None else _float(backgrounds)
    return _Composite.apply(
        *inputs, backgrounds, with_depth, _float(extents), width, height, keep_absgrad, tile
    )


# ------------------------------------------------------------------------------- backend
def is_compiled() -> bool:
    """Whether what draws a picture was compiled by an earlier process."""
    lists = sort_cameras, count_pairs, fill_lists
    return are_kept((project_forward, *lists, kernels.set_channels, kernels.blend))


def refuses(**arguments: Any) -> str:
    """Why the compiled rasteriser cannot draw this; empty if it can."""
    channels, chunk = channels_of(arguments), arguments["channel_chunk"]
    if arguments["absgrad"] and channels > CHANNELS:
        return f"absgrad is for {CHANNELS} channels at most, not {channels}: depth counts as one"
    if chunk < CHANNELS:
        return f"channel_chunk={chunk} is not supported, only {CHANNELS} or more"
    return unsupported(arguments, tile_size=(TILE,))


def rasterization(**arguments: Any) -> Drawn:
    """See :func:`lods.gaussians.rasterization`."""
    tile = None if arguments["tile_size"] == PLAIN["tile_size"] else arguments["tile_size"]
    return project_and_blend(project, composite, arguments, tile=tile)
