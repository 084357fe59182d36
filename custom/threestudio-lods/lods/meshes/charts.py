"""Which texels of a texture the charts of a mesh cover, and what goes with them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# a point of a chart is at most so far, in texels, from the centre of the texel that it lies in
REACH = 0.5 * 2**0.5 + 1e-6


@dataclass
class Charts:
    """The charts of a texture of h x w texels.

    - ``number`` (h, w): the chart that each texel belongs to, -1 for none. A texel belongs to one
      if the chart has a point within half a texel's diagonal of its centre, so that each point of a
      chart lies in a texel of its own.
    - ``beside`` (K,): the texels of no chart, as places in h * w, and ``border`` (K,), which texel
      of a chart each of them goes with: that of the nearest point of the nearest chart. Filters
      look them up at the borders of the charts, and smaller copies of the texture mix them in.
    - ``texel``: the side of a texel on the surface, in world units, the mean over the mesh.
    """

    number: Int[Tensor, "h w"]
    beside: Int[Tensor, " K"]
    border: Int[Tensor, " K"]
    texel: float

    @property
    def own(self) -> Bool[Tensor, "h w"]:
        """The texels that belong to a chart."""
        return self.number >= 0

    def to(self, device: torch.device) -> "Charts":
        """The same on a device."""
        parts = (self.number, self.beside, self.border)
        return Charts(*(part.to(device) for part in parts), self.texel)


def charts_of(
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    uv: Float[Tensor, "T 2"],
    uv_faces: Int[Tensor, "F 3"],
    height: int,
    width: int,
) -> Charts | None:
    """The charts of a mesh, on the CPU; None where the texture repeats, as it does for coordinates
    beyond 0..1, or where there are no triangles: all of the texture is then in use, or nothing."""
    from lods.assets.baking import texels_of
    from scipy.ndimage import distance_transform_edt
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    vertices, faces, uv, uv_faces = (
        each.detach().cpu() for each in (vertices, faces, uv, uv_faces)
    )
    used = uv[uv_faces]
    if not len(uv_faces) or float(used.min()) < -1e-5 or float(used.max()) > 1 + 1e-5:
        return None
    face, weights = texels_of(uv, uv_faces, height, width)
    near = face >= 0
    corners = uv.double().numpy()[uv_faces.numpy()[face[near]]] * [width, -height] + [0, height]
    point = (corners * weights[near][..., None]).sum(1)  # (column, row); centres end in .5
    row, column = np.nonzero(near)
    away = np.hypot(point[:, 0] - column - 0.5, point[:, 1] - row - 0.5)
    own = np.zeros((height, width), bool)
    own[row, column] = away <= REACH
    if not own.any():
        return None
    rows, columns = distance_transform_edt(~own, return_distances=False, return_indices=True)  # type: ignore
    border = (rows * width + columns).reshape(-1)
    inside = np.floor(point).astype(np.int64).clip(0, [width - 1, height - 1])
    at = np.where(own[inside[:, 1], inside[:, 0]], inside[:, 1] * width + inside[:, 0], -1)
    place = row * width + column
    border[place[at >= 0]] = at[at >= 0]
    beside = np.flatnonzero(~own)
    # corners at one place of the texture are one, also where a file has one for each triangle
    places, same = np.unique(uv.numpy(), axis=0, return_inverse=True)
    joined = same.reshape(-1)[uv_faces.numpy()]
    ends = joined[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), (len(places), len(places)))
    _, part = connected_components(graph, directed=False)
    number = np.where(own, part[joined[:, 0]][face], -1)
    sides = [values[indices] for values, indices in ((vertices, faces), (uv, uv_faces))]
    area, flat = (_area(side.double()) for side in sides)
    texel = (area / max(flat * height * width, 1e-30)) ** 0.5
    found = (torch.from_numpy(np.ascontiguousarray(v)) for v in (number, beside, border[beside]))
    return Charts(*(each.long() for each in found), texel)


def points_of(
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    uv: Float[Tensor, "T 2"],
    uv_faces: Int[Tensor, "F 3"],
    charts: Charts,
) -> Float[Tensor, "K 3"]:
    """Where on the surface the texels of the charts are, in the order of ``charts.own``: the points
    at their centres, or those nearest to them."""
    from lods.assets.baking import texels_of

    own = charts.own.cpu().numpy()
    face, weights = texels_of(uv, uv_faces, *own.shape)
    corners = vertices.detach().cpu()[faces.cpu()[torch.from_numpy(face[own])]]
    shares = torch.from_numpy(weights[own])[..., None]
    return (corners * shares).sum(1).to(vertices)


def _area(corners: Float[Tensor, "F 3 D"]) -> float:
    """Of triangles in the plane or in space."""
    if corners.shape[-1] == 2:
        corners = torch.nn.functional.pad(corners, (0, 1))
    a, b, c = corners.unbind(1)
    return float(torch.linalg.cross(b - a, c - a).norm(dim=-1).sum()) / 2


def filled(
    texture: Float[Tensor, "h w D"], start: Float[Tensor, "h w D"], charts: Charts
) -> Float[Tensor, "h w D"]:
    """The texture whose texels beside the charts have the colours of the borders that they go with,
    wherever those have changed since ``start``; elsewhere they are as they were there.

    A gradient of theirs goes to the borders: what a filter reads is one texel with what it shows.
    """
    channels = texture.shape[-1]
    flat, before = texture.reshape(-1, channels), start.reshape(-1, channels)
    # whose gradient is added in one order, by however many threads
    source = torch.nn.functional.embedding(charts.border, flat)
    now = source.detach()
    changed = (now != before[charts.border]).any(-1, keepdim=True)
    value = torch.where(changed, now, before[charts.beside]) + (source - now)
    return flat.index_put((charts.beside,), value).view(texture.shape)


def smaller(texture: Float[Tensor, "h w D"], level: int) -> Float[Tensor, "H W D"]:
    """A copy with 1/2^``level`` of the texels along each side, at least one, by a triangle filter
    over two of its own texels. Its gradient reaches every texel of the original."""
    height, width = (max(1, side >> level) for side in texture.shape[:2])
    image = texture.permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(
        image, (height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return small[0].permute(1, 2, 0)


def with_unseen(
    texture: Float[Tensor, "h w D"],
    start: Float[Tensor, "h w D"],
    charts: Charts,
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    uv: Float[Tensor, "T 2"],
    uv_faces: Int[Tensor, "F 3"],
) -> Float[Tensor, "h w D"]:
    """The texture where texels of charts that are as in ``start`` have the colour of the texel,
    nearest on the surface in space, that is not: what no view has reached takes after what some
    have. The texture itself if there are none of the one kind or the other."""
    from scipy.spatial import cKDTree  # type: ignore[attr-defined]

    own = charts.own
    seen = (texture != start).any(-1)[own]
    if seen.all() or not seen.any():
        return texture
    points = points_of(vertices, faces, uv, uv_faces, charts).cpu().numpy()
    known = seen.cpu().numpy()
    _, nearest = cKDTree(points[known]).query(points[~known])
    colours = texture[own]
    colours[~seen] = colours[seen][torch.from_numpy(np.asarray(nearest)).to(texture.device)]
    result = texture.clone()
    result[own] = colours
    return result
