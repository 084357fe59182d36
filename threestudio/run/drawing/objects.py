"""The object of a run, made small enough for a browser: Gaussians, or triangles with colours at
their corners. ``viewer.js`` draws what :func:`packed` gives.

z is up and the front on +x, as in the run.
"""

import base64
import io
import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_FILE = 1 << 29  # bytes of an object that is read
MAX_HEADER = 1 << 16
MAX_SIDE = 8192  # of a texture
SH_C0 = 0.28209479177387814  # of the harmonic of degree 0
SPLAT_BYTES = 17
LEAST_OPACITY = 1 / 255
_AXES = {s + "xyz"[i]: (1 if s == "+" else -1) * np.eye(3)[i] for i in range(3) for s in "+-"}
_TYPES = {"float": "<f4", "double": "<f8", "uchar": "u1", "char": "i1", "int": "<i4"}
_TYPES |= {"uint": "<u4", "short": "<i2", "ushort": "<u2", "float32": "<f4", "float64": "<f8"}
_TYPES |= {"uint8": "u1", "int8": "i1", "int32": "<i4", "uint32": "<u4"}


@dataclass
class Splats:
    """N Gaussians: centres, logarithms of the standard deviations, quaternions wxyz, opacities and
    colours 0..1."""

    means: np.ndarray
    scales: np.ndarray
    quats: np.ndarray
    opacities: np.ndarray
    rgb: np.ndarray
    turning_colors: bool = False  # harmonics of a higher degree, which are left out here

    @property
    def points(self) -> np.ndarray:
        return self.means

    @property
    def reach(self) -> np.ndarray:
        """How far each Gaussian is seen from its centre: two standard deviations (N, 1)."""
        return 2 * np.exp(self.scales.max(axis=1, keepdims=True))

    @property
    def what(self) -> str:
        return f"{len(self.means):,} Gaussians"


@dataclass
class Triangles:
    """Corners (V, 3) with colours 0..1 as they are shown, and triangles (F, 3); with a ``texture``
    (H, W, 3), 0..255, what is between the corners, which lie at ``uv`` (V, 2) in it: (0, 0) is its
    upper left."""

    points: np.ndarray
    rgb: np.ndarray
    faces: np.ndarray
    reach: float = 0.0  # from a corner
    texture: np.ndarray | None = None
    uv: np.ndarray | None = None

    @property
    def what(self) -> str:
        return f"{len(self.faces):,} triangles"


@dataclass
class Camera:
    """From where an object is first seen: as the views of its run were drawn."""

    distance: float = 0.0
    fovy: float = 40.0  # degrees
    elevation: float = 15.0

    def about(self, found: Splats | Triangles) -> dict[str, Any]:
        """For the viewer; without a distance, or with one inside of the object, what shows all of
        it. A few stray Gaussians do not count."""
        fovy = math.radians(self.fovy if 5 <= self.fovy <= 120 else 40.0)
        middle, distance = np.zeros(3), self.distance
        reach = _reach(found, middle)
        if not (math.isfinite(distance) and reach * 1.05 < distance < 20 * reach):
            most = 99.0 if isinstance(found, Splats) else 100.0
            middle = np.percentile(found.points, [100 - most, most], axis=0).mean(axis=0)
            distance = 1.05 * _reach(found, middle) / math.sin(fovy / 2)
        elevation = math.radians(max(-80.0, min(80.0, self.elevation)))
        named = {"distance": distance, "fovy": fovy, "elevation": elevation}
        return {**{k: round(v, 6) for k, v in named.items()}, "middle": _rounded(middle)}


def _reach(found: Splats | Triangles, middle: np.ndarray) -> float:
    """The radius of a sphere around ``middle`` with all corners in it, or 99 % of the Gaussians."""
    away = np.linalg.norm(found.points - middle, axis=1, keepdims=True) + found.reach
    return max(float(np.percentile(away, 99) if isinstance(found, Splats) else away.max()), 1e-6)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.7g}") for value in values]


# --- reading --------------------------------------------------------------------------------------


def read_object(path: Path) -> Splats | Triangles:
    """The object of an exported file. Raises ``ValueError``, one line, for one that holds none."""
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path.name} is too large to be shown")
    if path.suffix == ".ply" and (splats := read_splats(path)) is not None:
        return splats
    return read_mesh(path)


def read_splats(path: Path) -> Splats | None:
    """The Gaussians of a ply in the layout of 3DGS; None if it is another ply."""
    with open(path, "rb") as file:
        head, end, _ = file.read(MAX_HEADER).partition(b"end_header\n")
    lines = [line.split() for line in head.decode("latin-1").splitlines()]
    if not end or ["format", "binary_little_endian", "1.0"] not in lines:
        return None
    elements = [line for line in lines if line[:1] == ["element"] and len(line) == 3]
    properties = [line for line in lines if line[:1] == ["property"] and len(line) == 3]
    names = [line[-1] for line in properties]
    if "f_dc_0" not in names or len(elements) != 1 or elements[0][1:2] != ["vertex"]:
        return None
    count = int(elements[0][2])
    try:
        row = np.dtype([(name, _TYPES[kind]) for _, kind, name in properties])
    except (KeyError, ValueError):
        raise ValueError(f"{path.name} has properties of unknown types") from None
    size = path.stat().st_size - len(head) - len(end)
    if count < 1 or count * row.itemsize > size:
        raise ValueError(f"{path.name} is shorter than its header says")
    rows = np.fromfile(path, row, count, offset=len(head) + len(end))

    def columns(*wanted: str) -> np.ndarray:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"{path.name} has no property {missing[0]}")
        return np.stack([rows[name] for name in wanted], axis=1).astype(np.float64)

    splats = splats_of(
        columns("x", "y", "z"),
        columns(*(f"scale_{i}" for i in range(3))),
        columns(*(f"rot_{i}" for i in range(4))),
        columns("opacity")[:, 0],
        columns(*(f"f_dc_{i}" for i in range(3))),
    )
    splats.turning_colors = any(name.startswith("f_rest_") for name in names)
    axes = re.search(rb"\ncomment front ([+-][xyz]) up ([+-][xyz])\s", head)
    if axes:
        _turn(splats, *(_AXES[sign.decode()] for sign in axes.groups()))
    return splats


def splats_of(means, scales, quats, opacities, dc) -> Splats:
    """Gaussians of what is optimised: logarithms of the standard deviations, logits of the
    opacities, harmonics of degree 0. Rows that are not finite or not visible are left out."""
    parts = [np.asarray(p, np.float64) for p in (means, scales, quats, opacities[:, None], dc)]
    good = np.isfinite(np.concatenate(parts, axis=1)).all(axis=1)
    means, scales, quats, logits, dc = (part[good] for part in parts)
    opacities = 1 / (1 + np.exp(-logits[:, 0].clip(-50, 50)))
    seen = (opacities >= LEAST_OPACITY) & (np.linalg.norm(quats, axis=1) > 0)
    if not seen.any():
        raise ValueError("no Gaussian of it can be seen")
    rgb = (0.5 + SH_C0 * dc).clip(0, 1)
    return Splats(*(part[seen] for part in (means, scales, quats, opacities, rgb)))


def _turn(splats: Splats, front: np.ndarray, up: np.ndarray) -> None:
    """From the file's axes, of which these hold the front and up, to the run's."""
    from scipy.spatial.transform import Rotation

    rotation = np.stack([front, np.cross(up, front), up])
    splats.means = splats.means @ rotation.T
    turned = Rotation.from_matrix(rotation) * Rotation.from_quat(splats.quats[:, [1, 2, 3, 0]])
    splats.quats = turned.as_quat()[:, [3, 0, 1, 2]]


def read_mesh(path: Path) -> Triangles:
    """The triangles of a glb as exporters here write it, or of an obj or ply."""
    if path.suffix == ".glb":
        mesh = _read_glb(path)
    else:
        mesh = _read_with_trimesh(path)
    inside = mesh.faces.size and mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.points)
    if not inside or len(mesh.rgb) != len(mesh.points) or not np.isfinite(mesh.points).all():
        raise ValueError(f"{path.name} holds no triangles that can be drawn")
    return mesh


def _read_with_trimesh(path: Path) -> Triangles:
    import trimesh

    class Beside(trimesh.resolvers.Resolver):
        """The materials and textures of an obj: plain files beside it, and no others."""

        def __init__(self) -> None:
            pass

        def get(self, name: str) -> bytes:
            from threestudio.run.snapshot import PlainFiles  # only here, for it imports torch

            file = path.parent / name
            if name not in PlainFiles(path.parent) or file.stat().st_size > MAX_FILE:
                raise ValueError(f"{name} is no file beside it")
            return file.read_bytes()

        def keys(self):
            return []

        def namespaced(self, namespace):
            return self

        def write(self, name, data):
            raise ValueError("nothing is written")

    try:
        with open(path, "rb") as file:
            kind = path.suffix[1:]
            found = trimesh.load(file, kind, Beside(), force="mesh", process=False)
        points, faces = np.asarray(found.vertices, np.float64), np.asarray(found.faces)
    except Exception as error:  # of many kinds: it reads what others have written
        text = " ".join(str(error).split())[:120]
        raise ValueError(f"{path.name} cannot be read: {text}") from None
    try:
        rgb = np.asarray(found.visual.to_color().vertex_colors)[:, :3] / 255
    except Exception:  # a texture that is not there
        rgb = np.full(points.shape, 0.7)
    return Triangles(points, rgb, faces)


def _read_glb(path: Path) -> Triangles:
    """One mesh of one primitive; colours at the corners are light there (linear), or those of a
    texture, as they are shown."""
    data = path.read_bytes()
    try:
        length = int.from_bytes(data[12:16], "little")
        tree, blob = json.loads(data[20 : 20 + length]), data[28 + length :]
        primitive = tree["meshes"][0]["primitives"][0]

        def values(index: int) -> np.ndarray:
            accessor = tree["accessors"][index]
            view = tree["bufferViews"][accessor["bufferView"]]
            kind = {5121: "u1", 5123: "<u2", 5125: "<u4", 5126: "<f4"}[accessor["componentType"]]
            width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}[accessor["type"]]
            start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
            found = np.frombuffer(blob, kind, accessor["count"] * width, start)
            found = found.reshape(-1, width)
            return found / np.iinfo(found.dtype).max if accessor.get("normalized") else found

        points = values(primitive["attributes"]["POSITION"]).astype(np.float64)
        faces = values(primitive["indices"]).astype(np.int64).reshape(-1, 3)
        rgb, pixels, uv = np.full(points.shape, 0.7), None, None
        if "COLOR_0" in primitive["attributes"]:
            light = values(primitive["attributes"]["COLOR_0"])[:, :3].astype(np.float64)
            rgb = _shown(light.clip(0, 1))
        elif "TEXCOORD_0" in primitive["attributes"]:
            look = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
            texture = tree["textures"][look["baseColorTexture"]["index"]]
            view = tree["bufferViews"][tree["images"][texture["source"]]["bufferView"]]
            start = view.get("byteOffset", 0)
            picture = blob[start : start + view["byteLength"]]
            pixels = _pixels(picture)
            uv = np.nan_to_num(values(primitive["attributes"]["TEXCOORD_0"]).astype(np.float64))
            rgb = _at(pixels, uv)
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        OSError,  # of a picture
        SyntaxError,
    ):
        raise ValueError(f"{path.name} is not a glb as runs export it") from None
    points = points[:, [2, 0, 1]]  # of y up and the front on +z
    return Triangles(points, rgb, faces, texture=pixels, uv=uv)


def _pixels(picture: bytes) -> np.ndarray:
    """Those of a PNG."""
    from PIL import Image

    with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
        if max(image.size) > MAX_SIDE:
            raise ValueError("its texture is too large")
        return np.asarray(image.convert("RGB"))


def _at(pixels: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """The colours 0..1 of a picture at places in it, of which (0, 0) is the upper left: between the
    centres of pixels linearly, beyond its edge as at it."""
    most = np.array([pixels.shape[1], pixels.shape[0]]) - 1
    place = (uv * (most + 1) - 0.5).clip(0, most)
    first = np.floor(place).astype(np.int64)
    second = np.minimum(first + 1, most)
    (x, y), (left, top), (right, below) = (place - first).T[..., None], first.T, second.T
    upper = pixels[top, left] * (1 - x) + pixels[top, right] * x
    lower = pixels[below, left] * (1 - x) + pixels[below, right] * x
    return (upper * (1 - y) + lower * y) / 255


def _shown(light: np.ndarray) -> np.ndarray:
    """sRGB's curve (IEC 61966-2-1)."""
    curve = 1.055 * light.clip(0.0031308, None) ** (1 / 2.4) - 0.055
    return np.where(light <= 0.0031308, 12.92 * light, curve)


# --- making it small ------------------------------------------------------------------------------


def fewer(found: Splats | Triangles, most: int) -> Splats | Triangles:
    """What is seen best of an object: at most ``most`` Gaussians, those with the largest product
    of opacity and area, or a mesh of about as many triangles at most, whose corners in one cell of
    a grid are one. One with a texture is cut into as many smaller ones as it has texels for, with
    the texture's colours at their corners, for ``viewer.js`` draws no other."""
    if isinstance(found, Splats):
        if len(found.means) <= most:
            return found
        weight = found.opacities * np.exp(np.sort(found.scales, axis=1)[:, 1:].sum(axis=1))
        kept = np.sort(np.argsort(-weight, kind="stable")[:most])
        parts = (found.means, found.scales, found.quats, found.opacities, found.rgb)
        return Splats(*(part[kept] for part in parts), found.turning_colors)
    cells = 256
    while len(found.faces) > most and cells >= 8:
        merged = _merged(found, cells)
        if len(merged.faces) <= most or cells < 16:
            return merged
        cells = int(cells * 0.8)
    return _cut(found, most)


def _cut(mesh: Triangles, most: int) -> Triangles:
    """Each triangle in n^2 alike, at most ``most`` in all, and no more than a side has texels."""
    if mesh.texture is None or mesh.uv is None or not len(mesh.faces):
        return mesh
    flat = mesh.uv[mesh.faces] * mesh.texture.shape[1::-1]
    sides = np.linalg.norm(flat - np.roll(flat, 1, axis=1), axis=2)
    n = min(math.isqrt(most // len(mesh.faces)), math.ceil(np.quantile(sides, 0.9)))
    if n < 2:
        return mesh
    index = {(i, j): 0 for i in range(n + 1) for j in range(n + 1 - i)}
    index = {place: number for number, place in enumerate(index)}
    share = np.array([(n - i - j, i, j) for i, j in index]) / n
    pieces = [(index[i, j], index[i + 1, j], index[i, j + 1]) for i, j in index if i + j < n]
    pieces += [
        (index[i + 1, j], index[i + 1, j + 1], index[i, j + 1]) for i, j in index if i + j < n - 1
    ]
    points, uv = ((share @ values[mesh.faces]).reshape(-1, d) for values, d in
                  ((mesh.points, 3), (mesh.uv, 2)))  # fmt: skip
    first = len(share) * np.arange(len(mesh.faces))
    faces = (first[:, None, None] + np.array(pieces)).reshape(-1, 3)
    return Triangles(points, _at(mesh.texture, uv), faces)


def _merged(mesh: Triangles, cells: int) -> Triangles:
    low = mesh.points.min(axis=0)
    side = max(float((mesh.points.max(axis=0) - low).max()), 1e-9) / cells
    places = np.floor((mesh.points - low) / side).astype(np.int64)
    keys = places @ np.array([1, cells + 2, (cells + 2) ** 2])
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    group = group.reshape(-1)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = [np.bincount(group, values[:, k], len(counts)) for k in range(3)]
        return np.stack(sums, axis=1) / counts[:, None]

    faces = group[mesh.faces]
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (a != c)]
    return Triangles(mean(mesh.points), mean(mesh.rgb), faces)


def _places(points: np.ndarray) -> tuple[bytes, dict[str, Any]]:
    low, high = points.min(axis=0), points.max(axis=0)
    share = (points - low) / np.maximum(high - low, 1e-12)
    return np.rint(65535 * share).astype("<u2").tobytes(), {
        "low": _rounded(low),
        "high": _rounded(high),
    }


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(255 * values.clip(0, 1)).astype(np.uint8)


def packed(found: Splats | Triangles, camera: Camera) -> tuple[dict[str, Any], str]:
    """What ``viewer.js`` draws: what is said of the object, and its bytes, deflated (zlib) and in
    base64.

    Both kinds have ``kind``, ``count`` (of Gaussians or corners), ``low`` and ``high`` (of the box
    in which the positions are, 3 numbers each), and from where it is first seen: ``middle``,
    ``distance``, ``elevation`` and ``fovy`` (radians; of the shorter side). The bytes are tables,
    little endian, one after the other:

        splats   centres (count, 3) u2, from ``low`` to ``high``;
                 logarithms of the standard deviations (count, 3) u1, from ``sizes[0]`` to
                 ``sizes[1]``;
                 quaternions wxyz, times 127 (count, 4) i1;
                 colours as they are shown and opacities (count, 4) u1, from 0 to 1
        mesh     corners of the triangles (faces, 3) i4, each less the one before;
                 positions (count, 3) u2, colours as they are shown (count, 3) u1
    """
    places, about = _places(found.points)
    about |= {"count": len(found.points), **camera.about(found)}
    if isinstance(found, Splats):
        most = float(found.scales.max())
        least = max(float(found.scales.min()), most - 8.0)  # e^-8: thinner than can be seen
        sizes = _bytes((found.scales - least) / max(most - least, 1e-9))
        quats = found.quats / np.linalg.norm(found.quats, axis=1, keepdims=True)
        turns = np.rint(127 * quats).astype(np.int8)
        colors = _bytes(np.concatenate([found.rgb, found.opacities[:, None]], axis=1))
        data = places + sizes.tobytes() + turns.tobytes() + colors.tobytes()
        about |= {"kind": "splats", "sizes": [round(least, 5), round(most, 5)]}
    else:
        corners = np.diff(found.faces.reshape(-1), prepend=0).astype("<i4")
        data = corners.tobytes() + places + _bytes(found.rgb).tobytes()
        about |= {"kind": "mesh", "faces": len(found.faces)}
    return about, base64.b64encode(zlib.compress(data, 6)).decode()


def left_out(drawn: Splats | Triangles, found: Splats | Triangles) -> list[str]:
    """Sentences about what a browser does not show of an object, of which it has ``drawn``."""
    said = []
    cut = isinstance(found, Triangles) and len(drawn.points) >= len(found.points)
    if drawn is not found and not cut:
        said.append(f"Drawn here with {drawn.what} of {found.what}.")
    if isinstance(found, Splats) and found.turning_colors:
        said.append("Drawn here with each Gaussian's mean colour, the same from all sides.")
    return said
