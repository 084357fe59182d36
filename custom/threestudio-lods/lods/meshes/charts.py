"""Which texels of a texture the charts of a mesh cover, and what goes with them."""

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lods.meshes.regularize import smoothed
from lods.meshes.topology import neighbours
from torch import Tensor

MOST_STEPS = 20  # of a smoothing, on both sides
MOST_TEXELS = 1 << 22  # of a texture that is smoothed across its seams, with weights for each
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
    - ``seams`` (M, 2): texels on both sides of a seam at the same point of the surface, as places.
    """

    number: Int[Tensor, "h w"]
    beside: Int[Tensor, " K"]
    border: Int[Tensor, " K"]
    texel: float
    seams: Int[Tensor, "M 2"]

    @property
    def own(self) -> Bool[Tensor, "h w"]:
        """The texels that belong to a chart."""
        return self.number >= 0

    def to(self, device: torch.device) -> "Charts":
        """The same on a device."""
        number, beside, border, seams = (
            part.to(device) for part in (self.number, self.beside, self.border, self.seams)
        )
        return Charts(number, beside, border, self.texel, seams)

    @functools.cached_property
    def spreading(self) -> tuple[Tensor, float]:
        """``(S, variance)``: S = I - L / (2 d), sparse (h w, h w), where L is the Laplacian of the
        graph whose edges join texels side by side in a chart, and those of ``seams``, and d is the
        largest number of edges at a texel. Its rows and columns sum to 1, and its eigenvalues are 0
        to 1. ``variance`` = 1 / d is what it adds along each axis, in texels^2."""
        from scipy.sparse import coo_matrix, diags

        number = self.number.cpu().numpy()
        place, total = np.arange(number.size).reshape(number.shape), number.size
        pairs = [self.seams.cpu().numpy()]
        for one, two in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
            alike = (number[one] == number[two]) & (number[one] >= 0)
            pairs.append(np.stack([place[one][alike], place[two][alike]], axis=1))
        ends = np.unique(np.concatenate(pairs), axis=0)
        graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), (total, total))
        graph = (graph + graph.T).tocsr()
        degree = np.asarray(graph.sum(axis=1))[:, 0]
        most = max(float(degree.max()), 1.0)
        matrix = (graph / (2 * most) + diags(1 - degree / (2 * most))).tocsr()
        parts = matrix.indptr, matrix.indices, matrix.data.astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that such tensors are new in torch
            found = torch.sparse_csr_tensor(*map(torch.from_numpy, parts), size=matrix.shape)
        return found.to(self.number.device), 1 / most

    def smoothed(self, values: Float[Tensor, "h w D"], sigma: float) -> Float[Tensor, "h w D"]:
        """Values of the texels, or their gradient, smoothed over the surface by ``sigma`` texels,
        across the seams of the charts, and 0 beside them: S^n K S^n, where S is that of
        ``spreading``, n at most ``MOST_STEPS``, and K, for what they leave of sigma^2, is
        :func:`lods.meshes.regularize.smoothed` within the charts; of more than ``MOST_TEXELS`` K
        alone. That is symmetric and never negative, and exactly 0 where it does not reach, for
        which see there."""
        steps, variance = 0, 0.0
        if self.number.numel() <= MOST_TEXELS:
            spreads, variance = self.spreading
            steps = min(MOST_STEPS, round(sigma**2 / variance / 2))
        rest = sigma**2 - 2 * steps * variance
        result = (values.float() * self.own[..., None]).reshape(-1, values.shape[-1])
        for _ in range(steps):
            result = spreads @ result
        if rest > variance / 2:
            kept = smoothed(result.view(values.shape), rest**0.5, self.number)
            result = kept.reshape(-1, values.shape[-1])
        for _ in range(steps):
            result = spreads @ result
        return result.view(values.shape).to(values.dtype)


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
    number, beside, border = (
        torch.from_numpy(np.ascontiguousarray(each)).long()
        for each in (number, beside, border[beside])
    )
    return Charts(
        number, beside, border, texel, torch.from_numpy(_across(faces, uv, uv_faces, own))
    )


def _across(faces: Tensor, uv: Tensor, uv_faces: Tensor, own: np.ndarray) -> np.ndarray:
    """Pairs (M, 2) of texels of charts, as places in h * w, at the same points of seams."""
    height, width = own.shape
    beside = neighbours(faces)
    triangle, corner = (beside >= 0).nonzero().unbind(1)
    other = beside[triangle, corner]
    ends, places = [], []
    for turn in (1, 2):
        at = (corner + turn) % 3
        vertex = faces[triangle, at]
        there = (faces[other] == vertex[:, None]).long().argmax(1)
        ends.append((uv_faces[triangle, at], uv_faces[other, there]))
    size = torch.tensor([width, -height], dtype=torch.float64)
    offset = torch.tensor([0, height], dtype=torch.float64)
    here, beyond = (
        torch.stack([uv[a].double() * size + offset for a in side], 1) for side in zip(*ends)
    )
    seam = (here - beyond).abs().amax((1, 2)) > 1e-3
    here, beyond = here[seam], beyond[seam]
    if not len(here):
        return np.zeros((0, 2), np.int64)
    length = torch.maximum(*((s[:, 1] - s[:, 0]).norm(dim=1) for s in (here, beyond)))
    count = (2 * length).ceil().long().clamp(1, 4 * max(height, width))
    row = torch.repeat_interleave(torch.arange(len(here)), count)
    step = torch.arange(len(row)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    share = ((step + 0.5) / count[row])[:, None]
    for side in (here, beyond):
        point = (side[row, 0] * (1 - share) + side[row, 1] * share).floor().long().numpy()
        point = point.clip(0, [width - 1, height - 1])
        places.append(point[:, 1] * width + point[:, 0])
    pairs = np.sort(np.stack(places, 1), axis=1)
    good = (pairs[:, 0] != pairs[:, 1]) & own.reshape(-1)[pairs].all(1)
    return np.unique(pairs[good], axis=0)


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
