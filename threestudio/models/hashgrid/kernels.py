"""Compiled kernels of the hash grid (numba, CPU, single precision, up to 3 input dimensions).

Three functions and their derivatives along a direction v of the positions are all that forward,
backward and double backward need. With w_c(x) the weight of corner c of a point's cell and e_c its
entry (see ``twin``), per point and level:

    encode      out_f   = sum_c w_c T[e_c, f]
    scatter     T'[e_c, f] += w_c g_f
    positions   dx      = sum_c dw_c/dx q_c,    q_c = sum_f g_f T[e_c, f]

and where v is given, w_c stands for its derivative along v, sum_k v_k dw_c/dx_k.

How they are fast: points go through in tiles, whose entries and weights are computed by loops over
the points (vectorised, in scratch that stays in the L1 cache) before the accesses to the table,
which the processor can then overlap. Levels are outermost, so that one level's part of the table
is in the cache at a time. ``scatter`` gives each level to one thread, so nothing is written by two
and sums always have the same order.
"""

import numpy as np
from numba import njit, prange

from threestudio.utils.kernel_cache import kernel

# 'contract' is fused multiply-add. prange only: turning every array expression into a parallel
# loop takes minutes to compile.
INNER = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}
_OTHERS = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
PARALLEL = {"prange": True, **dict.fromkeys(_OTHERS, False)}
OPTIONS = {**INNER, "parallel": PARALLEL, "nogil": True}

TILE = 128  # points
BLOCK = 1 << 16  # points of which a level is encoded before the next level's turn

# Indices are uint64: signed ones cost a test at each access, and vectorisation. Scratch is flat,
# in rows of one tile at constant distances: then the compiler knows that rows do not overlap.
ROW = tuple(np.uint64(TILE * i) for i in range(20))
SCRATCH = TILE * len(ROW)
# rows of floats: per axis s, a = ds/dx, a v, v d2s/dx2 (3 each), then 8 corners; of integers: per
# axis the cell, then 8 corners
S, A, AV, BV, CORNER, ENTRY = ROW[0], ROW[3], ROW[6], ROW[9], ROW[12], ROW[3]
ZERO, HALF, ONE, TWO, THREE, SIX = (np.float32(c) for c in (0, 0.5, 1, 2, 3, 6))
FARTHEST = np.float32(2.0**30)  # the twin's
UNIT = np.uint32(1)


@njit(**INNER)
def locate(x, v, first, count, scale, smooth, floats, cells, row):
    """Cell, s and its derivatives along one axis. ``x`` and ``v`` are flat; ``first`` is the index
    of the tile's first point on this axis, ``row`` the axis's row."""
    for i in range(count):
        p = np.uint64(i)
        position = x[first + p] * scale + HALF
        cell = np.floor(position)
        floats[row + p + S] = position - cell
        cell = cell if cell < FARTHEST else FARTHEST  # and so is what is not a number
        cell = cell if cell > -FARTHEST else -FARTHEST
        cells[row + p] = np.uint32(np.int32(cell))
    if smooth:
        for i in range(count):
            p = row + np.uint64(i)
            t = floats[p + S]
            floats[p + S] = t * t * (THREE - TWO * t)
            floats[p + A] = scale * SIX * t * (ONE - t)
            floats[p + BV] = scale * scale * (SIX - TWO * SIX * t)
    else:
        for i in range(count):
            p = row + np.uint64(i)
            floats[p + A], floats[p + BV] = scale, ZERO
    if len(v) > 0:
        for i in range(count):
            p = np.uint64(i)
            along = v[first + p]
            floats[row + p + AV] = floats[row + p + A] * along
            floats[row + p + BV] *= along


@njit(**INNER)
def dense_entry(vertex, size):
    """vertex mod size where vertex < 2 size; else something not less."""
    vertex = np.uint32(vertex)
    less = np.uint32(vertex - size)
    return less if less < vertex else vertex


@njit(**INNER)
def dense_entries(count, y_stride, z_stride, size, ints):
    """The entries of the 8 corners; corner x + 2 y + 4 z."""
    beyond = np.uint32(0)
    for i in range(count):
        p = np.uint64(i)
        x = ints[p]
        y = np.uint32(ints[p + ROW[1]] * y_stride)
        z = np.uint32(ints[p + ROW[2]] * z_stride)
        y_, z_ = np.uint32(y + y_stride), np.uint32(z + z_stride)
        c0, c2 = dense_entry(x + y + z, size), dense_entry(x + y_ + z, size)
        c4, c6 = dense_entry(x + y + z_, size), dense_entry(x + y_ + z_, size)
        x = np.uint32(x + UNIT)
        c1, c3 = dense_entry(x + y + z, size), dense_entry(x + y_ + z, size)
        c5, c7 = dense_entry(x + y + z_, size), dense_entry(x + y_ + z_, size)
        ints[p + ROW[3]], ints[p + ROW[4]], ints[p + ROW[5]], ints[p + ROW[6]] = c0, c1, c2, c3
        ints[p + ROW[7]], ints[p + ROW[8]], ints[p + ROW[9]], ints[p + ROW[10]] = c4, c5, c6, c7
        largest = max(max(max(c0, c1), max(c2, c3)), max(max(c4, c5), max(c6, c7)))
        beyond = max(beyond, largest)
    if beyond >= size:  # points outside, whose vertices have wrapped
        for c in range(8):
            for i in range(count):
                p = ENTRY + np.uint64(c * TILE + i)
                ints[p] = ints[p] % size


@njit(**INNER)
def hashed_entries(count, y_prime, z_prime, size, ints):
    """As above; the size is a power of two."""
    mask = np.uint32(size - UNIT)
    for i in range(count):
        p = np.uint64(i)
        x = ints[p]
        y = np.uint32(ints[p + ROW[1]] * y_prime)
        z = np.uint32(ints[p + ROW[2]] * z_prime)
        y_, z_ = np.uint32(y + y_prime), np.uint32(z + z_prime)
        x_ = np.uint32(x + UNIT)
        ints[p + ROW[3]], ints[p + ROW[4]] = (x ^ y ^ z) & mask, (x_ ^ y ^ z) & mask
        ints[p + ROW[5]], ints[p + ROW[6]] = (x ^ y_ ^ z) & mask, (x_ ^ y_ ^ z) & mask
        ints[p + ROW[7]], ints[p + ROW[8]] = (x ^ y ^ z_) & mask, (x_ ^ y ^ z_) & mask
        ints[p + ROW[9]], ints[p + ROW[10]] = (x ^ y_ ^ z_) & mask, (x_ ^ y_ ^ z_) & mask


@njit(**INNER)
def weigh(count, floats):
    """The corners' weights."""
    for i in range(count):
        p = np.uint64(i)
        x_, y_, z_ = floats[p], floats[p + ROW[1]], floats[p + ROW[2]]
        x, y, z = ONE - x_, ONE - y_, ONE - z_
        floats[p + ROW[12]], floats[p + ROW[13]] = x * (y * z), x_ * (y * z)
        floats[p + ROW[14]], floats[p + ROW[15]] = x * (y_ * z), x_ * (y_ * z)
        floats[p + ROW[16]], floats[p + ROW[17]] = x * (y * z_), x_ * (y * z_)
        floats[p + ROW[18]], floats[p + ROW[19]] = x * (y_ * z_), x_ * (y_ * z_)


@njit(**INNER)
def weigh_along(count, floats):
    """Their derivatives along v."""
    for i in range(count):
        p = np.uint64(i)
        x_, y_, z_ = floats[p], floats[p + ROW[1]], floats[p + ROW[2]]
        x, y, z = ONE - x_, ONE - y_, ONE - z_
        dx, dy, dz = floats[p + ROW[6]], floats[p + ROW[7]], floats[p + ROW[8]]
        d00, d10 = -(dy * z + y * dz), dy * z - y_ * dz
        d01, d11 = y * dz - dy * z_, dy * z_ + y_ * dz
        floats[p + ROW[12]], floats[p + ROW[13]] = x * d00 - dx * y * z, x_ * d00 + dx * y * z
        floats[p + ROW[14]], floats[p + ROW[15]] = x * d10 - dx * y_ * z, x_ * d10 + dx * y_ * z
        floats[p + ROW[16]], floats[p + ROW[17]] = x * d01 - dx * y * z_, x_ * d01 + dx * y * z_
        floats[p + ROW[18]], floats[p + ROW[19]] = x * d11 - dx * y_ * z_, x_ * d11 + dx * y_ * z_


@njit(**INNER)
def prepare(x, v, first, count, level, scales, sizes, dense, strides, smooth, floats, ints):
    """Of ``count`` points: cells, s with derivatives, entries and weights."""
    points = np.uint64(len(x)) // np.uint64(3)
    for axis in range(3):
        row = np.uint64(TILE * axis)
        at = np.uint64(first) + np.uint64(axis) * points
        locate(x, v, at, count, scales[level], smooth, floats, ints, row)
    size, y, z = sizes[level], strides[level, 1], strides[level, 2]
    if dense[level]:
        dense_entries(count, y, z, size, ints)
    else:
        hashed_entries(count, y, z, size, ints)
    if len(v) > 0:
        weigh_along(count, floats)
    else:
        weigh(count, floats)


@njit(**INNER)
def blend(table, base, features, f, floats, ints, p):
    """sum_c w_c T[e_c, f] of one point; ``base`` is where the level begins in the table."""
    total = ZERO
    for c in range(8):
        k = p + np.uint64(c * TILE)
        at = base + np.uint64(ints[k + ENTRY]) * features + f
        total += floats[k + CORNER] * table[at]
    return total


@kernel(**OPTIONS)
def encode(
    x, v, table, scales, sizes, starts, dense, strides, smooth, features, buffers, out
):  # fmt: skip
    """``x`` (3 N) and ``v`` (3 N, or empty) axis by axis, ``table`` (P), ``buffers`` (workers,
    levels * min(BLOCK, points of a worker) * features), ``out`` (N * levels * features)."""
    points, levels, workers = len(x) // 3, len(scales), len(buffers)
    width, u = np.uint64(levels * features), np.uint64(features)
    for worker in prange(workers):
        floats, ints = np.empty(SCRATCH, np.float32), np.empty(SCRATCH, np.uint32)
        buffer = buffers[worker]
        end = (worker + 1) * points // workers
        for block in range(worker * points // workers, end, BLOCK):
            stop = min(block + BLOCK, end)
            k = np.uint64(0)
            for level in range(levels):
                base = starts[level] * u
                for first in range(block, stop, TILE):
                    count = min(TILE, stop - first)
                    prepare(
                        x, v, first, count, level, scales, sizes, dense, strides, smooth,
                        floats, ints,
                    )  # fmt: skip
                    for i in range(count):
                        p = np.uint64(i)
                        if features == 2:
                            one = blend(table, base, u, np.uint64(0), floats, ints, p)
                            two = blend(table, base, u, np.uint64(1), floats, ints, p)
                            buffer[k], buffer[k + np.uint64(1)] = one, two
                        else:
                            for j in range(features):
                                f = np.uint64(j)
                                buffer[k + f] = blend(table, base, u, f, floats, ints, p)
                        k += u
            size = np.uint64(stop - block)
            for i in range(stop - block):  # from level, point, feature to point, level, feature
                to = np.uint64(block + i) * width
                for level in range(levels):
                    at = (np.uint64(level) * size + np.uint64(i)) * u
                    for j in range(features):
                        out[to + np.uint64(level) * u + np.uint64(j)] = buffer[at + np.uint64(j)]


@kernel(**OPTIONS)
def by_level(rows, points, levels, features, workers, out):
    """From point, level, feature to level, point, feature."""
    u = np.uint64(features)
    for worker in prange(workers):
        for i in range(worker * points // workers, (worker + 1) * points // workers):
            for level in range(levels):
                at = np.uint64(i * levels + level) * u
                to = np.uint64(level * points + i) * u
                for j in range(features):
                    out[to + np.uint64(j)] = rows[at + np.uint64(j)]


@kernel(**OPTIONS)
def scatter(
    x, v, g, scales, sizes, starts, dense, strides, smooth, features, workers, out
):  # fmt: skip
    """``g`` (levels * N * features) by level; writes ``out`` (P)."""
    points, levels, u = len(x) // 3, len(scales), np.uint64(features)
    for worker in prange(workers):
        floats, ints = np.empty(SCRATCH, np.float32), np.empty(SCRATCH, np.uint32)
        for level in range(worker, levels, workers):
            base = starts[level] * u
            for i in range(np.int64(sizes[level]) * features):
                out[base + np.uint64(i)] = ZERO
            k = np.uint64(level * points) * u
            for first in range(0, points, TILE):
                count = min(TILE, points - first)
                prepare(
                    x, v, first, count, level, scales, sizes, dense, strides, smooth, floats, ints
                )
                for i in range(count):
                    for c in range(8):
                        p = np.uint64(c * TILE + i)
                        at = base + np.uint64(ints[p + ENTRY]) * u
                        weight = floats[p + CORNER]
                        if features == 2:
                            out[at] += weight * g[k]
                            out[at + np.uint64(1)] += weight * g[k + np.uint64(1)]
                        else:
                            for j in range(features):
                                out[at + np.uint64(j)] += weight * g[k + np.uint64(j)]
                    k += u


@njit(**INNER)
def derivatives(floats, p):
    """Of the interpolation of q_c by s: x, y, z, and the mixed second ones xy, xz, yz."""
    x, y, z = floats[p], floats[p + ROW[1]], floats[p + ROW[2]]
    q0, q2, q4, q6 = (
        floats[p + ROW[12]],
        floats[p + ROW[14]],
        floats[p + ROW[16]],
        floats[p + ROW[18]],
    )
    # differences along x for (y, z) = 00, 10, 01, 11
    d00, d10 = floats[p + ROW[13]] - q0, floats[p + ROW[15]] - q2
    d01, d11 = floats[p + ROW[17]] - q4, floats[p + ROW[19]] - q6
    m00, m01 = q0 + x * d00, q4 + x * d01
    dy0, dy1 = q2 + x * d10 - m00, q6 + x * d11 - m01
    dx0, dx1 = d00 + y * (d10 - d00), d01 + y * (d11 - d01)
    xy, xz, yz = (d10 - d00) + z * ((d11 - d01) - (d10 - d00)), dx1 - dx0, dy1 - dy0
    return dx0 + z * xz, dy0 + z * yz, m01 + y * dy1 - (m00 + y * dy0), xy, xz, yz


@njit(**INNER)
def slopes(count, floats, out, first, points):
    """Adds the gradient of the interpolation of q_c."""
    for i in range(count):
        p = np.uint64(i)
        dx, dy, dz, _, _, _ = derivatives(floats, p)
        at = first + p
        out[at] += floats[p + ROW[3]] * dx
        out[at + points] += floats[p + ROW[4]] * dy
        out[at + points + points] += floats[p + ROW[5]] * dz


@njit(**INNER)
def slopes_along(count, floats, out, first, points):
    """Adds the derivative of that gradient along v."""
    for i in range(count):
        p = np.uint64(i)
        dx, dy, dz, xy, xz, yz = derivatives(floats, p)
        vx, vy, vz = floats[p + ROW[6]], floats[p + ROW[7]], floats[p + ROW[8]]
        at = first + p
        x = floats[p + ROW[9]] * dx + floats[p + ROW[3]] * (vy * xy + vz * xz)
        y = floats[p + ROW[10]] * dy + floats[p + ROW[4]] * (vx * xy + vz * yz)
        z = floats[p + ROW[11]] * dz + floats[p + ROW[5]] * (vx * xz + vy * yz)
        out[at] += x
        out[at + points] += y
        out[at + points + points] += z


@kernel(**OPTIONS)
def positions(
    x, v, table, g, scales, sizes, starts, dense, strides, smooth, features, workers, out
):  # fmt: skip
    """``g`` (levels * N * features) by level; adds to ``out`` (3 N), axis by axis."""
    points, levels, u = len(x) // 3, len(scales), np.uint64(features)
    for worker in prange(workers):
        floats, ints = np.empty(SCRATCH, np.float32), np.empty(SCRATCH, np.uint32)
        begin, end = worker * points // workers, (worker + 1) * points // workers
        for level in range(levels):
            base = starts[level] * u
            k = np.uint64(level * points + begin) * u
            for first in range(begin, end, TILE):
                count = min(TILE, end - first)
                prepare(
                    x, v, first, count, level, scales, sizes, dense, strides, smooth, floats, ints
                )
                for i in range(count):
                    for c in range(8):
                        p = np.uint64(c * TILE + i)
                        at = base + np.uint64(ints[p + ENTRY]) * u
                        q = ZERO
                        for j in range(features):
                            q += g[k + np.uint64(j)] * table[at + np.uint64(j)]
                        floats[p + CORNER] = q
                    k += u
                if len(v) > 0:
                    slopes_along(count, floats, out, np.uint64(first), np.uint64(points))
                else:
                    slopes(count, floats, out, np.uint64(first), np.uint64(points))
