"""Compiled blending of 2D Gaussians into tiles, forwards and backwards (numba, CPU).

The formulas are those of ``lods.gaussians.reference.composite``. Three steps, each one call:

* ``lists.make_lists``: per camera the drawn Gaussians sorted by depth, and per tile the list
  of the Gaussians whose ellipse alpha >= 1/255 meets it.
* ``blend``: a tile's state (transmittance and colours per pixel) lies in planes of one small
  buffer that stays in the L1 cache. The loop over Gaussians is outside; inside it a Gaussian
  visits only the rows and blocks of eight pixels that its ellipse touches.
* ``unblend``: the same walk with the gradients, summed per (Gaussian, tile) into slots of their
  own, which ``collect`` adds up per Gaussian: no two threads ever write to one place.

Memory is linear in pixels + Gaussians + (Gaussian, tile) pairs.
"""

# numba gives its intrinsics the first argument, which the calls here do not have
# pyright: reportCallIssue=false

import math

import numpy as np
from lods.gaussians.backends.lists import HALF, LOG2_E, MARGIN, ONE, RECORD, ZERO, strip
from lods.gaussians.backends.simd import (
    INNER,
    OPTIONS,
    abs8,
    any8,
    lanes,
    ldexp8,
    load8,
    max8,
    min8,
    minus_abs8,
    round8,
    select,
    splat,
    store8,
    sums8,
)
from lods.gaussians.kernel_cache import kernel
from numba import njit, prange

SLOT = 12  # floats of the sums that unblend leaves per (Gaussian, tile)
CHECK = 32  # Gaussians between two looks where a tile is opaque already

ALPHA_MIN = np.float32(1 / 255)
ALPHA_MAX = np.float32(0.999)
TRANSMITTANCE_MIN = np.float32(1e-4)
HALF_LOG2_E = np.float32(0.5) * LOG2_E
TWO, THREE, FOUR, FIVE = np.uint64(2), np.uint64(3), np.uint64(4), np.uint64(5)


# What the inner loops need beside the pixels lies behind the planes of ``state``, eight wide each:
# as operands in memory these numbers cost no instruction, as literals two or three.
CONSTANTS = (
    *(1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341),
    *(0.009671512991189957, 0.001326472731307149, -100.0),
    *(float(ALPHA_MIN), float(ALPHA_MAX), float(TRANSMITTANCE_MIN)),
)


def new_states(workers, planes, tile):
    """Per worker, room for planes of tile x tile floats, with the constants behind them."""
    constants = np.repeat(np.array(CONSTANTS, np.float32), 8)
    states = np.empty((workers, planes * tile * tile + len(constants)), np.float32)
    states[:, planes * tile * tile :] = constants
    return states


@njit(**INNER)
def constant(state, end, i):
    return load8(state, end + np.uint64(8 * i))


@njit(**INNER)
def exp2_8(x, state, end):
    """2^x of eight floats, relative error below 3e-7; 2^-100 where x is less than -100
    (lower, products of it would become denormal numbers, which are slow).

    x = n + f with |f| <= 1/2: 2^n by the exponent bits, 2^f by the polynomial of degree 5 whose
    coefficients minimise the largest relative error (fitted for this file)."""
    x = max8(x, constant(state, end, 6))
    n = round8(x)
    f = x - n
    p = f * constant(state, end, 5) + constant(state, end, 4)
    p = p * f + constant(state, end, 3)
    p = p * f + constant(state, end, 2)
    p = p * f + constant(state, end, 1)
    p = p * f + constant(state, end, 0)
    return ldexp8(p, n)


@njit(**INNER)
def add8(array, index, value):
    store8(array, index, load8(array, index) + value)


@njit(**INNER)
def box(records, r, left, top, tile, live):
    """The pixels of a tile in a Gaussian's bounding box: its centre (x, y) relative to the
    tile's first pixel centre, the rows [y0, y1) and, as the columns are visited in blocks of
    eight that must not leave the tile, the first column and the number of blocks: none if all
    cells (see ``live_cells``) are finished."""
    x, y = records[r] - left - HALF, records[r + 1] - top - HALF
    ex, ey = records[r + 6] + MARGIN, records[r + 7] + MARGIN
    x0, x1 = max(0, math.ceil(x - ex)), min(tile, math.floor(x + ex) + 1)
    y0, y1 = max(0, math.ceil(y - ey)), min(tile, math.floor(y + ey) + 1)
    # The cells it meets: the columns' bits, repeated in every row, of the rows' bits.
    columns = (2 << ((x1 - 1) >> 3)) - (1 << (x0 >> 3))
    cells = columns * 0x1111 & ((16 << ((y1 - 1) >> 3 << 2)) - (1 << (y0 >> 3 << 2)))
    blocks = (x1 - x0 + 7) >> 3 if x1 > x0 and y1 > y0 and cells & live else 0
    return x, y, y0, y1, min(x0, tile - 8 * blocks), blocks


@njit(**INNER)
def rows(records, r, x, y, y0, y1, column, blocks):
    """The rows of one block of columns; exact for Gaussians wider than a block."""
    if blocks > 1:
        low, high = strip(records, r, np.float32(column) - x, np.float32(column + 7) - x)
        y0, y1 = max(y0, math.ceil(y + low)), min(y1, math.floor(y + high) + 1)
    return y0, y1


@njit(**INNER)
def live_cells(state, tile):
    """Which cells of 8 x 8 pixels take more Gaussians: bit 4 row + column of an integer."""
    live = 0
    for v in range(0, tile, 8):
        for u in range(0, tile, 8):
            best = load8(state, np.uint64(v * tile + u))
            for row in range(v + 1, v + 8):
                best = max8(best, load8(state, np.uint64(row * tile + u)))
            if any8(best > ZERO):
                live |= 1 << ((v >> 1) + (u >> 3))
    return live


@njit(**INNER)
def blend_tile(records, ids, begin, end, left, top, tile, state):
    """Blends ``ids[begin:end]`` front to back into the planes of ``state``: the transmittance,
    negative once a pixel is finished, and four channels. Returns the end of what was needed."""
    plane = np.uint64(tile * tile)
    known = plane * np.uint64(5)
    live = -1
    for e in range(begin, end):
        if (e - begin) % CHECK == CHECK - 1:
            live = live_cells(state, tile)
            if live == 0:
                return e
        r = np.uint64(ids[e]) * np.uint64(RECORD)
        x, y, y0, y1, first, blocks = box(records, r, left, top, tile, live)
        a, b, c, log_opacity = records[r + 2], records[r + 3], records[r + 4], records[r + 5]
        a, b, c = a * -HALF_LOG2_E, b * -LOG2_E, c * -HALF_LOG2_E
        c0, c1, c2, c3 = records[r + 8], records[r + 9], records[r + 10], records[r + 11]
        for block in range(blocks):
            column = first + 8 * block
            v0, v1 = rows(records, r, x, y, y0, y1, column, blocks)
            dx = lanes() + (np.float32(column) - x)
            dy = splat(np.float32(v0) - y)
            square, cross = dx * dx * a + log_opacity, dx * b
            at = np.uint64(v0 * tile + column)
            for _ in range(v0, v1):
                raw = exp2_8((dy * c + cross) * dy + square, state, known)
                alpha = min8(raw, constant(state, known, 8))
                alpha = select(raw >= constant(state, known, 7), alpha, ZERO)
                t = load8(state, at)
                taken = alpha * t
                after = t - taken
                open_ = after > constant(state, known, 9)
                weight = select(open_, taken, ZERO)
                store8(state, at, select(open_, after, minus_abs8(t)))
                add8(state, at + plane, weight * c0)
                add8(state, at + TWO * plane, weight * c1)
                add8(state, at + THREE * plane, weight * c2)
                add8(state, at + FOUR * plane, weight * c3)
                dy = dy + ONE
                at += np.uint64(tile)
    return end


@njit(**INNER)
def unblend_tile(records, ids, slots, begin, end, left, top, tile, state, sums, absolute):
    """The backward pass of ``blend_tile``, front to back as well, so that it repeats the very
    same transmittances.

    ``state`` has the planes T (as at the start), rest and the cotangents g_0..g_3, where rest
    = sum_i w_i (g . c_i) + T_end (g . background - g_alpha) over all Gaussians. Behind
    Gaussian i, rest has lost its terms 0..i, and then

        dL/dalpha_i = T_i (g . c_i) - rest / (1 - alpha_i),   dL/dc_i = w_i g

    With sigma = (a dx^2 + 2 b dx dy + c dy^2) / 2, alpha = o e^-sigma, and q = alpha_i dL/dalpha_i
    (zero where alpha was clamped or too faint), the 12 floats of a slot are the sums over the
    tile's pixels of q = o dL/do, q (a dx + b dy) and q (b dx + c dy) = dL/dmean2d, q dx^2, q dx dy
    and q dy^2 = -2 dL/da, -dL/db and -2 dL/dc, the magnitudes of the second and the third (0 if
    ``absolute`` is None), and w g_0, ..., w g_3."""
    plane = np.uint64(tile * tile)
    known = plane * np.uint64(6)
    live = -1
    for e in range(begin, end):
        if (e - begin) % CHECK == CHECK - 1:
            live = live_cells(state, tile)
        r = np.uint64(ids[e]) * np.uint64(RECORD)
        x, y, y0, y1, first, blocks = box(records, r, left, top, tile, live)
        a, b, c, log_opacity = records[r + 2], records[r + 3], records[r + 4], records[r + 5]
        a, b, c = a * -HALF_LOG2_E, b * -LOG2_E, c * -HALF_LOG2_E
        c0, c1, c2, c3 = records[r + 8], records[r + 9], records[r + 10], records[r + 11]
        shape, color = splat(ZERO), splat(ZERO)
        for block in range(blocks):
            column = first + 8 * block
            v0, v1 = rows(records, r, x, y, y0, y1, column, blocks)
            dx = lanes() + (np.float32(column) - x)
            dy = splat(np.float32(v0) - y)
            square, cross = dx * dx * a + log_opacity, dx * b
            q0, q1, q2 = splat(ZERO), splat(ZERO), splat(ZERO)
            s0, s1, s2, s3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
            ax, ay = splat(ZERO), splat(ZERO)
            at = np.uint64(v0 * tile + column)
            for _ in range(v0, v1):
                raw = exp2_8((dy * c + cross) * dy + square, state, known)
                alpha = min8(raw, constant(state, known, 8))
                seen = raw >= constant(state, known, 7)
                alpha = select(seen, alpha, ZERO)
                t = load8(state, at)
                taken = alpha * t
                after = t - taken
                open_ = after > constant(state, known, 9)
                weight = select(open_, taken, ZERO)
                store8(state, at, select(open_, after, minus_abs8(t)))
                g0, g1 = load8(state, at + TWO * plane), load8(state, at + THREE * plane)
                g2, g3 = load8(state, at + FOUR * plane), load8(state, at + FIVE * plane)
                s0, s1, s2, s3 = (
                    s0 + weight * g0,
                    s1 + weight * g1,
                    s2 + weight * g2,
                    s3 + weight * g3,
                )
                gc = g0 * c0 + g1 * c1 + g2 * c2 + g3 * c3
                rest = load8(state, at + plane) - weight * gc
                store8(state, at + plane, rest)
                q = raw * (t * gc - rest / (constant(state, known, 0) - alpha))
                q = select(seen & open_ & (raw <= constant(state, known, 8)), q, ZERO)
                q_dy = q * dy
                q0, q1, q2 = q0 + q, q1 + q_dy, q2 + q_dy * dy
                if absolute is not None:
                    ax = ax + abs8(q * (dx * records[r + 2] + dy * records[r + 3]))
                    ay = ay + abs8(q * (dx * records[r + 3] + dy * records[r + 4]))
                dy = dy + ONE
                at += np.uint64(tile)
            q_dx = q0 * dx
            x_sum = q_dx * records[r + 2] + q1 * records[r + 3]
            y_sum = q_dx * records[r + 3] + q1 * records[r + 4]
            shape = shape + sums8(q0, x_sum, y_sum, q_dx * dx, q1 * dx, q2, ax, ay)
            color = color + sums8(s0, s1, s2, s3, s0, s1, s2, s3)
        # Eight colour sums (the four, twice); the shape then overwrites the first four of them.
        slot = np.uint64(slots[e]) * np.uint64(SLOT)
        store8(sums, slot + FOUR, color)
        store8(sums, slot, shape)


# ------------------------------------------------------------------------------- drivers
@kernel(**OPTIONS)
def set_channels(records, rank, colors, depths, first, last):
    """Puts channels first .. last - 1 (at most four, the rest is 0) into the records. Channel d is
    ``colors[:, :, d]`` (C or 1, N, D), channel D is the depth (C, N)."""
    channels = colors.shape[2]
    for g in prange(rank.shape[1]):
        for c in range(rank.shape[0]):
            if rank[c, g] >= 0:
                r = rank[c, g] * RECORD + 8
                for d in range(4):
                    if first + d >= last:
                        records[r + d] = ZERO
                    elif first + d == channels:
                        records[r + d] = depths[c, g]
                    else:
                        records[r + d] = colors[c if colors.shape[0] > 1 else 0, g, first + d]


@njit(**INNER)
def place(k, tile, width, height):
    """Tile number k: its camera, first column and row, and its size inside the image."""
    tiles_x, tiles_y = (width + tile - 1) // tile, (height + tile - 1) // tile
    x, y = k % tiles_x * tile, k // tiles_x % tiles_y * tile
    return k // (tiles_x * tiles_y), x, y, min(tile, width - x), min(tile, height - y)


@njit(**INNER)
def clear(state, planes, tile, w, h):
    """Transmittance 1 for the pixels of the image, -1 (finished) for those beyond its border; the
    other planes are 0."""
    for at in range(tile * tile, planes * tile * tile, 8):
        store8(state, np.uint64(at), splat(ZERO))
    for v in range(tile):
        for u in range(0, tile, 8):
            inside = lanes() + u < (w if v < h else 0)
            store8(state, np.uint64(v * tile + u), select(inside, ONE, -ONE))


@njit(**INNER)
def write_row(state, at, channels, plane, w, image, i, left, j, area, background, first):
    """One row of a finished tile to the image: colour + T background, and T."""
    for u in range(0, w, 8):
        for d in range(channels):
            to, color = np.uint64(i + d * area + u), np.uint64(at + (d + 1) * plane + u)
            if u + 8 <= w:
                t = abs8(load8(state, np.uint64(at + u)))
                store8(image, to, load8(state, color) + t * background[first + d])
                store8(left, np.uint64(j + u), t)
            else:
                for k in range(np.uint64(0), np.uint64(w - u)):
                    t = abs(state[np.uint64(at + u) + k])
                    image[to + k] = state[color + k] + t * background[first + d]
                    left[np.uint64(j + u) + k] = t


@njit(**INNER)
def read_row(state, at, channels, plane, w, image, g_image, i, left, g_alpha, j, area):
    """One row of the cotangents, and of rest = sum_d g_d image_d - T_end g_alpha."""
    for u in range(0, w, 8):
        rest, px = np.uint64(at + plane + u), np.uint64(j + u)
        whole, tail = u + 8 <= w, np.uint64(w - u)
        if whole:
            store8(state, rest, load8(left, px) * load8(g_alpha, px) * -ONE)
        else:
            for k in range(np.uint64(0), tail):
                state[rest + k] = -left[px + k] * g_alpha[px + k]
        for d in range(channels):
            to, frm = np.uint64(at + (d + 2) * plane + u), np.uint64(i + d * area + u)
            if whole:
                g = load8(g_image, frm)
                store8(state, to, g)
                add8(state, rest, g * load8(image, frm))
            else:
                for k in range(np.uint64(0), tail):
                    state[to + k] = g_image[frm + k]
                    state[rest + k] += g_image[frm + k] * image[frm + k]


@kernel(**OPTIONS)
def blend(
    records, ids, begins, order, tile, background, first, shape, states, ends, image, left
):  # fmt: skip
    """Draws all tiles of all cameras, ``shape`` = (cameras, channels, height, width).

    Writes channels first .. first + 3 of the flat ``image``, over ``background`` (C, D), the flat
    ``left`` (C, H, W), the transmittance that is left over, and per tile in ``ends`` the end of
    the entries that were needed."""
    _, channels, height, width = shape
    drawn, plane, workers = min(4, channels - first), tile * tile, len(states)
    for worker in prange(workers):
        state = states[worker]
        for n in range(worker, len(order), workers):
            k = order[n]
            c, x, y, w, h = place(k, tile, width, height)
            clear(state, 5, tile, w, h)
            ends[k] = blend_tile(
                records, ids, begins[k], begins[k + 1], np.float32(x), np.float32(y), tile, state
            )
            for v in range(h):
                i = ((c * channels + first) * height + y + v) * width + x
                j = (c * height + y + v) * width + x
                write_row(
                    state, v * tile, drawn, plane, w, image, i, left, j, height * width,
                    background[c], first,
                )  # fmt: skip


@kernel(**OPTIONS)
def unblend(
    records, ids, slots, begins, ends, order, tile, first, shape, states, image, left, g_image,
    g_alpha, absolute, sums,
):  # fmt: skip
    """The backward pass of ``blend``; fills ``sums`` (see ``unblend_tile``)."""
    _, channels, height, width = shape
    drawn, plane, workers = min(4, channels - first), tile * tile, len(states)
    for worker in prange(workers):
        state = states[worker]
        for n in range(worker, len(order), workers):
            k = order[n]
            c, x, y, w, h = place(k, tile, width, height)
            clear(state, 6, tile, w, h)
            for v in range(h):
                i = ((c * channels + first) * height + y + v) * width + x
                j = (c * height + y + v) * width + x
                read_row(
                    state, v * tile, drawn, plane, w, image, g_image, i, left, g_alpha, j,
                    height * width,
                )  # fmt: skip
            unblend_tile(
                records, ids, slots, begins[k], ends[k], np.float32(x), np.float32(y), tile,
                state, sums, absolute,
            )  # fmt: skip
            for e in range(ends[k], begins[k + 1]):
                slot = np.uint64(slots[e]) * np.uint64(SLOT)
                store8(sums, slot, splat(ZERO))
                store8(sums, slot + FOUR, splat(ZERO))


@kernel(**OPTIONS)
def collect(
    rank, starts, sums, opacities, totals, first, last,
    d_means2d, d_conics, d_opacities, d_colors, d_depths, d_absolute,
):  # fmt: skip
    """Adds up the sums (see ``unblend_tile``) of all slots of a Gaussian, and those of all cameras
    where an input is shared (``d_colors`` (C or 1, N, D)). ``d_absolute`` may be None."""
    channels, n, workers = d_colors.shape[2], rank.shape[1], len(totals)
    for worker in prange(workers):
        total = totals[worker]
        for g in range(worker * n // workers, (worker + 1) * n // workers):
            opacity = ZERO
            for c in range(rank.shape[0]):
                p = rank[c, g]
                if p < 0:
                    continue
                shape, color = splat(ZERO), splat(ZERO)
                for i in range(starts[p], starts[p + 1]):
                    shape = shape + load8(sums, np.uint64(i * SLOT))
                    color = color + load8(sums, np.uint64(i * SLOT + 4))
                store8(total, np.uint64(4), color)
                store8(total, np.uint64(0), shape)
                opacity += total[0]
                d_means2d[c, g, 0] += total[1]
                d_means2d[c, g, 1] += total[2]
                d_conics[c, g, 0] -= HALF * total[3]
                d_conics[c, g, 1] -= total[4]
                d_conics[c, g, 2] -= HALF * total[5]
                if d_absolute is not None:
                    d_absolute[c, g, 0] += total[6]
                    d_absolute[c, g, 1] += total[7]
                for d in range(first, last):
                    if d == channels:
                        d_depths[c, g] += total[8 + d - first]
                    else:
                        d_colors[c if d_colors.shape[0] > 1 else 0, g, d] += total[8 + d - first]
            d_opacities[g] += opacity / max(opacities[g], ALPHA_MIN)
