"""Compiled blending of 2D Gaussians into tiles, forwards and backwards (numba, CPU).

The formulas are those of ``raster_torch.composite``. Three steps, each one call:

* ``make_lists``: per camera the drawn Gaussians sorted by depth (radix sort), one cache line of
  numbers for each, and per tile the list of the Gaussians whose ellipse alpha >= 1/255 meets it.
* ``blend``: a tile's state (transmittance and colours per pixel) lies in planes of one small
  buffer that stays in the L1 cache. The loop over Gaussians is outside; inside it a Gaussian
  visits only the rows and blocks of eight pixels that its ellipse touches.
* ``unblend``: the same walk with the gradients, summed per (Gaussian, tile) into slots of their
  own, which ``collect`` adds up per Gaussian: no two threads ever write to one place.

Memory is linear in pixels + Gaussians + (Gaussian, tile) pairs.
"""

import math

import numpy as np
from numba import njit, prange

from .raster_simd import (
    abs8,
    any8,
    lanes,
    ldexp8,
    load8,
    max8,
    min8,
    round8,
    select,
    splat,
    store8,
    sums8,
)

SIMD_VERSION = 1
RECORD = 16  # floats of a Gaussian's record, one cache line
SLOT = 12  # floats of the sums that unblend leaves per (Gaussian, tile)
CHECK = 32  # Gaussians between two checks whether a tile is opaque everywhere
CHUNK = 2048  # Gaussians that one thread takes at a time

MARGIN = np.float32(0.01)  # pixels added to exact extents, against rounding
ALPHA_MIN = np.float32(1 / 255)
ALPHA_MAX = np.float32(0.999)
TRANSMITTANCE_MIN = np.float32(1e-4)
HALF, ONE, ZERO = np.float32(0.5), np.float32(1), np.float32(0)

# 'contract' only (fused multiply-add): reassociation would undo exp8's two-part ln 2.
INNER = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}
OPTIONS = {**INNER, "parallel": True, "cache": True, "nogil": True}


# ------------------------------------------------------------------------------ one tile
@njit(**INNER)
def exp8(x):
    """exp of eight floats in [-80, 80], relative error below 3e-7.

    x = n ln 2 + f with |f| <= ln(2) / 2; e^f by a polynomial of degree 5 whose coefficients
    minimise the largest relative error (fitted for this file), 2^n by the exponent bits."""
    n = round8(x * np.float32(1.4426950408889634))
    f = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = f * np.float32(0.008312525227665901) + np.float32(0.041890114545822144)
    p = p * f + np.float32(0.16667114198207855)
    p = p * f + np.float32(0.499992311000824)
    return ldexp8((p * f + ONE) * f + ONE, n)


@njit(**INNER)
def strip(records, r, low, high):
    """The exact range of dy over the part of an ellipse where low <= dx <= high.

    The boundary a dx^2 + 2 b dx dy + c dy^2 = s is dy = -b/c dx +- sqrt(s / c - det / c^2 dx^2);
    its upper branch is concave with its top at ``top``, so the highest point of the strip is
    where dx is nearest to ``top``; the lowest follows by symmetry."""
    slope, s_c, det_cc, top = records[r + 12], records[r + 13], records[r + 14], records[r + 15]
    up, down = min(max(top, low), high), min(max(-top, low), high)
    highest = slope * up + math.sqrt(max(s_c - det_cc * up * up, ZERO))
    lowest = slope * down - math.sqrt(max(s_c - det_cc * down * down, ZERO))
    return lowest - MARGIN, highest + MARGIN


@njit(**INNER)
def box(records, r, left, top, tile):
    """The pixels of a tile in a Gaussian's bounding box: its centre (x, y) relative to the
    tile's first pixel centre, the rows [y0, y1) and, as the columns are visited in blocks of
    eight that must not leave the tile, the first column and the number of blocks."""
    x, y = records[r] - left - HALF, records[r + 1] - top - HALF
    ex, ey = records[r + 6] + MARGIN, records[r + 7] + MARGIN
    x0, x1 = max(0, math.ceil(x - ex)), min(tile, math.floor(x + ex) + 1)
    y0, y1 = max(0, math.ceil(y - ey)), min(tile, math.floor(y + ey) + 1)
    blocks = max(0, x1 - x0 + 7) >> 3 if y1 > y0 else 0
    return x, y, y0, y1, min(x0, tile - 8 * blocks), blocks


@njit(**INNER)
def rows(records, r, x, y, y0, y1, column, blocks):
    """The rows of one block of columns; exact for Gaussians wider than a block."""
    if blocks > 1:
        low, high = strip(records, r, np.float32(column) - x, np.float32(column + 7) - x)
        y0, y1 = max(y0, math.ceil(y + low)), min(y1, math.floor(y + high) + 1)
    return y0, y1


@njit(**INNER)
def opaque(state, tile):
    """Whether no pixel of the tile takes more Gaussians."""
    best = splat(ZERO)
    for i in range(0, tile * tile, 8):
        best = max8(best, load8(state, np.uint64(i)))
    return not any8(best > ZERO)


@njit(**INNER)
def clear_pixels(state, tile, width, height):
    """Transmittance 1 for the pixels of the image, -1 (finished) for those beyond its border."""
    for y in range(tile):
        for x in range(tile):
            state[y * tile + x] = ONE if x < width and y < height else -ONE


@njit(**INNER)
def blend_tile(records, ids, begin, end, left, top, tile, state):
    """Blends ``ids[begin:end]`` front to back into the planes of ``state``: the transmittance,
    negative once a pixel is finished, and four channels. Returns the end of what was needed."""
    plane = np.uint64(tile * tile)
    for e in range(begin, end):
        if (e - begin) % CHECK == CHECK - 1 and opaque(state, tile):
            return e
        r = np.uint64(ids[e]) * np.uint64(RECORD)
        x, y, y0, y1, first, blocks = box(records, r, left, top, tile)
        a, b, c, log_opacity = records[r + 2], records[r + 3], records[r + 4], records[r + 5]
        c0, c1, c2, c3 = records[r + 8], records[r + 9], records[r + 10], records[r + 11]
        for block in range(blocks):
            column = first + 8 * block
            v0, v1 = rows(records, r, x, y, y0, y1, column, blocks)
            dx = lanes() + (np.float32(column) - x)
            square = dx * dx * (-HALF * a) + log_opacity
            cross = dx * (-b)
            for v in range(v0, v1):
                at = np.uint64(v * tile + column)
                t = load8(state, at)
                dy = np.float32(v) - y
                raw = exp8(max8(cross * dy + (square - HALF * c * dy * dy), np.float32(-80)))
                alpha = select(raw >= ALPHA_MIN, min8(raw, ALPHA_MAX), ZERO)
                taken = alpha * t
                after = t - taken
                live = after > TRANSMITTANCE_MIN
                weight = select(live, taken, ZERO)
                store8(state, at, select(live, after, ZERO - abs8(t)))
                at += plane
                store8(state, at, load8(state, at) + weight * c0)
                at += plane
                store8(state, at, load8(state, at) + weight * c1)
                at += plane
                store8(state, at, load8(state, at) + weight * c2)
                at += plane
                store8(state, at, load8(state, at) + weight * c3)
    return end


@njit(**INNER)
def unblend_tile(records, ids, slots, begin, end, left, top, tile, state, sums, absolute):
    """The backward pass of ``blend_tile``, front to back as well, so that it repeats the very
    same transmittances.

    ``state`` has the planes T (as at the start), rest and the cotangents g_0..g_3, where rest
    = sum_i w_i (g . c_i) + T_end (g . background - g_alpha) over all Gaussians. Behind
    Gaussian i, rest has lost its terms 0..i, and then

        dL/dalpha_i = T_i (g . c_i) - rest / (1 - alpha_i),   dL/dc_i = w_i g

    With q = alpha_i dL/dalpha_i (zero where alpha was clamped or too faint), the 12 floats of a
    slot are the sums over the tile's pixels of q, q dx, q dx^2, q dy, q dx dy, q dy^2,
    |q (a dx + b dy)|, |q (b dx + c dy)|, w g_0, ..., w g_3."""
    plane = np.uint64(tile * tile)
    for e in range(begin, end):
        r = np.uint64(ids[e]) * np.uint64(RECORD)
        x, y, y0, y1, first, blocks = box(records, r, left, top, tile)
        a, b, c, log_opacity = records[r + 2], records[r + 3], records[r + 4], records[r + 5]
        c0, c1, c2, c3 = records[r + 8], records[r + 9], records[r + 10], records[r + 11]
        shape, color = splat(ZERO), splat(ZERO)
        for block in range(blocks):
            column = first + 8 * block
            v0, v1 = rows(records, r, x, y, y0, y1, column, blocks)
            dx = lanes() + (np.float32(column) - x)
            square = dx * dx * (-HALF * a) + log_opacity
            cross = dx * (-b)
            q0, q1, q2 = splat(ZERO), splat(ZERO), splat(ZERO)
            s0, s1, s2, s3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
            ax, ay = splat(ZERO), splat(ZERO)
            for v in range(v0, v1):
                at = np.uint64(v * tile + column)
                t = load8(state, at)
                dy = np.float32(v) - y
                raw = exp8(max8(cross * dy + (square - HALF * c * dy * dy), np.float32(-80)))
                seen = raw >= ALPHA_MIN
                alpha = select(seen, min8(raw, ALPHA_MAX), ZERO)
                taken = alpha * t
                after = t - taken
                live = after > TRANSMITTANCE_MIN
                weight = select(live, taken, ZERO)
                store8(state, at, select(live, after, ZERO - abs8(t)))
                rest = load8(state, at + plane)
                g0, g1 = (
                    load8(state, at + np.uint64(2) * plane),
                    load8(state, at + np.uint64(3) * plane),
                )
                g2, g3 = (
                    load8(state, at + np.uint64(4) * plane),
                    load8(state, at + np.uint64(5) * plane),
                )
                gc = g0 * c0 + g1 * c1 + g2 * c2 + g3 * c3
                rest = rest - weight * gc
                store8(state, at + plane, rest)
                q = raw * (t * gc - rest / (ONE - alpha))
                q = select(seen & live & (raw <= ALPHA_MAX), q, ZERO)
                q_dy = q * dy
                q0, q1, q2 = q0 + q, q1 + q_dy, q2 + q_dy * dy
                s0, s1, s2, s3 = (
                    s0 + weight * g0,
                    s1 + weight * g1,
                    s2 + weight * g2,
                    s3 + weight * g3,
                )
                if absolute:
                    ax = ax + abs8(q * (dx * a + b * dy))
                    ay = ay + abs8(q * (dx * b + c * dy))
            q_dx = q0 * dx
            shape = shape + sums8(q0, q_dx, q_dx * dx, q1, q1 * dx, q2, ax, ay)
            color = color + sums8(s0, s1, s2, s3, s0, s1, s2, s3)
        # Eight colour sums (the four, twice); the shape then overwrites the first four of them.
        slot = np.uint64(slots[e]) * np.uint64(SLOT)
        store8(sums, slot + np.uint64(4), color)
        store8(sums, slot, shape)


# --------------------------------------------------------------------------------- lists
@njit(**INNER)
def sort_by_depth(depths, drawn, order):
    """Writes the indices of the drawn Gaussians, nearest first and ties by index, to ``order``;
    returns their number. ``depths`` are the bits of positive floats, which sort like integers:
    three stable passes of 11 bits."""
    count = 0
    keys, other_keys = np.empty(len(order), np.uint32), np.empty(len(order), np.uint32)
    other = np.empty(len(order), np.uint32)
    digits = np.zeros((3, 2048), np.int64)
    for i in range(len(order)):
        if drawn[i, 0] > 0:
            key = depths[i]
            keys[count], order[count] = key, i
            count += 1
            digits[0, key & 2047] += 1
            digits[1, (key >> 11) & 2047] += 1
            digits[2, key >> 22] += 1
    for step in range(3):
        total = 0
        for digit in range(2048):
            total, digits[step, digit] = total + digits[step, digit], total
        for i in range(count):
            digit = (keys[i] >> np.uint32(11 * step)) & 2047
            at = digits[step, digit]
            digits[step, digit] += 1
            other_keys[at], other[at] = keys[i], order[i]
        keys, other_keys = other_keys, keys
        order, other = other, order
    other[:count] = order[:count]  # after three swaps, ``other`` is the caller's array
    return count


@njit(**INNER)
def write_record(records, r, mean, conic, opacity, extent):
    """x, y, a, b, c, ln o, extent x, y, four channels, and the numbers of ``strip``."""
    a, b, c = np.float64(conic[0]), np.float64(conic[1]), np.float64(conic[2])
    s = 2 * math.log(np.float64(opacity) * 255)
    records[r], records[r + 1] = mean[0], mean[1]
    records[r + 2], records[r + 3], records[r + 4] = conic[0], conic[1], conic[2]
    records[r + 5] = math.log(opacity)
    records[r + 6], records[r + 7] = extent[0], extent[1]
    records[r + 12] = -b / c
    records[r + 13] = s / c
    records[r + 14] = (a * c - b * b) / (c * c)
    records[r + 15] = -b / a * extent[1]


@njit(**INNER)
def tile_columns(records, r, tile, tiles_x, tiles_y):
    """The range of tile columns and rows of a bounding box."""
    x, y, size = records[r] - HALF, records[r + 1] - HALF, np.float32(tile)
    ex, ey = records[r + 6] + MARGIN, records[r + 7] + MARGIN
    first_x = min(tiles_x, max(0, math.ceil(x - ex)) // tile)
    last_x = min(tiles_x - 1, math.floor((x + ex) / size))
    first_y = min(tiles_y, max(0, math.ceil(y - ey)) // tile)
    last_y = min(tiles_y - 1, math.floor((y + ey) / size))
    return first_x, last_x, first_y, last_y


@njit(**INNER)
def tile_rows(records, r, column, tile, first, last):
    """The rows of tiles that the ellipse meets in one column of tiles, exactly."""
    x, y = records[r] - HALF, records[r + 1] - HALF
    low, high = strip(
        records, r, np.float32(column * tile) - x, np.float32(column * tile + tile - 1) - x
    )
    return (
        max(first, math.ceil(y + low) // tile),
        min(last, math.floor(y + high) // tile),
    )


@njit(**OPTIONS)
def make_lists(means2d, conics, opacities, extents, depth_bits, tile, tiles_x, tiles_y):
    """Sorted records and tile lists of all cameras.

    Gaussians drawn by camera 0 in depth order, then those of camera 1, ... are numbered
    p = 0, 1, ...; the (p, tile) pairs of p are numbered slots starts[p] .. starts[p + 1] - 1.
    Returns the records (P * RECORD floats), rank (C, N) -> p or -1, starts (P + 1,), and the
    lists: entries begins[k] .. begins[k + 1] - 1 of ``ids`` (p) and ``slots`` belong to tile k
    (camera-major, then row-major), in depth order.
    """
    cameras, n = extents.shape[0], extents.shape[1]
    tiles = tiles_x * tiles_y
    order = np.empty((cameras, n), np.uint32)
    counts = np.zeros(cameras + 1, np.int64)
    for c in prange(cameras):
        counts[c + 1] = sort_by_depth(depth_bits[c], extents[c], order[c])
    bases = np.cumsum(counts)
    chunks = 0
    chunk_camera = np.empty(cameras * (n // CHUNK + 1), np.int64)
    chunk_first = np.empty(cameras * (n // CHUNK + 1), np.int64)
    for c in range(cameras):
        for first in range(0, counts[c + 1], CHUNK):
            chunk_camera[chunks], chunk_first[chunks] = c, first
            chunks += 1

    # Counting sort into tiles. First pass: records, and the pairs of each chunk per tile.
    total = bases[cameras]
    records = np.empty(total * RECORD, np.float32)
    rank = np.full((cameras, n), -1, np.int32)
    starts = np.empty(total + 1, np.int64)
    places = np.zeros((chunks, tiles), np.int64)
    for k in prange(chunks):
        c, first = chunk_camera[k], chunk_first[k]
        for i in range(first, min(first + CHUNK, counts[c + 1])):
            p, g = bases[c] + i, order[c, i]
            r = p * RECORD
            write_record(records, r, means2d[c, g], conics[c, g], opacities[g], extents[c, g])
            rank[c, g] = p
            x0, x1, y0, y1 = tile_columns(records, r, tile, tiles_x, tiles_y)
            pairs = 0
            for x in range(x0, x1 + 1):
                v0, v1 = y0, y1
                if x1 > x0 and y1 > y0:
                    v0, v1 = tile_rows(records, r, x, tile, y0, y1)
                for y in range(v0, v1 + 1):
                    places[k, y * tiles_x + x] += 1
                    pairs += 1
            starts[p] = pairs

    begins = np.empty(cameras * tiles + 1, np.int64)
    at, k = 0, 0
    for c in range(cameras):
        last = k
        while last < chunks and chunk_camera[last] == c:
            last += 1
        for t in range(tiles):
            begins[c * tiles + t] = at
            for j in range(k, last):
                at, places[j, t] = at + places[j, t], at
        k = last
    begins[cameras * tiles] = at
    at = 0
    for p in range(total):
        at, starts[p] = at + starts[p], at
    starts[total] = at

    # Second pass: every chunk fills its own part of every list.
    ids, slots = np.empty(at, np.uint32), np.empty(at, np.uint32)
    for k in prange(chunks):
        c, first = chunk_camera[k], chunk_first[k]
        for i in range(first, min(first + CHUNK, counts[c + 1])):
            p = bases[c] + i
            r = p * RECORD
            slot = starts[p]
            x0, x1, y0, y1 = tile_columns(records, r, tile, tiles_x, tiles_y)
            for x in range(x0, x1 + 1):
                v0, v1 = y0, y1
                if x1 > x0 and y1 > y0:
                    v0, v1 = tile_rows(records, r, x, tile, y0, y1)
                for y in range(v0, v1 + 1):
                    entry = places[k, y * tiles_x + x]
                    places[k, y * tiles_x + x] += 1
                    ids[entry], slots[entry] = p, slot
                    slot += 1
    return records, rank, starts, begins, ids, slots


# ------------------------------------------------------------------------------- drivers
@njit(**OPTIONS)
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
def deal(begins, workers):
    """Tiles in an order such that worker w gets balanced work from entries w, w + workers, ...
    (longest lists first, every other round backwards)."""
    order = np.argsort(begins[:-1] - begins[1:])
    for start in range(workers, len(order) - workers + 1, 2 * workers):
        order[start : start + workers] = order[start : start + workers][::-1].copy()
    return order


@njit(**OPTIONS)
def blend(records, ids, begins, order, workers, tile, background, first, image, left):
    """Draws all tiles of all cameras.

    Channels first .. first + 3 of ``image`` (C, D, H, W) and ``left`` (C, H, W), the transmittance
    that is left over, are written, over ``background`` (C, D). Returns per tile the end of the
    entries that were needed."""
    channels, height, width = min(4, image.shape[1] - first), image.shape[2], image.shape[3]
    tiles_x, tiles_y = (width + tile - 1) // tile, (height + tile - 1) // tile
    ends = np.empty(len(order), np.int64)
    for worker in prange(workers):
        state = np.empty(5 * tile * tile, np.float32)
        for k in order[worker::workers]:
            c, x0 = k // (tiles_x * tiles_y), k % tiles_x * tile
            y0 = k // tiles_x % tiles_y * tile
            w, h = min(tile, width - x0), min(tile, height - y0)
            state[tile * tile :] = ZERO
            clear_pixels(state, tile, w, h)
            ends[k] = blend_tile(
                records, ids, begins[k], begins[k + 1], np.float32(x0), np.float32(y0), tile, state
            )
            for v in range(h):
                t = np.abs(state[v * tile : v * tile + w])
                left[c, y0 + v, x0 : x0 + w] = t
                for d in range(channels):
                    at = (d + 1) * tile * tile + v * tile
                    row = image[c, first + d, y0 + v, x0 : x0 + w]
                    row[:] = state[at : at + w] + t * background[c, first + d]
    return ends


@njit(**OPTIONS)
def unblend(
    records, ids, slots, begins, ends, order, workers, tile, first, image, left, g_image, g_alpha,
    absolute,
):  # fmt: skip
    """The backward pass of ``blend``: the sums of ``unblend_tile``, SLOT floats per slot."""
    channels, height, width = min(4, image.shape[1] - first), image.shape[2], image.shape[3]
    tiles_x, tiles_y = (width + tile - 1) // tile, (height + tile - 1) // tile
    plane = tile * tile
    sums = np.empty(len(slots) * SLOT, np.float32)
    for worker in prange(workers):
        state = np.empty(6 * plane, np.float32)
        for k in order[worker::workers]:
            c, x0 = k // (tiles_x * tiles_y), k % tiles_x * tile
            y0 = k // tiles_x % tiles_y * tile
            w, h = min(tile, width - x0), min(tile, height - y0)
            state[plane:] = ZERO
            clear_pixels(state, tile, w, h)
            for v in range(h):
                rest = state[plane + v * tile : plane + v * tile + w]
                rest[:] = -left[c, y0 + v, x0 : x0 + w] * g_alpha[c, y0 + v, x0 : x0 + w]
                for d in range(channels):
                    at = (d + 2) * plane + v * tile
                    g = g_image[c, first + d, y0 + v, x0 : x0 + w]
                    state[at : at + w] = g
                    rest += g * image[c, first + d, y0 + v, x0 : x0 + w]
            unblend_tile(
                records, ids, slots, begins[k], ends[k], np.float32(x0), np.float32(y0), tile,
                state, sums, absolute,
            )  # fmt: skip
            for e in range(ends[k], begins[k + 1]):
                sums[slots[e] * SLOT : slots[e] * SLOT + SLOT] = ZERO
    return sums


@njit(**OPTIONS)
def collect(
    records, rank, starts, sums, opacities, first, last,
    d_means2d, d_conics, d_opacities, d_colors, d_depths, d_absolute,
):  # fmt: skip
    """Adds the sums of all slots of a Gaussian, and of all cameras where an input is shared, to
    the gradients (``d_colors`` (C or 1, N, D)). With sigma = (a dx^2 + 2 b dx dy + c dy^2) / 2 and
    alpha = o e^-sigma, q = alpha dL/dalpha: dL/dx = sum q (a dx + b dy), dL/da = -sum q dx^2 / 2,
    dL/db = -sum q dx dy, dL/do = sum q / o."""
    channels = d_colors.shape[2]
    for g in prange(rank.shape[1]):
        opacity = ZERO
        for c in range(rank.shape[0]):
            p = rank[c, g]
            if p < 0:
                continue
            r = p * RECORD
            total = np.zeros(SLOT, np.float32)
            for i in range(starts[p] * SLOT, starts[p + 1] * SLOT, SLOT):
                for j in range(SLOT):
                    total[j] += sums[i + j]
            q, q_x, q_xx, q_y, q_xy, q_yy = (
                total[0],
                total[1],
                total[2],
                total[3],
                total[4],
                total[5],
            )
            opacity += q
            d_means2d[c, g, 0] += records[r + 2] * q_x + records[r + 3] * q_y
            d_means2d[c, g, 1] += records[r + 3] * q_x + records[r + 4] * q_y
            d_conics[c, g, 0] -= HALF * q_xx
            d_conics[c, g, 1] -= q_xy
            d_conics[c, g, 2] -= HALF * q_yy
            d_absolute[c, g, 0] += total[6]
            d_absolute[c, g, 1] += total[7]
            for d in range(first, last):
                if d == channels:
                    d_depths[c, g] += total[8 + d - first]
                else:
                    d_colors[c if d_colors.shape[0] > 1 else 0, g, d] += total[8 + d - first]
        d_opacities[g] += opacity / max(opacities[g], ALPHA_MIN)
