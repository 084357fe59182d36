"""The reference in tiles: each triangle against the pixels of the tiles that it meets, in torch.

It needs nothing compiled. ``cpu`` draws by it where its kernels are not compiled and a few pictures
are not worth the time, and the benchmark compares the kernels with it.
"""

import torch
from lods.meshes.fragments import Fragments
from lods.meshes.reference import antialias, interpolate, nearest, ray, sample, weigh

__all__ = ["antialias", "interpolate", "rasterize", "sample"]

TILE = 16  # pixels
MOST = 1 << 20  # pairs of a pixel and a triangle that are in memory at a time


def rasterize(points, faces, Ks, width, height, near_plane, far_plane) -> Fragments:
    """See ``reference.rasterize``."""
    device, Ks = points.device, Ks.to(points)
    face = torch.full((len(points), height, width), -1, dtype=torch.int64, device=device)
    for i, seen in enumerate(points.detach()):
        corners = seen[faces]
        low, high = _boxes(corners, Ks[i], near_plane)
        for top in range(0, height, TILE):
            bottom = min(top + TILE, height)
            row = ((high[:, 1] > top) & (low[:, 1] < bottom)).nonzero()[:, 0]
            for left in range(0, width, TILE):
                right = min(left + TILE, width)
                mine = row[(high[row, 0] > left) & (low[row, 0] < right)]
                if not len(mine):
                    continue
                y, x = torch.meshgrid(
                    torch.arange(top, bottom, device=device),
                    torch.arange(left, right, device=device),
                    indexing="ij",
                )
                directions = ray(x.flatten(), y.flatten(), Ks[i], points.dtype)
                found = [
                    nearest(corners[mine], part, near_plane, far_plane)
                    for part in directions.split(max(1, MOST // len(mine)))
                ]
                local = torch.cat(found)
                local = torch.where(local >= 0, mine[local], local)
                face[i, top:bottom, left:right] = local.view(bottom - top, right - left)
    return weigh(points, faces, Ks, face)


def _boxes(corners, K, near):
    """The boxes of triangles in the image, (F, 2) each; the whole image for one that comes nearer
    than the near plane, no place for one that is wholly nearer."""
    z = corners[..., 2]
    x = K[0, 0] * corners[..., 0] / z + K[0, 2]
    y = K[1, 1] * corners[..., 1] / z + K[1, 2]
    places = torch.stack([x, y], dim=-1)
    low, high = places.amin(1), places.amax(1)
    crosses, gone = (z < near).any(1, keepdim=True), (z < near).all(1, keepdim=True)
    low = torch.where(crosses, -torch.inf, low).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    high = torch.where(crosses, torch.inf, high).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return low, torch.where(gone, -torch.inf, high)
