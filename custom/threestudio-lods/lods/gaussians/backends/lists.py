"""Which Gaussians meet which tiles, in depth order (numba, CPU).

All arrays are made outside of the kernels: ``np.empty`` inside of one costs seconds to compile.
"""

import math

import numpy as np
from lods.gaussians.backends.simd import INNER, OPTIONS, run
from lods.gaussians.kernel_cache import kernel
from numba import njit, prange

RECORD = 16  # floats of a Gaussian's record, one cache line
CHUNK = 2048  # Gaussians that one thread takes at a time
DIGIT = 12  # bits that one pass of the radix sort handles

MARGIN = np.float32(0.01)  # pixels added to exact extents, against rounding
HALF, ONE, TWO, ZERO = np.float32(0.5), np.float32(1), np.float32(2), np.float32(0)
LOG_255, LOG2_E = np.float32(5.541263545158426), np.float32(1.4426950408889634)


@njit(**INNER)
def write_record(records, r, x, y, a, b, c, opacity, extent_x, extent_y):
    """x, y, a, b, c, log2 o, extent x, y, four channels, and the four numbers of ``strip``."""
    log_opacity = math.log(opacity)
    s = TWO * (log_opacity + LOG_255)  # a dx^2 + 2 b dx dy + c dy^2 where alpha = 1/255
    per_a, per_c = ONE / a, ONE / c
    records[r], records[r + 1] = x, y
    records[r + 2], records[r + 3], records[r + 4] = a, b, c
    records[r + 5] = log_opacity * LOG2_E
    records[r + 6], records[r + 7] = extent_x, extent_y
    records[r + 12] = -b * per_c
    records[r + 13] = s * per_c
    records[r + 14] = (a - b * (b * per_c)) * per_c
    records[r + 15] = -b * per_a * extent_y


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
def tile_box(records, r, tile, tiles_x, tiles_y):
    """The first and the last tile column and row of a bounding box."""
    x, y, size = records[r] - HALF, records[r + 1] - HALF, np.float32(tile)
    ex, ey = records[r + 6] + MARGIN, records[r + 7] + MARGIN
    x0, y0 = max(0, math.ceil(x - ex)) // tile, max(0, math.ceil(y - ey)) // tile
    x1, y1 = math.floor((x + ex) / size), math.floor((y + ey) / size)
    return x0, min(tiles_x - 1, x1), y0, min(tiles_y - 1, y1)


@njit(**INNER)
def tile_rows(records, r, column, tile, x0, x1, y0, y1):
    """The first and the last row of tiles that the ellipse meets in a column of tiles; exact."""
    if x1 > x0 and y1 > y0:
        x, y, left = records[r] - HALF, records[r + 1] - HALF, column * tile
        low, high = strip(records, r, np.float32(left) - x, np.float32(left + tile - 1) - x)
        y0, y1 = max(y0, math.ceil(y + low) // tile), min(y1, math.floor(y + high) // tile)
    return y0, y1


@njit(**INNER)
def sort_by_depth(depths, extents, order, keys, other_keys, front, back, places):
    """Writes the indices of the drawn Gaussians, nearest first and ties by index, to ``order``;
    returns their number. ``depths`` are the bits of positive floats, which sort like integers:
    stable passes over the bits that differ. The other arguments are scratch."""
    count, low, high = 0, np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(len(order)):
        if extents[i, 0] > ZERO:
            keys[count], front[count] = depths[i], i
            low, high = min(low, depths[i]), max(high, depths[i])
            count += 1
    bits = 0
    while count > 0 and (high - low) >> bits > 0:
        bits += 1
    passes = (bits + DIGIT - 1) // DIGIT
    digit = (bits + passes - 1) // max(passes, 1)
    mask = (1 << digit) - 1
    for step in range(passes):
        shift = step * digit
        for d in range(1 << digit):
            places[d] = 0
        for i in range(count):
            places[((keys[i] - low) >> shift) & mask] += 1
        total = 0
        for d in range(1 << digit):
            size = places[d]
            places[d] = total
            total += size
        for i in range(count):
            d = ((keys[i] - low) >> shift) & mask
            at = places[d]
            places[d] = at + 1
            other_keys[at], back[at] = keys[i], front[i]
        keys, other_keys, front, back = other_keys, keys, back, front
    for i in range(count):
        order[i] = front[i]
    return count


@kernel(**OPTIONS)
def sort_cameras(depths, extents, order, counts, scratch, places):
    for c in prange(len(counts)):
        s = scratch[c]
        counts[c] = sort_by_depth(
            depths[c], extents[c], order[c], s[0], s[1], s[2], s[3], places[c]
        )


@kernel(**OPTIONS)
def count_pairs(
    means2d, conics, opacities, extents, order, bases, chunks, tile, tiles_x, tiles_y,
    records, rank, pairs, places,
):  # fmt: skip
    """Writes the records and, in ``pairs`` and ``places``, how many (Gaussian, tile) pairs every
    Gaussian has, and every chunk of Gaussians has per tile. ``chunks``: camera, first, end."""
    for k in prange(len(chunks)):
        c = chunks[k, 0]
        for i in range(chunks[k, 1], chunks[k, 2]):
            p, g = bases[c] + i, order[c, i]
            r = p * RECORD
            write_record(
                records, r, means2d[c, g, 0], means2d[c, g, 1], conics[c, g, 0], conics[c, g, 1],
                conics[c, g, 2], opacities[g], extents[c, g, 0], extents[c, g, 1],
            )  # fmt: skip
            rank[c, g] = p
            x0, x1, y0, y1 = tile_box(records, r, tile, tiles_x, tiles_y)
            count = 0
            for x in range(x0, x1 + 1):
                v0, v1 = tile_rows(records, r, x, tile, x0, x1, y0, y1)
                for y in range(v0, v1 + 1):
                    places[k, y * tiles_x + x] += 1
                    count += 1
            pairs[p] = count


@kernel(**OPTIONS)
def fill_lists(bases, chunks, tile, tiles_x, tiles_y, records, starts, places, ids, slots):
    """Every chunk fills its own part of every list."""
    for k in prange(len(chunks)):
        for i in range(chunks[k, 1], chunks[k, 2]):
            p = bases[chunks[k, 0]] + i
            slot = starts[p]
            x0, x1, y0, y1 = tile_box(records, p * RECORD, tile, tiles_x, tiles_y)
            for x in range(x0, x1 + 1):
                v0, v1 = tile_rows(records, p * RECORD, x, tile, x0, x1, y0, y1)
                for y in range(v0, v1 + 1):
                    entry = places[k, y * tiles_x + x]
                    places[k, y * tiles_x + x] = entry + 1
                    ids[entry], slots[entry] = p, slot
                    slot += 1


def exclusive_cumsum(counts):
    """0, a, a + b, ... of a, b, ...; one element more."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def make_lists(means2d, conics, opacities, extents, depths, tile, tiles_x, tiles_y, workers):
    """Sorted records and tile lists of all cameras.

    Gaussians drawn by camera 0 in depth order, then those of camera 1, ... are numbered
    p = 0, 1, ...; the (p, tile) pairs of p are numbered slots starts[p] .. starts[p + 1] - 1.
    Returns the records (P * RECORD floats), rank (C, N) -> p or -1, starts (P + 1,), and the
    lists: entries begins[k] .. begins[k + 1] - 1 of ``ids`` (p) and ``slots`` belong to tile k
    (camera-major, then row-major), in depth order.
    """
    cameras, n = depths.shape
    tiles = tiles_x * tiles_y
    order, counts = np.empty((cameras, n), np.uint32), np.empty(cameras, np.int64)
    scratch, digits = (
        np.empty((cameras, 4, n), np.uint32),
        np.empty((cameras, 1 << DIGIT), np.int64),
    )
    run(sort_cameras, workers, depths.view(np.uint32), extents, order, counts, scratch, digits)
    bases = exclusive_cumsum(counts)
    chunks = [
        (c, first, min(first + CHUNK, count))
        for c, count in enumerate(counts.tolist())
        for first in range(0, count, CHUNK)
    ]
    chunks = np.array(chunks, np.int64).reshape(-1, 3)

    total = int(bases[-1])
    records, rank = np.empty(total * RECORD, np.float32), np.full((cameras, n), -1, np.int32)
    pairs, places = np.empty(total, np.int64), np.zeros((len(chunks), tiles), np.int64)
    size = tile, tiles_x, tiles_y
    run(
        count_pairs, workers, means2d, conics, opacities, extents, order, bases, chunks, *size,
        records, rank, pairs, places,
    )  # fmt: skip

    # Entries are laid out by camera, then tile, then chunk; chunks of a camera are adjacent.
    begins, at = [np.zeros(1, np.int64)], 0
    for c in range(cameras):
        own = np.flatnonzero(chunks[:, 0] == c)
        ends = at + np.cumsum(places[own].T)
        offsets = np.concatenate([[at], ends])
        places[own] = offsets[:-1].reshape(tiles, -1).T
        at = int(offsets[-1])
        begins.append(ends.reshape(tiles, -1)[:, -1] if len(own) else np.full(tiles, at))
    starts = exclusive_cumsum(pairs)
    ids, slots = np.empty(at, np.uint32), np.empty(at, np.uint32)
    run(fill_lists, workers, bases, chunks, *size, records, starts, places, ids, slots)
    return records, rank, starts, np.concatenate(begins), ids, slots


def deal(begins, workers):
    """Tiles in an order such that worker w gets balanced work from entries w, w + workers, ...
    (longest lists first, every other round backwards)."""
    order = np.argsort(begins[:-1] - begins[1:], kind="stable")
    for start in range(workers, len(order) - workers + 1, 2 * workers):
        order[start : start + workers] = order[start : start + workers][::-1].copy()
    return order
