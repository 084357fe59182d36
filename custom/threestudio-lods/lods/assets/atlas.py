"""From the parts of a mesh file, each with a material of its own, to one mesh with one texture."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lods import log
from lods.assets.baking import spread, texels_of, unwrapped
from lods.assets.mesh import Mesh
from lods.gaussians.gltf import GREY
from lods.gaussians.mesh_parts import Part, Picture, linear_from_shown, shown_from_linear

SIDE = 2048  # texels of a texture that is painted anew, at most
MOST_FACES = 60_000  # that are laid out
BATCH = 1 << 18  # texels that are painted at a time
MOST_LOST = 8  # pictures that cannot be read, after which the others are not tried
LARGEST = 8192  # of one that is put together of others
PLAIN = 8  # texels of the tile of a material without a picture
EDGE = 4  # texels around a tile


def mesh_of(parts: list[Part]) -> Mesh:
    """One mesh of all parts, in the file's space, with what viewers show of them; its vertices have
    64 bits, since some scenes are far from their origin.

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
    vertices = torch.from_numpy(np.concatenate([points for points, _ in whole]))
    first = np.cumsum([0] + [len(points) for points, _ in whole])
    faces = np.concatenate([corners + at for (_, corners), at in zip(whole, first)])
    return _with_looks(parts, vertices, torch.from_numpy(faces))


class _Unreadable(Exception):
    """A picture that turns out to be none when it is decoded."""

    def __init__(self, picture: Picture, why: Exception) -> None:
        self.picture, self.why = picture, why


class _Decoded:
    """The pixels of the parts' pictures, of which one at a time is held: parts with the same
    picture are to follow each other. Raises :class:`_Unreadable`."""

    def __init__(self) -> None:
        self._last: tuple[Picture | None, np.ndarray | None] = (None, None)

    def __call__(self, part: Part) -> np.ndarray | None:
        if part.picture is None or part.uv is None:
            return None
        if self._last[0] is not part.picture:
            try:
                self._last = part.picture, part.picture.pixels()
            except Exception as error:  # of many kinds: a picture has what its file says
                raise _Unreadable(part.picture, error) from error
        return self._last[1]


def _by_picture(parts: list[Part]) -> list[int]:
    """The parts' places in an order in which those with the same picture follow each other."""
    return sorted(range(len(parts)), key=lambda i: id(parts[i].picture))


def _with_looks(parts: list[Part], vertices: torch.Tensor, faces: torch.Tensor) -> Mesh:
    lost: list[Picture] = []
    while any(part.picture is not None and part.uv is not None for part in parts):
        try:
            return _textured(parts, vertices, faces)
        except _Unreadable as caught:
            why = " ".join(str(caught.why).split())[:200]
            log.warn(f"a picture of the mesh cannot be read ({why}): its colours are grey")
            lost.append(caught.picture)
            grey: dict[str, Any] = {"picture": None, "uv": None, "factor": np.full(3, GREY)}
            grey["linear"] = True
            every = len(lost) >= MOST_LOST  # each costs the work of all before it
            parts = [
                replace(part, **grey)
                if part.picture is not None and (every or part.picture is caught.picture)
                else part
                for part in parts
            ]
    colours = np.concatenate([_vertex_colours(part) for part in parts])
    return Mesh(vertices, faces, colours=torch.from_numpy(colours.astype(np.float32)))


def _textured(parts: list[Part], vertices: torch.Tensor, faces: torch.Tensor) -> Mesh:
    made = None if any(_is_beyond(part) for part in parts) else _side_by_side(parts)
    if made is not None:
        uv, texture = made
        return Mesh(vertices, faces, torch.from_numpy(uv), torch.from_numpy(texture))
    if len(faces) <= MOST_FACES:
        return _painted(parts, vertices, faces)
    log.warn(
        f"a mesh of {len(faces)} triangles with textures that repeat, or lie under other colours, "
        "has colours at its vertices here: save it with one texture to keep detail"
    )
    decoded = _Decoded()
    found = {i: _sampled_at_vertices(parts[i], decoded(parts[i])) for i in _by_picture(parts)}
    colours = np.concatenate([found[i] for i in range(len(parts))])
    return Mesh(vertices, faces, colours=torch.from_numpy(colours.astype(np.float32)))


def _placed(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Its vertices in the file's space, and its triangles, turned over where the matrix mirrors."""
    points, faces = np.asarray(part.vertices, np.float64), np.asarray(part.faces, np.int64)
    if part.matrix is None:
        return points, faces
    turn = part.matrix[:3, :3]
    with np.errstate(all="ignore"):  # what is not finite is left out later
        points = points @ turn.T + part.matrix[:3, 3]
    return points, faces[:, ::-1] if _mirrors(part) else faces


def _mirrors(part: Part) -> bool:
    """Whether its matrix turns triangles over."""
    if part.matrix is None:
        return False
    with np.errstate(all="ignore"):
        return bool(np.linalg.det(part.matrix[:3, :3]) < 0)


def _vertex_colours(part: Part) -> np.ndarray:
    color = np.broadcast_to(np.asarray(part.factor, np.float64), (len(part.vertices), 3))
    if part.rgb is not None:
        color = color * np.asarray(part.rgb, np.float64)
    color = np.where(np.isfinite(color), color, 0.5)
    return shown_from_linear(color) if part.linear else color.clip(0, 1)


def _sampled_at_vertices(part: Part, pixels: np.ndarray | None) -> np.ndarray:
    used, first = np.unique(part.faces, return_index=True)
    face, corner = np.divmod(first, 3)
    found = np.full((len(part.vertices), 3), 0.5)
    found[used] = part.colors(face, np.eye(3)[corner], pixels)
    return np.where(np.isfinite(found), found, 0.5)


def _is_beyond(part: Part) -> bool:
    """Whether its picture repeats, or is not all that tells its colour."""
    if part.picture is None or part.uv is None:
        return part.rgb is not None
    used = np.asarray(part.uv, np.float64)[np.unique(part.faces)]
    inside = np.isfinite(used).all() and used.min() >= -1e-4 and used.max() <= 1 + 1e-4
    return part.rgb is not None or not inside


def _tile(part: Part, pixels: np.ndarray | None) -> np.ndarray:
    """The colours of a part without vertex colours, (H, W, 3) float32 as they are shown."""
    factor = np.asarray(part.factor, np.float64)
    if pixels is None:
        color = shown_from_linear(factor) if part.linear else factor.clip(0, 1)
        return np.broadcast_to(color, (PLAIN, PLAIN, 3)).astype(np.float32)
    if (factor == 1).all():
        return np.divide(pixels, np.float32(255), dtype=np.float32)
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
    # the tile of a single picture takes its place
    texture = np.full((height, width, 3) if edge else (0, 0, 3), 0.5, np.float32)
    corner, decoded = {}, _Decoded()
    tiles = [*zip(owners.items(), at)]
    for i in _by_picture([*owners.values()]):
        (key, part), (row, column) = tiles[i]
        tile = _tile(part, decoded(part))
        corner[key] = row, column = row + edge, column + edge
        if edge:
            _put(texture, tile, row, column, edge)
        else:
            texture = tile
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


def _put(texture: np.ndarray, tile: np.ndarray, row: int, column: int, edge: int) -> None:
    """Write a tile whose first texel is at (row, column), and around it, so many texels wide, its
    own border: in place, for both may be large."""
    height, width = tile.shape[:2]
    texture[row : row + height, column : column + width] = tile
    around = texture[row - edge : row + height + edge, column - edge : column + width + edge]
    for side in (around, around.swapaxes(0, 1)):
        side[:edge] = side[edge : edge + 1]
        side[len(side) - edge :] = side[len(side) - edge - 1 : len(side) - edge]


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
    rows, columns = np.nonzero(known)
    owner = np.searchsorted(first, face[known], side="right") - 1
    order = np.argsort(owner, kind="stable")
    begin = np.searchsorted(owner[order], np.arange(len(parts) + 1))
    image, decoded = np.full((SIDE, SIDE, 3), 0.5, np.float32), _Decoded()
    for index in _by_picture(parts):
        mine, part = order[begin[index] : begin[index + 1]], parts[index]
        if not len(mine):
            continue
        pixels = decoded(part)
        for some in np.array_split(mine, -(-len(mine) // BATCH)):
            at = rows[some], columns[some]
            share = weights[at]
            if _mirrors(part):
                share = share[:, ::-1]  # as its triangles are
            found = part.colors(face[at] - first[index], share, pixels)
            image[at] = np.where(np.isfinite(found), found, 0.5)
    return Mesh(vertices[origin], corners, uv, torch.from_numpy(spread(image, known)))
