"""The dense reference: every triangle against every pixel, in the order of the formulas.

It is the oracle that the compiled rasteriser is tested against, and the only place where the
mathematics is written once, without tricks. It works in any float dtype, on any device, and costs
O(cameras * pixels * triangles) in time and memory.

Sources: rasterisation by homogeneous edge functions (Olano and Greer, "Triangle Scan Conversion
using 2D Homogeneous Coordinates", Graphics Hardware 1997), which needs no clipping; analytic
antialiasing of silhouettes (Laine et al. 2020, arXiv:2011.03277, section 3.4), with one addition,
the walk of :func:`crossings`, without which triangles smaller than a pixel lose their edges.
"""

import torch
from jaxtyping import Bool, Float, Int
from lods.meshes.fragments import Crossings, Fragments
from torch import Tensor

STEPS = 16  # triangles that the walk of ``crossings`` may enter between two pixels


def ray(
    x: Tensor, y: Tensor, K: Float[Tensor, "*P 3 3"], dtype: torch.dtype
) -> Float[Tensor, "*P 3"]:
    """The direction, with z = 1, of the ray through the centre of the pixel (x, y): d = ((x + 1/2 -
    cx) / fx, (y + 1/2 - cy) / fy, 1)."""
    u = (x.to(dtype) + 0.5 - K[..., 0, 2]) / K[..., 0, 0]
    v = (y.to(dtype) + 0.5 - K[..., 1, 2]) / K[..., 1, 1]
    return torch.stack([u, v, torch.ones_like(u)], dim=-1)


def edge_normals(corners: Float[Tensor, "*P 3 3"]) -> Float[Tensor, "*P 3 3"]:
    """n_i = p_(i+1) x p_(i+2), for the corners p_0, p_1, p_2 of a triangle in camera space: the
    normals of the planes through the camera and the edge opposite to the corner i."""
    return torch.linalg.cross(corners.roll(-1, dims=-2), corners.roll(-2, dims=-2))


def barycentric(
    corners: Float[Tensor, "*P 3 3"], directions: Float[Tensor, "*P 3"]
) -> tuple[Float[Tensor, "*P 3"], Float[Tensor, "*P"]]:
    """Where a ray from the camera meets the plane of a triangle: with w_i = d . n_i, the weights
    b_i = w_i / sum_j w_j of the corners, which are perspective-correct, and the depth z =
    sum_i b_i z_i."""
    w = (edge_normals(corners) * directions[..., None, :]).sum(-1)
    total = w.sum(-1, keepdim=True)
    weights = w / torch.where(total == 0, torch.ones_like(total), total)
    return weights, (weights * corners[..., 2]).sum(-1)


def rasterize(
    points: Float[Tensor, "C V 3"],
    faces: Int[Tensor, "F 3"],
    Ks: Float[Tensor, "C 3 3"],
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
) -> Fragments:
    """Which triangle each pixel shows at its centre, and where on it.

    ``points`` are the vertices in camera space (OpenCV axes). A pixel shows the nearest triangle
    whose weights at its centre are all 0 or more and whose depth there is above ``near_plane`` and
    below ``far_plane``; of equally near ones the first. Both sides of a triangle are shown.
    Triangles without area as the camera sees them, or with a corner that is not finite, are not.
    """
    cameras, device = len(points), points.device
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    face = torch.empty(cameras, height, width, dtype=torch.int64, device=device)
    for i in range(cameras):
        directions = ray(x.flatten(), y.flatten(), Ks[i].to(points), points.dtype)
        found = nearest(points[i].detach()[faces], directions, near_plane, far_plane)
        face[i] = found.view(height, width)
    return weigh(points, faces, Ks, face)


def nearest(
    corners: Float[Tensor, "F 3 3"],
    directions: Float[Tensor, "P 3"],
    near_plane: float,
    far_plane: float,
) -> Int[Tensor, " P"]:
    """The triangle that each ray from the camera meets first, of equally near ones the first; -1
    for none."""
    if not len(corners):
        return torch.full((len(directions),), -1, dtype=torch.int64, device=corners.device)
    usable = torch.isfinite(corners).all(-1).all(-1)
    corners = torch.where(usable[:, None, None], corners, torch.ones_like(corners))
    usable = usable & ((corners[:, 0] * edge_normals(corners)[:, 0]).sum(-1) != 0)
    weights, z = barycentric(corners[None], directions[:, None])
    hit = usable & (weights >= 0).all(-1) & (z > near_plane) & (z < far_plane)
    least, face = torch.where(hit, z, torch.full_like(z, torch.inf)).min(dim=1)
    return torch.where(least.isfinite(), face, torch.full_like(face, -1))


def weigh(
    points: Float[Tensor, "C V 3"],
    faces: Int[Tensor, "F 3"],
    Ks: Float[Tensor, "C 3 3"],
    face: Int[Tensor, "C H W"],
) -> Fragments:
    """The weights and the depth of the triangles that the pixels show."""
    seen = face >= 0
    camera, y, x = seen.nonzero().unbind(1)
    directions = ray(x, y, Ks.to(points)[camera], points.dtype)
    weights, depth = barycentric(points[camera[:, None], faces[face[seen]]], directions)
    where = seen.flatten()
    weights = _placed(weights, where).view(*face.shape, 3)
    return Fragments(face, weights, _placed(depth, where).view(face.shape))


def _placed(values: Tensor, where: Bool[Tensor, " P"]) -> Tensor:
    """``values`` at the places that are marked, 0 at the others. Differentiable."""
    out = values.new_zeros(len(where), *values.shape[1:])
    return out.index_put((where.nonzero()[:, 0],), values)


def interpolate(
    attributes: Float[Tensor, "V D"], faces: Int[Tensor, "F 3"], fragments: Fragments
) -> Float[Tensor, "C H W D"]:
    """sum_i b_i a_i of what the pixels show; 0 where they show nothing. ``faces`` has a row for
    each triangle that was rasterised, but may index other vertices."""
    seen = fragments.face >= 0
    corners = attributes[faces[fragments.face[seen]]]
    values = (fragments.weights[seen][..., None] * corners).sum(1)
    return _placed(values, seen.flatten()).view(*seen.shape, -1)


def sample(
    texture: Float[Tensor, "h w D"], uv: Float[Tensor, "C H W 2"], fragments: Fragments
) -> Float[Tensor, "C H W D"]:
    """The bilinear interpolation of the four texels around each point; 0 where the pixels show
    nothing.

    The centre of the texel in row r (from the top) and column c lies at u = (c + 1/2) / w, v = 1 -
    (r + 1/2) / h: v points up. The texture repeats in both directions. What is finer than the
    pixels aliases: there is no mip map.
    """
    rows, columns = texture.shape[:2]
    seen = fragments.face >= 0
    x = uv[seen][:, 0] * columns - 0.5
    y = (1 - uv[seen][:, 1]) * rows - 0.5
    x0, y0 = x.detach().floor(), y.detach().floor()
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    left, top = x0.long() % columns, y0.long() % rows
    right, below = (left + 1) % columns, (top + 1) % rows
    upper = texture[top, left] * (1 - fx) + texture[top, right] * fx
    lower = texture[below, left] * (1 - fx) + texture[below, right] * fx
    return _placed(upper * (1 - fy) + lower * fy, seen.flatten()).view(*seen.shape, -1)


def crossings(
    fragments: Fragments,
    points: Float[Tensor, "C V 3"],
    faces: Int[Tensor, "F 3"],
    neighbours: Int[Tensor, "F 3"],
    Ks: Float[Tensor, "C 3 3"],
) -> Crossings:
    """Where silhouettes cross the segments between the centres of pixels side by side.

    Of each pair of pixels that show different triangles (or one of them nothing) let A be the one
    with the nearer surface. From A's triangle the segment from A to B leaves through the edge of
    the smallest

        t_i = w_i(A) / (w_i(A) - w_i(B)),  w_i(X) = d_X . n_i

    of those with w_i(B) < 0, the signs being such that w_i > 0 inside. The edge is a silhouette if
    the triangle across it (``neighbours``, -1 for none) lies on the same side of its plane as this
    one. If it is not, the walk goes on in that triangle, from which the segment leaves in its turn,
    for at most ``STEPS`` triangles; it ends without a crossing in one that B is inside of.

    A silhouette counts in the pairs across it only: for two pixels of one row it has to be steeper
    in the image than 45 degrees, for two of one column the reverse. Then, seen from above, the
    shares that :func:`blend_pairs` gives to the pixels of a row add up to the width that the
    triangles cover in its middle: they are coverages, exact for an edge along an axis, and their
    sum over an image is the area but for the ends of the edges.
    """
    cameras, height, width = fragments.face.shape
    device, dtype = points.device, points.dtype
    pixel = torch.arange(cameras * height * width, device=device).view(cameras, height, width)
    pairs = [
        (pixel[:, :, :-1].flatten(), pixel[:, :, 1:].flatten(), False),
        (pixel[:, :-1].flatten(), pixel[:, 1:].flatten(), True),
    ]
    face, depth = fragments.face.flatten(), fragments.depth.detach().flatten()
    depth = torch.where(face >= 0, depth, torch.full_like(depth, torch.inf))
    lists: list[tuple[Tensor, ...]] = []
    for p, q, upright in pairs:
        differ = face[p] != face[q]
        p, q = p[differ], q[differ]
        first = depth[p] <= depth[q]
        a, b = torch.where(first, p, q), torch.where(first, q, p)
        camera = a // (height * width)
        K = Ks.to(dtype)[camera]
        d_a, d_b = (ray(i % width, i // width % height, K, dtype) for i in (a, b))
        with torch.no_grad():
            edge, corner = _walk(points, faces, neighbours, camera, face[a], d_a, d_b, K, upright)
        at = edge >= 0
        ends = faces[edge[at]].gather(1, torch.stack([corner[at] + 1, corner[at] + 2], 1) % 3)
        one, two = points[camera[at], ends[:, 0]], points[camera[at], ends[:, 1]]
        n = torch.linalg.cross(one, two)
        w_a, w_b = (n * d_a[at]).sum(-1), (n * d_b[at]).sum(-1)
        t = w_a / (w_a - w_b)
        shift = torch.where(first[at], t - 0.5, 0.5 - t)
        lists.append((p[at], q[at], shift))
    return Crossings(*(torch.cat(parts) for parts in zip(*lists)))


def _walk(points, faces, neighbours, camera, face, d_a, d_b, K, upright):
    """The silhouette that each segment crosses: (triangle, corner that it is opposite to), the
    triangle -1 where there is none."""
    triangle = face.clone()
    found, corner = torch.full_like(face, -1), torch.zeros_like(face)
    for _ in range(STEPS):
        going = (triangle >= 0).nonzero()[:, 0]
        if not len(going):
            break
        here, c = triangle[going], camera[going]
        corners = points[c[:, None], faces[here]]
        normals = edge_normals(corners)
        inside = (corners * normals).sum(-1).sign()[..., None]  # of p_i . n_i, alike for all i
        normals = normals * inside
        w_a = (normals * d_a[going, None]).sum(-1)
        w_b = (normals * d_b[going, None]).sum(-1)
        leaves = (w_b < 0) & (w_a > w_b)
        t = torch.where(leaves, w_a / (w_a - w_b), torch.full_like(w_a, torch.inf))
        nearest, i = t.min(dim=1)
        out = nearest.isfinite()
        rows = torch.arange(len(going), device=face.device)
        other = neighbours[here, i]
        n = normals[rows, i]
        # the corner of the triangle across that is not on the edge
        own = faces[here].gather(1, torch.stack([i + 1, i + 2], 1) % 3)
        theirs = faces[other.clamp(min=0)]
        apart = (theirs[:, :, None] != own[:, None]).all(-1)
        opposite = theirs.gather(1, apart.to(torch.uint8).argmax(1, keepdim=True))[:, 0]
        fold = (points[c, opposite] * n).sum(-1) >= 0
        silhouette = out & ((other < 0) | fold)
        steep = (n[:, 0] / K[going, 0, 0]).abs(), (n[:, 1] / K[going, 1, 1]).abs()
        counts = steep[1] > steep[0] if upright else steep[0] >= steep[1]
        hit = going[silhouette & counts]
        found[hit], corner[hit] = here[silhouette & counts], i[silhouette & counts]
        on = out & ~silhouette
        triangle[going] = torch.where(on, other, torch.full_like(other, -1))
    return found, corner


def antialias(
    image: Float[Tensor, "C H W D"],
    fragments: Fragments,
    points: Float[Tensor, "C V 3"],
    faces: Int[Tensor, "F 3"],
    neighbours: Int[Tensor, "F 3"],
    Ks: Float[Tensor, "C 3 3"],
) -> Float[Tensor, "C H W D"]:
    """``image`` with the pixels at silhouettes blended as :func:`blend_pairs` does, by which
    vertices get a gradient there."""
    return blend_pairs(image, crossings(fragments, points, faces, neighbours, Ks))


def blend_pairs(image: Float[Tensor, "C H W D"], found: Crossings) -> Float[Tensor, "C H W D"]:
    """Of a pair (p, q) with the shift s: the silhouette lies s pixels beyond the middle between the
    two centres as seen from p (before it, if negative), so that the surface of p covers a share s
    of q, or that of q a share -s of p:

        q <- q + s (p - q) for s >= 0,   p <- p - s (q - p) for s < 0,

    with the values of before; shares of several pairs add up.
    """
    flat = image.flatten(0, 2)
    ahead = found.shift >= 0
    target = torch.where(ahead, found.second, found.first)
    other = torch.where(ahead, found.first, found.second)
    share = torch.where(ahead, found.shift, -found.shift)[:, None].to(image.dtype)
    return flat.index_add(0, target, share * (flat[other] - flat[target])).view(image.shape)
