"""Compiled rasterisation of triangles, forwards and backwards (numba, CPU).

The formulas are those of :mod:`lods.meshes.reference`. Vertices come in camera space, (C, V, 3) in
double precision: an edge that two triangles share then has the same plane, but for the sign, in
both, so that no pixel falls between them.

* ``project``, ``draw``: each worker has rows of one image, and goes through the triangles that meet
  them. In a row a triangle covers the pixels between two bounds, along which 1/z is linear.
* ``weigh``, ``unweigh``: barycentric weights of what was found, and their gradient.
* ``find``, ``unfind``: the crossings of silhouettes, and their gradient.
* ``blend``, ``unblend``, ``look_up``, ``un_look_up``: attributes of vertices, and texels.

A sum over pixels belongs to one worker, which adds in the order of the pixels: results do not
depend on the number of threads. Memory is linear in pixels, triangles and texels.
"""

import math
from typing import Any

from lods.gaussians.backends.simd import PARALLEL
from lods.gaussians.kernel_cache import kernel
from numba import njit, prange

STEPS = 16  # as in lods.meshes.reference
SLACK = 1e-6  # pixels
# Not fused: a b - c d has to be -(c d - a b), or the two triangles of an edge disagree about it.
INNER: Any = {"error_model": "numpy"}
OPTIONS: Any = {**INNER, "parallel": PARALLEL, "nogil": True}


# ------------------------------------------------------------------------------ geometry
@njit(**INNER)
def cross(a, b):
    """a x b of two triples."""
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


@njit(**INNER)
def dot(a, b):
    """a . b of two triples."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(**INNER)
def corner(points, c, v):
    """A vertex as a triple."""
    return points[c, v, 0], points[c, v, 1], points[c, v, 2]


@njit(**INNER)
def direction(K, c, x, y):
    """The ray of a pixel, with z = 1."""
    return (x + 0.5 - K[c, 0, 2]) / K[c, 0, 0], (y + 0.5 - K[c, 1, 2]) / K[c, 1, 1], 1.0


@njit(**INNER)
def reach(p, q, near, K, c, box):
    """Widens a box in the image by the part of the segment from p to q beyond the near plane."""
    for end in range(2):
        a, b = (p, q) if end == 0 else (q, p)
        if a[2] >= near:
            x, y, z = a
        elif b[2] >= near:
            s = (near - a[2]) / (b[2] - a[2])
            x, y, z = a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1]), near
        else:
            continue
        x, y = K[c, 0, 0] * x / z + K[c, 0, 2], K[c, 1, 1] * y / z + K[c, 1, 2]
        box = min(box[0], x), max(box[1], x), min(box[2], y), max(box[3], y)
    return box


# ------------------------------------------------------------------------------ visibility
@kernel(**OPTIONS)
def project(points, K, near, places):
    """Writes the places (C, V, 2) of vertices in the image, in pixels less a half, so that pixel
    centres lie at whole numbers; NaN for what is nearer than the near plane."""
    count = points.shape[1]
    for i in prange(points.shape[0] * count):
        c, v = i // count, i % count
        x, y, z = points[c, v, 0], points[c, v, 1], points[c, v, 2]
        if z >= near:
            places[c, v, 0] = K[c, 0, 0] * x / z + K[c, 0, 2] - 0.5
            places[c, v, 1] = K[c, 1, 1] * y / z + K[c, 1, 2] - 0.5
        else:
            places[c, v, 0] = places[c, v, 1] = math.nan


@njit(**INNER)
def box_of(points, places, c, i, j, k, near, K):
    """The box (x0, x1, y0, y1) of a triangle in the image, in units of ``places``; of one that
    comes nearer than the near plane, of the part beyond."""
    ax, bx, cx = places[c, i, 0], places[c, j, 0], places[c, k, 0]
    if ax + bx + cx == ax + bx + cx:
        ay, by, cy = places[c, i, 1], places[c, j, 1], places[c, k, 1]
        return min(ax, bx, cx), max(ax, bx, cx), min(ay, by, cy), max(ay, by, cy)
    p, q, r = corner(points, c, i), corner(points, c, j), corner(points, c, k)
    box = math.inf, -math.inf, math.inf, -math.inf
    box = reach(p, q, near, K, c, box)
    box = reach(q, r, near, K, c, box)
    box = reach(r, p, near, K, c, box)
    return box[0] - 0.5, box[1] - 0.5, box[2] - 0.5, box[3] - 0.5


@kernel(**OPTIONS)
def draw(points, faces, K, near, far, places, bands, face, inverse):
    """Writes the triangle of each pixel, -1 for none, and 1/z; ``bands`` (N, 3): the camera, the
    first row and the row after the last of each piece of work."""
    width = face.shape[2]
    least, most = 1 / far, 1 / near
    for band in prange(len(bands)):
        c, top, bottom = bands[band, 0], bands[band, 1], bands[band, 2]
        face[c, top:bottom] = -1
        inverse[c, top:bottom] = least
        for f in range(len(faces)):
            i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
            left, right, low, high = box_of(points, places, c, i, j, k, near, K)
            # comparisons first, since infinite numbers and NaN become no integers
            if not (left < width and right > -1 and low < bottom and high > top - 1):
                continue
            # whole numbers in the box: most small triangles have none. Rounding moves it by 1e-9
            y0 = max(top, math.ceil(max(low, top - 1.0) - SLACK))
            y1 = min(bottom, math.floor(min(high, bottom + 1.0) + SLACK) + 1)
            first = max(0, math.ceil(max(left, -1.0) - SLACK))
            last = min(width - 1, math.floor(min(right, width + 1.0) + SLACK))
            if y0 >= y1 or first > last:
                continue
            p, q, r = corner(points, c, i), corner(points, c, j), corner(points, c, k)
            n0, n1, n2 = cross(q, r), cross(r, p), cross(p, q)
            det = dot(p, n0)
            if not 0 < abs(det) < math.inf:
                continue
            sign = 1.0 if det > 0 else -1.0
            # w_i = ax x + row, with row = ay y + a0
            fx, fy, cx, cy = K[c, 0, 0], K[c, 1, 1], K[c, 0, 2] - 0.5, K[c, 1, 2] - 0.5
            ax0, ay0 = sign * n0[0] / fx, sign * n0[1] / fy
            ax1, ay1 = sign * n1[0] / fx, sign * n1[1] / fy
            ax2, ay2 = sign * n2[0] / fx, sign * n2[1] / fy
            a0 = sign * n0[2] - ax0 * cx - ay0 * cy
            a1 = sign * n1[2] - ax1 * cx - ay1 * cy
            a2 = sign * n2[2] - ax2 * cx - ay2 * cy
            slope = (ax0 + ax1 + ax2) / abs(det)
            for y in range(y0, y1):
                w0, w1, w2 = ay0 * y + a0, ay1 * y + a1, ay2 * y + a2
                x0, x1 = bound(ax0, w0, first, last)
                x0, x1 = bound(ax1, w1, x0, x1)
                x0, x1 = bound(ax2, w2, x0, x1)
                start = (w0 + w1 + w2) / abs(det)
                for x in range(x0, x1 + 1):
                    z = start + slope * x
                    if inverse[c, y, x] < z < most:
                        inverse[c, y, x] = z
                        face[c, y, x] = f


@njit(**INNER)
def bound(a, w, x0, x1):
    """The first and the last x of x0..x1 with a x + w >= 0; the last before the first if there is
    none."""
    if a > 0:
        x = -w / a
        if x > x0:
            x0 = x1 + 1 if x > x1 else math.ceil(x)
    elif a < 0:
        x = -w / a
        if x < x1:
            x1 = x0 - 1 if x < x0 else math.floor(x)
    elif w < 0:
        x1 = x0 - 1
    return x0, x1


# ------------------------------------------------------------------------------ weights
@kernel(**OPTIONS)
def weigh(points, faces, K, face, weights, depth):
    """Barycentric weights and depths of what ``draw`` has found."""
    cameras, height, width = face.shape
    for row in prange(cameras * height):
        c, y = row // height, row % height
        for x in range(width):
            f = face[c, y, x]
            if f < 0:
                weights[c, y, x, 0] = weights[c, y, x, 1] = weights[c, y, x, 2] = 0
                depth[c, y, x] = 0
                continue
            p = corner(points, c, faces[f, 0])
            q = corner(points, c, faces[f, 1])
            r = corner(points, c, faces[f, 2])
            d = direction(K, c, x, y)
            w0, w1, w2 = dot(d, cross(q, r)), dot(d, cross(r, p)), dot(d, cross(p, q))
            scale = 1 / (w0 + w1 + w2)
            w0, w1, w2 = w0 * scale, w1 * scale, w2 * scale
            weights[c, y, x, 0], weights[c, y, x, 1], weights[c, y, x, 2] = w0, w1, w2
            depth[c, y, x] = w0 * p[2] + w1 * q[2] + w2 * r[2]


@kernel(**OPTIONS)
def unweigh(points, faces, K, face, g_weights, g_depth, parts, d_points):
    """Adds the gradient of the vertices. With G_i that of b_i, the depth's among it, and h_i =
    (G_i - sum_j G_j b_j) / sum_j w_j that of w_i: dL/dp_i = d x (h_(i+1) p_(i+2) - h_(i+2)
    p_(i+1)), and b_i more of the depth for z_i. A worker has the vertices v with v mod ``parts``
    = part, of one camera."""
    cameras, height, width = face.shape
    for unit in prange(cameras * parts):
        c, part = unit // parts, unit % parts
        for y in range(height):
            for x in range(width):
                f = face[c, y, x]
                if f < 0:
                    continue
                gz = 1.0 * g_depth[c, y, x]
                g0, g1, g2 = (
                    1.0 * g_weights[c, y, x, 0],
                    1.0 * g_weights[c, y, x, 1],
                    1.0 * g_weights[c, y, x, 2],
                )
                if g0 == 0 and g1 == 0 and g2 == 0 and gz == 0:
                    continue
                i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
                p, q, r = corner(points, c, i), corner(points, c, j), corner(points, c, k)
                d = direction(K, c, x, y)
                w0, w1, w2 = dot(d, cross(q, r)), dot(d, cross(r, p)), dot(d, cross(p, q))
                scale = 1 / (w0 + w1 + w2)
                w0, w1, w2 = w0 * scale, w1 * scale, w2 * scale
                g0, g1, g2 = g0 + gz * p[2], g1 + gz * q[2], g2 + gz * r[2]
                mean = g0 * w0 + g1 * w1 + g2 * w2
                h0, h1, h2 = (g0 - mean) * scale, (g1 - mean) * scale, (g2 - mean) * scale
                if i % parts == part:
                    push(d_points, c, i, d, h1, r, h2, q, w0 * gz)
                if j % parts == part:
                    push(d_points, c, j, d, h2, p, h0, r, w1 * gz)
                if k % parts == part:
                    push(d_points, c, k, d, h0, q, h1, p, w2 * gz)


@njit(**INNER)
def push(d_points, c, v, d, s, a, t, b, z):
    """Adds d x (s a - t b), and z along the camera's axis."""
    g = cross(d, (s * a[0] - t * b[0], s * a[1] - t * b[1], s * a[2] - t * b[2]))
    d_points[c, v, 0] += g[0]
    d_points[c, v, 1] += g[1]
    d_points[c, v, 2] += g[2] + z


# ------------------------------------------------------------------------------ silhouettes
@njit(**INNER)
def walk(points, faces, neighbours, K, c, f, a, b, upright):
    """The silhouette between two pixel centres: 3 triangle + corner that it is opposite to, or
    -1; see ``reference.crossings``."""
    for _ in range(STEPS):
        p = corner(points, c, faces[f, 0])
        q = corner(points, c, faces[f, 1])
        r = corner(points, c, faces[f, 2])
        best, at, nx, ny, nz = math.inf, -1, 0.0, 0.0, 0.0
        n0, n1, n2 = cross(q, r), cross(r, p), cross(p, q)
        side = dot(p, n0)
        sign = 1.0 if side > 0 else (-1.0 if side < 0 else 0.0)
        for i in range(3):
            n = n0 if i == 0 else (n1 if i == 1 else n2)
            w_b = sign * dot(b, n)
            if w_b < 0:
                w_a = sign * dot(a, n)
                if w_a > w_b and w_a < best * (w_a - w_b):
                    best, at = w_a / (w_a - w_b), i
                    nx, ny, nz = sign * n[0], sign * n[1], sign * n[2]
        if at < 0:
            return -1
        other = neighbours[f, at]
        if other >= 0:
            j, k = faces[f, (at + 1) % 3], faces[f, (at + 2) % 3]
            opposite = faces[other, 0]
            for i in range(3):
                v = faces[other, i]
                if v != j and v != k:
                    opposite = v
                    break
            if not dot(corner(points, c, opposite), (nx, ny, nz)) >= 0:
                f = other
                continue
        flat, steep = abs(ny / K[c, 1, 1]), abs(nx / K[c, 0, 0])
        counts = flat > steep if upright else steep >= flat
        return 3 * f + at if counts else -1
    return -1


@kernel(**OPTIONS)
def find(points, faces, neighbours, K, face, depth, edges):
    """Writes ``edges`` (2, C, H, W): of the pair of each pixel with the one to the right, then with
    the one below, the silhouette between them as ``walk`` gives it, 0 and above; -2 - it where the
    second pixel is the nearer one; -1 for none."""
    cameras, height, width = face.shape
    for row in prange(cameras * height):
        c, y = row // height, row % height
        for x in range(width):
            for axis in range(2):
                edges[axis, c, y, x] = -1
                x2, y2 = x + 1 - axis, y + axis
                if x2 == width or y2 == height:
                    continue
                f, g = face[c, y, x], face[c, y2, x2]
                if f == g:
                    continue
                first = g < 0 or (f >= 0 and depth[c, y, x] <= depth[c, y2, x2])
                a, b = direction(K, c, x, y), direction(K, c, x2, y2)
                if first:
                    edges[axis, c, y, x] = walk(points, faces, neighbours, K, c, f, a, b, axis == 1)
                else:
                    edge = walk(points, faces, neighbours, K, c, g, b, a, axis == 1)
                    edges[axis, c, y, x] = -2 - edge if edge >= 0 else -1


@njit(**INNER)
def pair(faces, K, places, edges, axes, i, shape):
    """Of a crossing: the camera, the ends of its edge, the rays of the nearer and of the farther
    pixel, and the sign of its shift."""
    height, width = shape
    place, code = places[i], edges[i]
    first = code >= 0
    code = code if first else -2 - code
    f, at = code // 3, code % 3
    c, y, x = place // (height * width), place // width % height, place % width
    a, b = direction(K, c, x, y), direction(K, c, x + 1 - axes[i], y + axes[i])
    if not first:
        a, b = b, a
    return c, faces[f, (at + 1) % 3], faces[f, (at + 2) % 3], a, b, 1.0 if first else -1.0


@kernel(**INNER)
def shift(points, faces, K, places, edges, axes, shape, shifts):
    """Writes the shift of each crossing: t - 1/2 from the nearer pixel."""
    for i in range(len(places)):
        c, j, k, a, b, sign = pair(faces, K, places, edges, axes, i, shape)
        n = cross(corner(points, c, j), corner(points, c, k))
        w_a, w_b = dot(a, n), dot(b, n)
        shifts[i] = sign * (w_a / (w_a - w_b) - 0.5)


@kernel(**INNER)
def unshift(points, faces, K, places, edges, axes, shape, g_shifts, d_points):
    """Adds the gradient of the vertices: dt/dn = (w_A d_B - w_B d_A) / (w_A - w_B)^2, n = p x q."""
    for i in range(len(places)):
        c, j, k, a, b, sign = pair(faces, K, places, edges, axes, i, shape)
        p, q = corner(points, c, j), corner(points, c, k)
        n = cross(p, q)
        w_a, w_b = dot(a, n), dot(b, n)
        scale = sign * g_shifts[i] / (w_a - w_b) ** 2
        s, t = scale * w_a, scale * w_b
        g = s * b[0] - t * a[0], s * b[1] - t * a[1], s * b[2] - t * a[2]
        gp, gq = cross(q, g), cross(g, p)
        for axis in range(3):
            d_points[c, j, axis] += gp[axis]
            d_points[c, k, axis] += gq[axis]


# ------------------------------------------------------------------------------ attributes
@kernel(**OPTIONS)
def blend(attributes, faces, face, weights, out):
    """out = sum_i b_i a_i; 0 where there is nothing. ``face`` (rows, W), of all images."""
    channels = attributes.shape[1]
    for row in prange(face.shape[0]):
        for x in range(face.shape[1]):
            f = face[row, x]
            if f < 0:
                for k in range(channels):
                    out[row, x, k] = 0
                continue
            p, q, r = faces[f, 0], faces[f, 1], faces[f, 2]
            b0, b1, b2 = weights[row, x, 0], weights[row, x, 1], weights[row, x, 2]
            for k in range(channels):
                out[row, x, k] = (
                    b0 * attributes[p, k] + b1 * attributes[q, k] + b2 * attributes[r, k]
                )


@kernel(**OPTIONS)
def unblend_weights(attributes, faces, face, g_out, g_weights):
    """dL/db_i = a_i . dL/dout."""
    channels = attributes.shape[1]
    for row in prange(face.shape[0]):
        for x in range(face.shape[1]):
            f = face[row, x]
            for i in range(3):
                total = 0.0
                if f >= 0:
                    v = faces[f, i]
                    for k in range(channels):
                        total += attributes[v, k] * g_out[row, x, k]
                g_weights[row, x, i] = total


@kernel(**OPTIONS)
def unblend(faces, face, weights, g_out, parts, d_attributes):
    """dL/da_v = sum b_i dL/dout. A worker has the vertices v with v mod ``parts`` = part."""
    channels = d_attributes.shape[1]
    for part in prange(parts):
        for row in range(face.shape[0]):
            for x in range(face.shape[1]):
                f = face[row, x]
                if f < 0:
                    continue
                for i in range(3):
                    v = faces[f, i]
                    if v % parts == part:
                        b = 1.0 * weights[row, x, i]
                        for k in range(channels):
                            d_attributes[v, k] += b * g_out[row, x, k]


# ------------------------------------------------------------------------------ texture
@njit(**INNER)
def place(u, v, columns, rows):
    """The column and the row of the upper left one of the four texels around a point, of a texture
    that repeats, and how far beyond it the point is, 0..1. A place beyond 1e9 times the texture, or
    one that is no number, is the corner's."""
    x, y = u * columns - 0.5, (1 - v) * rows - 0.5
    if not (abs(x) < 1e9 * columns and abs(y) < 1e9 * rows):
        return 0, 0, 0.0, 0.0
    x0, y0 = math.floor(x), math.floor(y)
    left, top = int(x0), int(y0)
    if left < 0 or left >= columns:  # a division takes longer than all the rest
        left = left % columns
    if top < 0 or top >= rows:
        top = top % rows
    return left, top, x - x0, y - y0


@kernel(**OPTIONS)
def look_up(texture, uv, face, out):
    """Bilinear interpolation of the texels, 0 where there is nothing."""
    rows, columns, channels = texture.shape
    for row in prange(face.shape[0]):
        for x in range(face.shape[1]):
            if face[row, x] < 0:
                for k in range(channels):
                    out[row, x, k] = 0
                continue
            left, top, s, t = place(1.0 * uv[row, x, 0], 1.0 * uv[row, x, 1], columns, rows)
            right = left + 1 if left + 1 < columns else 0
            below = top + 1 if top + 1 < rows else 0
            for k in range(channels):
                upper = texture[top, left, k] * (1 - s) + texture[top, right, k] * s
                lower = texture[below, left, k] * (1 - s) + texture[below, right, k] * s
                out[row, x, k] = upper * (1 - t) + lower * t


@kernel(**OPTIONS)
def un_look_up_place(texture, uv, face, g_out, g_uv):
    """dL/duv: du = columns dx, dv = -rows dy."""
    rows, columns, channels = texture.shape
    for row in prange(face.shape[0]):
        for x in range(face.shape[1]):
            gs, gt = 0.0, 0.0
            if face[row, x] >= 0:
                left, top, s, t = place(1.0 * uv[row, x, 0], 1.0 * uv[row, x, 1], columns, rows)
                right = left + 1 if left + 1 < columns else 0
                below = top + 1 if top + 1 < rows else 0
                for k in range(channels):
                    a, b = texture[top, left, k], texture[top, right, k]
                    c, d = texture[below, left, k], texture[below, right, k]
                    g = g_out[row, x, k]
                    gs += g * ((b - a) * (1 - t) + (d - c) * t)
                    gt += g * ((c - a) * (1 - s) + (d - b) * s)
            g_uv[row, x, 0], g_uv[row, x, 1] = gs * columns, -gt * rows


@kernel(**OPTIONS)
def un_look_up(uv, face, g_out, parts, d_texture):
    """dL/dtexel. A worker has the rows r of the texture with r mod ``parts`` = part."""
    rows, columns, channels = d_texture.shape
    for part in prange(parts):
        for row in range(face.shape[0]):
            for x in range(face.shape[1]):
                if face[row, x] < 0:
                    continue
                left, top, s, t = place(1.0 * uv[row, x, 0], 1.0 * uv[row, x, 1], columns, rows)
                right = left + 1 if left + 1 < columns else 0
                below = top + 1 if top + 1 < rows else 0
                for k in range(channels):
                    g = g_out[row, x, k]
                    if top % parts == part:
                        d_texture[top, left, k] += g * (1 - s) * (1 - t)
                        d_texture[top, right, k] += g * s * (1 - t)
                    if below % parts == part:
                        d_texture[below, left, k] += g * (1 - s) * t
                        d_texture[below, right, k] += g * s * t
