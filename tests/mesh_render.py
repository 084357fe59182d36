"""Drawing a mesh the plain way, as the oracle of what viewers show in flat light."""

import numpy as np
from numba import njit


@njit
def _draw(points, faces, colors, image, depth):
    """Pixel (row, column) has its centre at (column + 1/2, row + 1/2); ``points`` are pixels and
    the distance z along the view; colours are interpolated in space (with 1 / z)."""
    height, width = depth.shape
    for f in range(faces.shape[0]):
        a, b, c = points[faces[f, 0]], points[faces[f, 1]], points[faces[f, 2]]
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if area == 0:
            continue
        x0, x1 = min(a[0], b[0], c[0]), max(a[0], b[0], c[0])
        y0, y1 = min(a[1], b[1], c[1]), max(a[1], b[1], c[1])
        for row in range(max(0, int(y0 - 0.5)), min(height, int(y1 + 1.5))):
            for column in range(max(0, int(x0 - 0.5)), min(width, int(x1 + 1.5))):
                x, y = column + 0.5, row + 0.5
                v = ((x - a[0]) * (c[1] - a[1]) - (y - a[1]) * (c[0] - a[0])) / area
                w = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / area
                u = 1 - v - w
                if u < 0 or v < 0 or w < 0:
                    continue
                near = u / a[2] + v / b[2] + w / c[2]
                if 1 / near < depth[row, column]:
                    depth[row, column] = 1 / near
                    for k in range(colors.shape[1]):
                        mixed = u / a[2] * colors[faces[f, 0], k]
                        mixed += v / b[2] * colors[faces[f, 1], k]
                        mixed += w / c[2] * colors[faces[f, 2], k]
                        image[row, column, k] = mixed / near


def draw(vertices, faces, colors, position, fovy, size):
    """``(image, mask)``: (size, size, C) of vertex colours seen from ``position``, which looks at
    the origin with y up and ``fovy`` degrees; 0 where nothing is."""
    back = np.asarray(position, float) / np.linalg.norm(position)
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    seen = (np.asarray(vertices, float) - position) @ np.stack(
        [right, np.cross(back, right), -back]
    ).T
    focal = size / 2 / np.tan(np.radians(fovy) / 2)
    pixels = np.stack([seen[:, 0], -seen[:, 1]], axis=1) / seen[:, 2:] * focal + size / 2
    points = np.c_[pixels, seen[:, 2]]
    image = np.zeros((size, size, np.shape(colors)[1]))
    depth = np.full((size, size), np.inf)
    _draw(points, np.asarray(faces, np.int64), np.asarray(colors, float), image, depth)
    return image, np.isfinite(depth)
