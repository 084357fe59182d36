"""Textures of a mesh: which point of the surface a texel shows, and what surrounds the charts."""

import numpy as np

from threestudio.utils.typing import *

_BATCH = 2**20  # candidate texels at a time: about 150 MB


def surface_points(
    v_pos: Float[np.ndarray, "Nv 3"],
    t_pos_idx: Integer[np.ndarray, "Nf 3"],
    v_tex: Float[np.ndarray, "Nt 2"],
    t_tex_idx: Integer[np.ndarray, "Nf 3"],
    size: int,
) -> Tuple[Integer[np.ndarray, "K"], Float[np.ndarray, "K 3"]]:
    """Draw all triangles into a (size, size) texture: ``(texels, points)``, the flat indices
    ``row * size + column`` of the texels that show the surface, and where on it they are.

    The texel in ``row`` and ``column`` has its centre at u = (column + 1/2) / size and
    v = (row + 1/2) / size. It shows the point with the barycentric coordinates of that centre in
    the triangle that contains it. A texel that contains a corner of a triangle, but whose centre
    no triangle contains, shows that corner: triangles smaller than a texel are not lost.
    """
    corners = v_tex[t_tex_idx].astype(np.float64) * size - 0.5  # centres are whole numbers
    low = np.ceil(corners.min(axis=1) - 1e-6).clip(0, size).astype(np.int64)
    high = np.floor(corners.max(axis=1) + 1e-6).clip(-1, size - 1).astype(np.int64)
    width, height = (high - low + 1).clip(0).T
    batch = np.cumsum(width * height) // _BATCH
    points = np.zeros((size * size, 3))
    shown = np.zeros(size * size, dtype=bool)
    for faces in np.split(np.arange(len(corners)), np.flatnonzero(np.diff(batch)) + 1):
        face, x, y = _candidates(faces, low, width, height)
        weights = _barycentric(corners, face, x, y)
        inside = (weights > -1e-6).all(axis=1)  # never so where the triangle has no area
        texel = (y * size + x)[inside]
        corner_points = v_pos[t_pos_idx[face[inside]]]
        points[texel] = (weights[inside][:, :, None] * corner_points).sum(axis=1)
        shown[texel] = True
    corner = (v_tex[t_tex_idx].reshape(-1, 2) * size).astype(np.int64).clip(0, size - 1)
    texel = corner[:, 1] * size + corner[:, 0]
    missed = ~shown[texel]
    points[texel[missed]] = v_pos[t_pos_idx.reshape(-1)[missed]]
    shown[texel] = True
    texels = np.flatnonzero(shown)
    return texels, points[texels]


def _candidates(faces, low, width, height):
    """Every texel in the bounding boxes of `faces`, one box after the other: (face, x, y)."""
    count = width[faces] * height[faces]
    face = np.repeat(faces, count)
    within = np.arange(len(face)) - np.repeat(np.cumsum(count) - count, count)
    y, x = np.divmod(within, width[face])
    return face, low[face, 0] + x, low[face, 1] + y


def _barycentric(corners, face, x, y):
    """Weights (N, 3) of the corners of triangles at (x, y), not finite where there is no area."""
    a, ab, ac = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = (ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0])[face]
    px, py = x - a[face, 0], y - a[face, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        second = (px * ac[face, 1] - py * ac[face, 0]) / area
        third = (ab[face, 0] * py - ab[face, 1] * px) / area
        return np.stack([1 - second - third, second, third], axis=1)


def fill_image(
    values: Float[np.ndarray, "K C"], texels: Integer[np.ndarray, "K"], size: int
) -> Float[np.ndarray, "S S C"]:
    """The image with ``values`` at ``texels`` and, everywhere else, the value of the nearest of
    them: filtering at the edge of a chart then mixes in no foreign colour."""
    from scipy.ndimage import distance_transform_edt

    image = np.zeros((size * size, values.shape[1]), dtype=values.dtype)
    image[texels] = values
    empty = np.ones(size * size, dtype=bool)
    empty[texels] = False
    rows, columns = distance_transform_edt(
        empty.reshape(size, size), return_distances=False, return_indices=True
    )
    return image[rows * size + columns]
