"""A ray caster for scenes made of a few analytic primitives (numba, CPU).

A primitive is a unit shape under an affine map. Every shape but the torus is convex, so a ray
meets it in one interval [t_in, t_out], the intersection of the intervals of its quadrics and
half-spaces; the torus is met by sphere tracing. Units: world units of the scene.

Local unit shapes (z is the local axis):
    SPHERE   |p| <= 1
    DOME     |p| <= 1 and z >= 0
    BOX      |x|, |y|, |z| <= 1
    FRUSTUM  |z| <= 1 and |(x, y)| <= 1 + (taper - 1) (z + 1) / 2    (taper 0 is a cone)
    WEDGE    |x| <= 1, z >= -1 and |y| <= (1 - z) / 2                (a gable roof along x)
    TORUS    distance of p to the unit circle in z = 0 is <= param
"""

import math

import numba
import numpy as np

from pocket.tools import kernel

SPHERE, DOME, BOX, FRUSTUM, WEDGE, TORUS = range(6)
_FAR = 1e9


@numba.njit(fastmath=True)
def _slab(o, d, low, high, axis, t_in, t_out, n):
    """Clip [t_in, t_out] by low <= o + t d <= high; n becomes the normal of the entry face."""
    if abs(d) < 1e-9:
        if o < low or o > high:
            return _FAR, -_FAR
        return t_in, t_out
    near, far = (low - o) / d, (high - o) / d
    sign = -1.0
    if near > far:
        near, far = far, near
        sign = 1.0
    if near > t_in:
        t_in = near
        n[0] = n[1] = n[2] = 0.0
        n[axis] = sign
    return t_in, min(t_out, far)


@numba.njit(fastmath=True)
def _half_space(o, d, a, b, c, h, t_in, t_out, n):
    """Clip by a x + b y + c z <= h."""
    value = a * o[0] + b * o[1] + c * o[2] - h
    rate = a * d[0] + b * d[1] + c * d[2]
    if abs(rate) < 1e-9:
        if value > 0:
            return _FAR, -_FAR
        return t_in, t_out
    t = -value / rate
    if rate < 0:
        if t > t_in:
            t_in = t
            n[0], n[1], n[2] = a, b, c
    else:
        t_out = min(t_out, t)
    return t_in, t_out


@numba.njit(fastmath=True)
def _quadric(o, d, zz, z1, z0, t_in, t_out, n):
    """Clip by x^2 + y^2 <= zz z^2 + z1 z + z0 (a sphere for zz = -1, a cone nappe for zz > 0)."""
    a = d[0] * d[0] + d[1] * d[1] - zz * d[2] * d[2]
    b = 2 * (o[0] * d[0] + o[1] * d[1] - zz * o[2] * d[2]) - z1 * d[2]
    c = o[0] * o[0] + o[1] * o[1] - zz * o[2] * o[2] - z1 * o[2] - z0
    if abs(a) < 1e-9:
        a = 1e-9
    disc = b * b - 4 * a * c
    if disc < 0:
        if a > 0:
            return _FAR, -_FAR
        return t_in, t_out
    root = math.sqrt(disc)
    low, high = (-b - root) / (2 * a), (-b + root) / (2 * a)
    if a < 0:
        # Inside a double cone the ray is in (-inf, high] and [low, inf): keep the branch that
        # overlaps the slab already clipped.
        low, high = high, low
        if t_in < low:
            return t_in, min(t_out, low)
        if t_in >= high:
            return t_in, t_out
        entry = high
    else:
        entry = low
        t_out = min(t_out, high)
    if entry > t_in:
        t_in = entry
        z = o[2] + t_in * d[2]
        n[0] = o[0] + t_in * d[0]
        n[1] = o[1] + t_in * d[1]
        n[2] = -zz * z - 0.5 * z1
    return t_in, t_out


@numba.njit(fastmath=True)
def _hit(kind, param, o, d, n):
    """First t > 0 at which the ray o + t d enters the unit shape, or _FAR; n = local normal."""
    t_in, t_out = 0.0, _FAR
    if kind in (SPHERE, DOME):
        if kind == DOME:
            t_in, t_out = _half_space(o, d, 0.0, 0.0, -1.0, 0.0, t_in, t_out, n)
        t_in, t_out = _quadric(o, d, -1.0, 0.0, 1.0, t_in, t_out, n)
    elif kind == BOX:
        for axis in range(3):
            t_in, t_out = _slab(o[axis], d[axis], -1.0, 1.0, axis, t_in, t_out, n)
    elif kind == FRUSTUM:
        t_in, t_out = _slab(o[2], d[2], -1.0, 1.0, 2, t_in, t_out, n)
        slope = 0.5 * (param - 1)
        base = 1 + slope
        if t_in < t_out:
            t_in, t_out = _quadric(
                o, d, slope * slope, 2 * slope * base, base * base, t_in, t_out, n
            )
    elif kind == WEDGE:
        t_in, t_out = _slab(o[0], d[0], -1.0, 1.0, 0, t_in, t_out, n)
        t_in, t_out = _half_space(o, d, 0.0, 0.0, -1.0, 1.0, t_in, t_out, n)
        t_in, t_out = _half_space(o, d, 0.0, 2.0, 1.0, 1.0, t_in, t_out, n)
        t_in, t_out = _half_space(o, d, 0.0, -2.0, 1.0, 1.0, t_in, t_out, n)
    else:
        reach = 1 + param
        t_in, t_out = _quadric(o, d, -1.0, 0.0, reach * reach, t_in, t_out, n)
        length = math.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
        t = t_in
        for _ in range(48):
            if t >= t_out:
                return _FAR
            x, y, z = o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2]
            ring = math.sqrt(x * x + y * y)
            away = math.sqrt((ring - 1) * (ring - 1) + z * z)
            if away - param < 2e-3:
                n[0] = x * (1 - 1 / max(ring, 1e-6))
                n[1] = y * (1 - 1 / max(ring, 1e-6))
                n[2] = z
                return t
            t += (away - param) / length
        return _FAR
    return t_in if 1e-4 < t_in < t_out else _FAR


@kernel(fastmath=True, nogil=True)
def render(kinds, params, maps, colors, origin, rotation, tan_half, size, samples, light, sky):
    """Ray cast one scene.

    kinds (P,), params (P,), maps (P, 3, 4) world to local, colors (P, 3) in 0..1,
    origin (3,), rotation (3, 3) columns right, up, backward, tan_half = tan(fovy / 2),
    light (5,) = direction (3), ambient, diffuse; sky (2, 3) = background at bottom and top.
    Returns rgb (size, size, 3) in 0..1 and opacity (size, size), averaged over samples^2 rays.
    """
    rgb = np.zeros((size, size, 3))
    opacity = np.zeros((size, size))
    fine = size * samples
    o, d, n, best = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
    ray = np.zeros(3)
    for row in range(fine):
        for column in range(fine):
            u = (2 * (column + 0.5) / fine - 1) * tan_half
            v = (1 - 2 * (row + 0.5) / fine) * tan_half
            for k in range(3):
                ray[k] = rotation[k, 0] * u + rotation[k, 1] * v - rotation[k, 2]
            nearest, which = _FAR, -1
            for p in range(kinds.shape[0]):
                m = maps[p]
                for k in range(3):
                    o[k] = m[k, 0] * origin[0] + m[k, 1] * origin[1]
                    o[k] += m[k, 2] * origin[2] + m[k, 3]
                    d[k] = m[k, 0] * ray[0] + m[k, 1] * ray[1] + m[k, 2] * ray[2]
                # Skip what the ray passes by: a unit shape lies in a ball of radius 1.8 + param.
                dd = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
                od = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
                oo = o[0] * o[0] + o[1] * o[1] + o[2] * o[2]
                reach = 1.8 + params[p]
                if oo - od * od / dd > reach * reach:
                    continue
                t = _hit(kinds[p], params[p], o, d, n)
                if t < nearest:
                    nearest, which = t, p
                    for k in range(3):
                        best[k] = m[0, k] * n[0] + m[1, k] * n[1] + m[2, k] * n[2]
            i, j = row // samples, column // samples
            if which < 0:
                height = 1 - (row + 0.5) / fine
                for k in range(3):
                    rgb[i, j, k] += sky[0, k] + (sky[1, k] - sky[0, k]) * height
            else:
                norm = math.sqrt(best[0] ** 2 + best[1] ** 2 + best[2] ** 2) + 1e-12
                facing = (best[0] * light[0] + best[1] * light[1] + best[2] * light[2]) / norm
                shade = light[3] + light[4] * max(0.0, facing) + 0.08 * best[2] / norm
                opacity[i, j] += 1.0
                for k in range(3):
                    rgb[i, j, k] += min(1.0, max(0.0, colors[which, k] * shade))
    scale = 1.0 / (samples * samples)
    return rgb * scale, opacity * scale
