"""Colours of a surface as a texture: where each texel is on it, and what surrounds the charts."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from lods.assets.mesh import Mesh
from lods.gaussians.kernel_cache import kernel
from lods.gaussians.mesh import Mesh as Surface
from torch import Tensor

PADDING = (4, 8)  # texels between charts, at least and at most
FLAT = 1e-9  # of the square of the surface's side: triangles of less area are none
MARGIN = 1.5  # texels around a triangle that are painted with the nearest point of it


def simplified(
    vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"], most: int
) -> tuple[Float[Tensor, "W 3"], Int[Tensor, "G 3"]]:
    """The surface with at most about ``most`` triangles, by the quadric error of
    ``fast_simplification``; as it is where it has no more of them, or where ``most`` is 0."""
    if not 0 < most < len(faces):
        return vertices, faces
    import fast_simplification

    # without its own thinning of what is flat, which is not bounded by any error
    points, triangles = fast_simplification.simplify(
        vertices.detach().cpu().float().numpy(), faces.cpu().numpy(), target_count=most
    )[:2]
    # corners that fell together leave triangles without an area, and vertices without a normal
    a, b, c = points[triangles].astype(np.float64).transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    triangles = triangles[area > FLAT * np.ptp(points, axis=0).max() ** 2]
    used, triangles = np.unique(triangles, return_inverse=True)
    found = torch.from_numpy(points[used]).float()
    return found, torch.from_numpy(triangles.reshape(-1, 3).astype(np.int64))


def nearest_normals(surface: Surface) -> Callable[[Tensor], Tensor]:
    """A function from points (N, 3) to the normals (N, 3) of ``surface`` at its vertices nearest to
    them: those of a fine surface are smoother than those of what it is simplified to."""
    from scipy.spatial import cKDTree  # type: ignore[attr-defined]

    tree, normals = cKDTree(surface.vertices.detach().cpu().numpy()), surface.normals().cpu()
    return lambda points: normals[torch.from_numpy(np.asarray(tree.query(points.numpy())[1]))]


def unwrapped(
    vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"], size: int
) -> tuple[Int[Tensor, " W"], Int[Tensor, "F 3"], Float[Tensor, "W 2"]]:
    """Cut a surface into charts that do not overlap in a texture of ``size`` x ``size`` texels, by
    xatlas: ``(origin, faces, uv)``. A vertex on a seam is there once for each chart; ``origin``
    tells which of ``vertices`` it is. ``uv`` is as in :class:`lods.assets.Mesh`, v upward."""
    import xatlas

    # of unit size: xatlas has thresholds of its own
    points = vertices.detach().cpu().double().numpy()
    points = (points - points.min(axis=0)) / max(float(np.ptp(points, axis=0).max()), 1e-300)
    atlas = xatlas.Atlas()
    atlas.add_mesh(
        np.ascontiguousarray(points.astype(np.float32)),
        np.ascontiguousarray(faces.cpu().numpy().astype(np.uint32)),
    )
    charts, packing = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_iterations = 1
    # smaller copies of the texture keep the charts apart for as long as there is room for it
    packing.padding, packing.resolution = min(max(PADDING[0], size // 64), PADDING[1]), size
    atlas.generate(charts, packing)
    if atlas.atlas_count > 1:
        raise ValueError(
            f"the charts of the surface do not fit into a texture of {size} x {size}: make the "
            "texture larger, or the surface of fewer triangles"
        )
    origin, corners, uv = atlas[0]
    uv = torch.from_numpy(np.array(uv, np.float32))
    uv[:, 1] = 1 - uv[:, 1]
    return (
        torch.from_numpy(np.array(origin).astype(np.int64)),
        torch.from_numpy(np.array(corners).astype(np.int64).reshape(-1, 3)),
        uv,
    )


@kernel()
def _draw(corners, face, weights, distance, margin):
    """Draw triangles of texels (F, 3, 2), centres at whole numbers, the nearest for each texel."""
    height, width = face.shape
    for f in range(corners.shape[0]):
        ax, ay = corners[f, 0, 0], corners[f, 0, 1]
        ux, uy = corners[f, 1, 0] - ax, corners[f, 1, 1] - ay
        vx, vy = corners[f, 2, 0] - ax, corners[f, 2, 1] - ay
        area = ux * vy - uy * vx
        x0 = max(0, int(np.ceil(min(ax, ax + ux, ax + vx) - margin)))
        x1 = min(width - 1, int(np.floor(max(ax, ax + ux, ax + vx) + margin)))
        y0 = max(0, int(np.ceil(min(ay, ay + uy, ay + vy) - margin)))
        y1 = min(height - 1, int(np.floor(max(ay, ay + uy, ay + vy) + margin)))
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                px, py = x - ax, y - ay
                b, c, best = 0.0, 0.0, np.inf
                if area != 0.0:
                    b, c = (px * vy - py * vx) / area, (ux * py - uy * px) / area
                    if b >= 0.0 and c >= 0.0 and b + c <= 1.0:
                        best = 0.0
                if best > 0.0:  # the nearest point of the three edges
                    for edge in range(3):
                        sx = ux if edge == 2 else 0.0
                        sy = uy if edge == 2 else 0.0
                        ex = ux if edge == 0 else (vx if edge == 1 else vx - ux)
                        ey = uy if edge == 0 else (vy if edge == 1 else vy - uy)
                        length = ex * ex + ey * ey
                        t = 0.0
                        if length > 0.0:
                            t = ((px - sx) * ex + (py - sy) * ey) / length
                            t = min(1.0, max(0.0, t))
                        dx, dy = px - sx - t * ex, py - sy - t * ey
                        if dx * dx + dy * dy < best:
                            best = dx * dx + dy * dy
                            b = t if edge == 0 else (0.0 if edge == 1 else 1.0 - t)
                            c = 0.0 if edge == 0 else t
                if best <= margin * margin and best < distance[y, x]:
                    distance[y, x], face[y, x] = best, f
                    weights[y, x, 0], weights[y, x, 1], weights[y, x, 2] = 1.0 - b - c, b, c


def texels_of(
    uv: Float[Tensor, "V 2"],
    faces: Int[Tensor, "F 3"],
    height: int,
    width: int,
    margin: float = MARGIN,
) -> tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "H W 3"]]:
    """Which triangle each texel shows, -1 for none, and where in it: barycentric coordinates.

    A texel shows the triangle that contains its centre, which is at u = (column + 1/2) / width and
    v = 1 - (row + 1/2) / height; else the point nearest to its centre of the nearest triangle that
    is at most MARGIN texels away.
    """
    places = uv.double().cpu().numpy() * [width, -height] + [-0.5, height - 0.5]
    face = np.full((height, width), -1, np.int64)
    weights = np.zeros((height, width, 3))
    distance = np.full((height, width), np.inf)
    _draw(np.ascontiguousarray(places[faces.cpu().numpy()]), face, weights, distance, margin)
    return face, weights


@kernel()
def _count(corners, counts):
    """Add 1 for each triangle of texels (F, 3, 2) that a centre, a whole number, is well within: a
    hundredth of a texel from its sides, which two triangles share."""
    height, width = counts.shape
    for f in range(corners.shape[0]):
        ax, ay = corners[f, 0, 0], corners[f, 0, 1]
        bx, by = corners[f, 1, 0], corners[f, 1, 1]
        cx, cy = corners[f, 2, 0], corners[f, 2, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0.0:
            continue
        sign = 1.0 if area > 0.0 else -1.0
        x0, x1 = max(0, int(np.ceil(min(ax, bx, cx)))), min(width - 1, int(max(ax, bx, cx)))
        y0, y1 = max(0, int(np.ceil(min(ay, by, cy)))), min(height - 1, int(max(ay, by, cy)))
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                within = True
                for edge in range(3):
                    px, py = corners[f, edge, 0], corners[f, edge, 1]
                    qx, qy = corners[f, (edge + 1) % 3, 0], corners[f, (edge + 1) % 3, 1]
                    side = sign * ((qx - px) * (y - py) - (qy - py) * (x - px))
                    if side < 0.01 * np.sqrt((qx - px) ** 2 + (qy - py) ** 2):
                        within = False
                if within:
                    counts[y, x] += 1


def shared_texels(
    uv: Float[Tensor, "V 2"], faces: Int[Tensor, "F 3"], height: int, width: int
) -> int:
    """How many texels have their centres in several triangles: parts that are painted alike."""
    places = uv.detach().cpu().double().numpy() * [width, -height] + [-0.5, height - 0.5]
    counts = np.zeros((height, width), np.int32)
    _count(np.ascontiguousarray(places[faces.cpu().numpy()]), counts)
    return int((counts > 1).sum())


def spread(image: Float[np.ndarray, "H W C"], known: np.ndarray) -> Float[np.ndarray, "H W C"]:
    """The image with the value of the nearest known texel at all others, so that filters and
    smaller copies of a texture mix in no foreign colour."""
    from scipy.ndimage import distance_transform_edt

    if known.all() or not known.any():
        return image
    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)  # type: ignore
    return image[rows, columns]


def bake(
    mesh: Mesh,
    colour_at: Callable[[Tensor, Tensor], Tensor],
    size: int = 1024,
    batch: int = 1 << 20,
) -> Mesh:
    """The mesh with a texture of ``size`` x ``size`` texels, painted with what ``colour_at`` tells.

    ``colour_at(points, normals)`` gives shown colours 0..1 (N, 3) at points (N, 3) of the surface,
    with its normals (N, 3) there, unit vectors; it is asked for ``batch`` of them at a time. A mesh
    with ``uv`` keeps them; else xatlas cuts it, and vertices on seams are repeated.
    """
    vertices, faces, uv, colours = mesh.vertices, mesh.faces, mesh.uv, mesh.colours
    normals = mesh.normals()
    if uv is None:
        origin, faces, uv = unwrapped(vertices, faces, size)
        vertices, normals = vertices[origin], normals[origin]
        colours = None if colours is None else colours[origin]
    face, weights = texels_of(uv, faces, size, size)
    known = face >= 0
    corners = faces[torch.from_numpy(face[known])]
    share = torch.from_numpy(weights[known]).float()[..., None]
    painted = []
    for corner, part in zip(corners.split(batch), share.split(batch)):
        point = (vertices[corner] * part).sum(1)
        normal = torch.nn.functional.normalize((normals[corner] * part).sum(1), dim=-1)
        painted.append(colour_at(point, normal).detach().cpu().float().clamp(0, 1))
    image = np.zeros((size, size, 3), np.float32)
    if painted:
        image[known] = torch.cat(painted).numpy()
    texture = torch.from_numpy(np.ascontiguousarray(spread(image, known)))
    return Mesh(vertices, faces, uv, texture, colours)
