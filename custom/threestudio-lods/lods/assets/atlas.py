"""From the parts of a mesh file, each with a material of its own, to one mesh with one texture."""

import math
from dataclasses import replace

import numpy as np
import torch
from lods import log
from lods.assets.baking import spread, texels_of, unwrapped
from lods.assets.mesh import Mesh
from lods.gaussians.gltf import GREY
from lods.gaussians.mesh_parts import Part, Picture, linear_from_shown, shown_from_linear

SIDE = 2048  # texels of a texture that is painted anew, at most
MOST_FACES = 60_000  # that are laid out
LARGEST = 8192  # of one that is put together of others
PLAIN = 8  # texels of the tile of a material without a picture
EDGE = 4  # texels around a tile


def mesh_of(parts: list[Part]) -> Mesh:
    """One mesh of all parts, in the file's space, with what viewers show of them.

    A single picture is kept as it is, in 8 bits. Without pictures there are colours at the
    vertices. Several pictures and materials are put side by side into one texture where each is
    used within its borders; where one repeats, or colours of vertices lie over it, the surface is
    laid out and painted anew, in SIDE x SIDE texels at most; one of more than MOST_FACES triangles,
    which would take minutes, gets colours at its vertices instead.

    Raises:
        ValueError: no triangles.
    """
    parts = [part for part in parts if len(part.faces)]
    if not parts:
        raise ValueError("it holds no triangles")
    whole = [_placed(part) for part in parts]
    vertices = torch.from_numpy(np.concatenate([points for points, _ in whole]).astype(np.float32))
    first = np.cumsum([0] + [len(points) for points, _ in whole])
    faces = np.concatenate([corners + at for (_, corners), at in zip(whole, first)])
    return _with_looks(parts, vertices, torch.from_numpy(faces))


class _Unreadable(Exception):
    """A picture that turns out to be none when it is decoded."""

    def __init__(self, picture: Picture, why: Exception) -> None:
        self.picture, self.why = picture, why


def _pixels(part: Part) -> np.ndarray | None:
    if part.picture is None:
        return None
    try:
        return part.picture.pixels()
    except Exception as error:  # of many kinds: a picture has what its file says
        raise _Unreadable(part.picture, error) from error


def _with_looks(parts: list[Part], vertices: torch.Tensor, faces: torch.Tensor) -> Mesh:
    if all(part.picture is None or part.uv is None for part in parts):
        colours = np.concatenate([_vertex_colours(part) for part in parts])
        return Mesh(vertices, faces, colours=torch.from_numpy(colours.astype(np.float32)))
    try:
        beyond = any(_is_beyond(part) for part in parts)
        made = None if beyond else _side_by_side(parts)
        if made is None and len(faces) > MOST_FACES:
            log.warn(
                f"a mesh of {len(faces)} triangles with textures that repeat, or lie under other "
                "colours, has colours at its vertices here: save it with one texture to keep detail"
            )
            colours = np.concatenate([_sampled_at_vertices(part) for part in parts])
            return Mesh(vertices, faces, colours=torch.from_numpy(colours.astype(np.float32)))
        if made is None:
            return _painted(parts, vertices, faces)
        uv, texture = made
        return Mesh(vertices, faces, torch.from_numpy(uv), torch.from_numpy(texture))
    except _Unreadable as caught:
        why = " ".join(str(caught.why).split())[:200]
        log.warn(f"a picture of the mesh cannot be read ({why}): its colours are grey")
        lost, grey = caught.picture, {"picture": None, "uv": None, "factor": np.full(3, GREY)}
        grey |= {"linear": True}
        known = [replace(part, **grey) if part.picture is lost else part for part in parts]
        return _with_looks(known, vertices, faces)


def _placed(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Its vertices in the file's space, and its triangles, turned over where the matrix mirrors."""
    points, faces = np.asarray(part.vertices, np.float64), np.asarray(part.faces, np.int64)
    if part.matrix is None:
        return points, faces
    turn = part.matrix[:3, :3]
    points = points @ turn.T + part.matrix[:3, 3]
    return points, faces[:, ::-1] if np.linalg.det(turn) < 0 else faces


def _vertex_colours(part: Part) -> np.ndarray:
    color = np.broadcast_to(np.asarray(part.factor, np.float64), (len(part.vertices), 3))
    if part.rgb is not None:
        color = color * np.asarray(part.rgb, np.float64)
    color = np.where(np.isfinite(color), color, 0.5)
    return shown_from_linear(color) if part.linear else color.clip(0, 1)


def _sampled_at_vertices(part: Part) -> np.ndarray:
    used, first = np.unique(part.faces, return_index=True)
    face, corner = np.divmod(first, 3)
    found = np.full((len(part.vertices), 3), 0.5)
    found[used] = part.colors(face, np.eye(3)[corner], _pixels(part))
    return np.where(np.isfinite(found), found, 0.5)


def _is_beyond(part: Part) -> bool:
    """Whether its picture repeats, or is not all that tells its colour."""
    if part.picture is None or part.uv is None:
        return part.rgb is not None
    used = np.asarray(part.uv, np.float64)[np.unique(part.faces)]
    inside = np.isfinite(used).all() and used.min() >= -1e-4 and used.max() <= 1 + 1e-4
    return part.rgb is not None or not inside


def _tile(part: Part) -> np.ndarray:
    """The colours of a part without vertex colours, (H, W, 3) float32 as they are shown."""
    factor = np.asarray(part.factor, np.float64)
    pixels = _pixels(part) if part.uv is not None else None
    if pixels is None:
        color = shown_from_linear(factor) if part.linear else factor.clip(0, 1)
        return np.broadcast_to(color, (PLAIN, PLAIN, 3)).astype(np.float32)
    if (factor == 1).all():
        return pixels.astype(np.float32) / 255
    levels = np.arange(256)[:, None] / 255  # a byte has few values
    light = linear_from_shown(levels) if part.linear else levels
    table = light * factor
    table = shown_from_linear(table) if part.linear else table.clip(0, 1)
    return np.stack([table[pixels[..., i], i] for i in range(3)], axis=-1).astype(np.float32)


def _side_by_side(parts: list[Part]) -> tuple[np.ndarray, np.ndarray] | None:
    """``uv`` (V, 2), v upward, and one texture of all; None where that would be too large."""
    keys, owners, sizes = [], {}, {}
    for part in parts:
        has = part.picture is not None and part.uv is not None
        key = (id(part.picture) if has else 0, part.linear, *map(float, part.factor))
        keys.append(key)
        owners.setdefault(key, part)
        sizes[key] = part.picture.size[::-1] if has and part.picture else (PLAIN, PLAIN)
    edge = EDGE if len(sizes) > 1 else 0
    places = _shelves([*sizes.values()], edge)
    if places is None:
        return None
    (height, width), at = places
    texture = np.full((height, width, 3), 0.5, np.float32)
    corner = {}
    for (key, part), (row, column) in zip(owners.items(), at):
        padded = np.pad(_tile(part), ((edge, edge), (edge, edge), (0, 0)), mode="edge")
        texture[row : row + len(padded), column : column + padded.shape[1]] = padded
        corner[key] = row + edge, column + edge
    uvs = []
    for part, key in zip(parts, keys):
        rows, columns = sizes[key]
        own = np.full((len(part.vertices), 2), 0.5)
        if part.picture is not None and part.uv is not None:
            own = np.nan_to_num(np.asarray(part.uv, np.float64)).clip(0, 1)
        row, column = corner[key]
        u = (column + own[:, 0] * columns) / width
        v = 1 - (row + own[:, 1] * rows) / height
        uvs.append(np.stack([u, v], axis=1))
    return np.concatenate(uvs).astype(np.float32), texture


def _shelves(
    sizes: list[tuple[int, int]], edge: int
) -> tuple[tuple[int, int], list[tuple[int, int]]] | None:
    """Rows of tiles, the tallest first: the size of the whole, and where each begins."""
    padded = [(height + 2 * edge, width + 2 * edge) for height, width in sizes]
    area = sum(height * width for height, width in padded)
    side = max(max(width for _, width in padded), math.isqrt(area) + 1)
    order = sorted(range(len(padded)), key=lambda i: padded[i], reverse=True)
    at = [(0, 0)] * len(padded)
    top = left = tall = across = 0
    for i in order:
        height, width = padded[i]
        if left and left + width > side:
            top, left, tall = top + tall, 0, 0
        at[i] = top, left
        left, tall, across = left + width, max(tall, height), max(across, left + width)
    whole = top + tall, across
    return None if max(whole) > LARGEST else (whole, at)


def _painted(parts: list[Part], vertices: torch.Tensor, faces: torch.Tensor) -> Mesh:
    """The surface laid out anew, each texel with the colour of its point."""
    bad = ~torch.isfinite(vertices).all(1)
    flat = torch.where(bad[:, None], torch.zeros_like(vertices), vertices)
    origin, corners, uv = unwrapped(flat, faces, SIDE)
    face, weights = texels_of(uv, corners, SIDE, SIDE)
    known = face >= 0
    first = np.cumsum([0] + [len(part.faces) for part in parts])
    owner = np.searchsorted(first, face, side="right") - 1
    image = np.full((SIDE, SIDE, 3), 0.5, np.float32)
    for index, part in enumerate(parts):
        mine = known & (owner == index)
        if not mine.any():
            continue
        share = weights[mine]
        if part.matrix is not None and np.linalg.det(part.matrix[:3, :3]) < 0:
            share = share[:, ::-1]  # as its triangles are
        found = part.colors(face[mine] - first[index], share, _pixels(part))
        image[mine] = np.where(np.isfinite(found), found, 0.5)
    return Mesh(vertices[origin], corners, uv, torch.from_numpy(spread(image, known)))
