"""Gaussians and coloured points to and from ply files, through ``plyfile``."""

import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lods import log
from lods.files import whole_file
from lods.gaussians.axes import PLY_AXES, axes_rotation, rotate_gaussians
from lods.gaussians.compressed_ply import unpacked
from lods.gaussians.mesh_parts import unit_colors
from torch import Tensor

MAX_HEADER = 1 << 20  # bytes; that of a 3DGS file has about 1500
MAX_LINES = 10_000  # of a header: plyfile takes seconds for more
MAX_ROWS = 50_000_000  # of an element: some gigabytes of work
FLOAT32_MAX = float(np.finfo(np.float32).max)
TYPE_BYTES = {"char": 1, "uchar": 1, "short": 2, "ushort": 2, "int": 4, "uint": 4}
TYPE_BYTES |= {"float": 4, "double": 8, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2}
TYPE_BYTES |= {"int32": 4, "uint32": 4, "float32": 4, "float64": 8}


def gaussian_properties(n_rest: int) -> list[str]:
    """Property names of the standard 3DGS layout, in order, with ``n_rest`` = 3 * (number of
    higher spherical harmonics) entries ``f_rest_*``."""
    names = ["x", "y", "z", "nx", "ny", "nz"]
    names += [f"f_dc_{i}" for i in range(3)]
    names += [f"f_rest_{i}" for i in range(n_rest)]
    return [*names, "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]


def _write(path: str | Path, columns: dict[str, tuple[str, np.ndarray]], axes: str) -> None:
    """Write one 'vertex' element, replacing the file only when it is complete. Axes that are not
    threestudio's stand in a comment of the header, which :func:`read_ply` knows."""
    n = len(next(iter(columns.values()))[1])
    vertex = np.empty(n, dtype=[(name, kind) for name, (kind, _) in columns.items()])
    for name, (_, values) in columns.items():
        vertex[name] = values
    write_elements(path, {"vertex": vertex}, axes)


def write_elements(path: str | Path, elements: dict[str, np.ndarray], axes: str) -> None:
    """Write tables with named columns as the elements of a binary ply, in their order."""
    from plyfile import PlyData, PlyElement

    described = [PlyElement.describe(table, name) for name, table in elements.items()]
    comments = [] if axes == "z-up" else ["front {} up {}".format(*PLY_AXES[axes])]
    with whole_file(path) as partial:
        PlyData(described, byte_order="<", comments=comments).write(str(partial))


def write_ply(
    path: str | Path,
    means: Float[Tensor, "N 3"],
    scales: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    opacities: Float[Tensor, " N"],
    sh0: Float[Tensor, "N 1 3"],
    shN: Float[Tensor, "N K 3"] | None = None,
    axes: str = "z-up",
) -> int:
    """Write the standard 3DGS ply: log scales, wxyz quaternions, opacity logits, normals of zero,
    ``f_rest`` channel after channel. Rows with a value that is not finite are left out with a
    warning (viewers refuse them). Returns the number of Gaussians written.

    The Gaussians are given in threestudio's axes, and turned to the file's ``axes``, one of
    PLY_AXES.
    """
    gaussians = {"means": means, "scales": scales, "quats": quats, "opacities": opacities}
    gaussians |= {"sh0": sh0} | ({} if shN is None else {"shN": shN})
    values = gaussian_rows(gaussians, axes)
    normals = np.zeros_like(values[:, :3])
    values = np.concatenate([values[:, :3], normals, values[:, 3:]], axis=1)
    names = gaussian_properties(values.shape[1] - 17)
    _write(path, {name: ("<f4", values[:, i]) for i, name in enumerate(names)}, axes)
    return len(values)


def gaussian_rows(gaussians: dict[str, Tensor], axes: str) -> Float[np.ndarray, "N K"]:
    """Gaussians in threestudio's axes as rows in a file's ``axes``, one of PLY_AXES, with the
    properties of :func:`gaussian_properties` in their order, but without normals. Rows with a value
    that is not finite are left out with a warning: viewers refuse them. Raises ``ValueError`` if
    none is left."""
    turned = rotate_gaussians(gaussians, axes_rotation(*PLY_AXES[axes]).T)
    sh0, shN, n = turned["sh0"], turned.get("shN"), len(turned["means"])
    rest = sh0.new_zeros(n, 0) if shN is None else shN.transpose(1, 2).reshape(n, -1)
    parts = [turned["means"], sh0[:, 0], rest, turned["opacities"][:, None]]
    rows = torch.cat([*parts, turned["scales"], turned["quats"]], dim=1)
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.any():
        raise ValueError(f"there is nothing to write: none of {n} Gaussians is finite")
    if not finite.all():
        log.warn(f"{int((~finite).sum())} of {n} Gaussians are not finite and left out")
    return rows[finite].detach().cpu().float().numpy()


def write_points(
    path: str | Path,
    xyz: Float[Tensor, "N 3"],
    rgb: Float[Tensor, "N 3"],
    axes: str = "z-up",
) -> None:
    """Write a coloured point cloud; ``rgb`` is clipped to 0..1 and stored as bytes. The points are
    given in threestudio's axes, and turned to the file's ``axes``, one of PLY_AXES."""
    rotation = axes_rotation(*PLY_AXES[axes]).astype(np.float32)
    position = xyz.detach().cpu().float().numpy() @ rotation
    byte = (rgb.detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()
    columns = {name: ("<f4", position[:, i]) for i, name in enumerate("xyz")}
    columns |= {name: ("u1", byte[:, i]) for i, name in enumerate(("red", "green", "blue"))}
    _write(path, columns, axes)


def _has_lists(path: Path) -> bool:
    """Whether an element of the file has a list property. Raises ValueError if the header is none,
    or promises more rows than the file has bytes for: readers allocate what it promises."""
    with open(path, "rb") as file:
        head = file.read(MAX_HEADER)
    header, end, _ = head.partition(b"\nend_header")
    lines = [line.split() for line in header.decode("latin-1").split("\n")]
    if not end or lines[0] != ["ply"]:
        raise ValueError("it does not begin with a ply header")
    if len(lines) > MAX_LINES:
        raise ValueError(f"its header has {len(lines)} lines, of which {MAX_LINES} are read")
    ascii_ = ["format", "ascii", "1.0"] in lines
    rows: list[list[int]] = []  # count and least bytes of a row, per element
    lists = False
    for words in lines:
        if words[:1] == ["element"]:
            count = int(words[2])
            if not 0 <= count <= MAX_ROWS:
                raise ValueError(
                    f"it promises {count} rows of {words[1]}, of which {MAX_ROWS} are read"
                )
            rows.append([count, 0])
        elif words[:1] == ["property"]:
            lists |= words[1] == "list"
            kind = words[2] if words[1] == "list" else words[1]
            # in text a digit and a space; an empty list is only its length
            rows[-1][1] += 2 if ascii_ else TYPE_BYTES[kind]
    least = sum(count * max(size, 1) for count, size in rows)
    size = path.stat().st_size
    if least > size:
        raise ValueError(f"its header promises at least {least} bytes, and it has {size}")
    return lists


def _parse(path: Path):
    from plyfile import PlyData

    if not _has_lists(path):
        return PlyData.read(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of an empty list
        # not the file itself: for a list said to be long, that much memory would be set aside
        return PlyData.read(io.BytesIO(path.read_bytes()))


def _axes_of(comments: Iterable[str]) -> tuple[str, str] | None:
    """The file's axes that hold the front and up, where a file of :func:`_write` says them."""
    for comment in comments:
        found = re.fullmatch(r"front ([+-][xyz]) up ([+-][xyz])", comment.strip())
        if found:
            return found[1], found[2]
    return None


def read_ply(path: str | Path) -> dict[str, Any]:
    """Read a ply file.

    With the 3DGS properties, or those of a compressed ply: the Gaussians as float32 tensors,
    ``means``, ``scales``, ``quats``, ``opacities``, ``sh0`` and, if the file has ``f_rest_*``,
    ``shN`` (N, K, 3). Otherwise ``xyz``
    (N, 3) and ``rgb`` (N, 3) in 0..1 (mid grey without colours) as float64 arrays, and ``faces``
    (their number) when it is a mesh. ``axes``, where the file names them: those that hold the
    front and up.

    Rows with values that float32 does not hold, or with a quaternion of length 0, are left out
    with a warning, unless triangles refer to them.

    Raises:
        ValueError: not a ply file, shorter than it says, no points, or none that is finite,
            properties that are missing or of a wrong type.
    """
    try:
        data = _parse(Path(path))
        vertex = data["vertex"]
        names = [p.name for p in vertex.properties]
        n = vertex.count
        columns = {name: np.asarray(vertex[name]) for name in names}
        axes = _axes_of(data.comments)
    except Exception as error:
        detail = " ".join(f"{error}".split())[:200] or type(error).__name__
        if isinstance(error, KeyError):
            detail = f"it has no element or type {detail}"
        elif isinstance(error, IndexError):
            detail = "its header is damaged"
        raise ValueError(f"'{path}' is not a readable ply file: {detail}") from error
    if n == 0:
        raise ValueError(f"'{path}' holds no points")
    if "packed_position" in columns:
        try:
            columns = unpacked(data)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"'{path}' is not a readable compressed ply: {error}") from error

    def stack(wanted: list[str], kinds: str = "iuf") -> np.ndarray:
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise ValueError(f"'{path}' lacks the properties {', '.join(missing)}")
        wrong = [name for name in wanted if columns[name].dtype.kind not in kinds]
        if wrong:
            what = "lists" if kinds == "iuf" else "lists or whole numbers"
            raise ValueError(f"'{path}' has {what} as {', '.join(wrong)}")
        return np.stack([columns[name] for name in wanted], axis=1)

    said = {} if axes is None else {"axes": axes}
    if "f_dc_0" not in columns:
        xyz = stack(["x", "y", "z"])
        good, rgb = _fits(xyz), np.full((n, 3), 0.5)
        if {"red", "green", "blue"} <= columns.keys():
            rgb = stack(["red", "green", "blue"])
            good &= _fits(rgb)
            rgb = unit_colors(np.where(_fits(rgb)[:, None], rgb, 0))
        if "face" in data and data["face"].count > 0:
            return {"xyz": xyz.astype(np.float64), "rgb": rgb, "faces": data["face"].count, **said}
        _say(path, good, "are not finite in float32")
        return {"xyz": xyz[good].astype(np.float64), "rgb": rgb[good], **said}

    n_rest = sum(name.startswith("f_rest_") for name in columns)
    if n_rest // 3 + 1 not in (1, 4, 9, 16) or n_rest % 3:
        raise ValueError(
            f"'{path}' has {n_rest} f_rest properties: not those of harmonics of degree 0 to 3"
        )
    layout = gaussian_properties(n_rest)
    # normals carry nothing here, and some writers leave them out
    return checked_gaussians(path, stack(layout[:3] + layout[6:], "f")) | said


def _fits(values: np.ndarray) -> np.ndarray:  # NaN does not
    with np.errstate(invalid="ignore"):
        return np.all(np.abs(values.astype(np.float64)) <= FLOAT32_MAX, axis=1)


def _say(path: str | Path, good: np.ndarray, what: str) -> None:
    """A warning for rows that are not ``good``. Raises ValueError if no row is."""
    n, bad = len(good), int((~good).sum())
    if bad == n:
        raise ValueError(f"'{path}': {n} of {n} points {what}")
    if bad:
        log.warn(f"'{path}': {bad} of {n} points {what}, and are left out")


def checked_gaussians(path: str | Path, values: Float[np.ndarray, "N K"]) -> dict[str, Tensor]:
    """The Gaussians of rows with the properties of :func:`gaussian_properties` in their order, but
    without normals. Rows that cannot be drawn are left out with a warning.

    Raises:
        ValueError: no row can be drawn.
    """
    n, n_rest = len(values), values.shape[1] - 14
    good = _fits(values)
    # rows that do not fit are made harmless, so that each is said once
    table = torch.from_numpy(np.where(good[:, None], values, 1).astype(np.float32))
    means, sh0, rest, opacity, scales, quats = table.split([3, 3, n_rest, 1, 3, 4], dim=1)
    length = quats.norm(dim=1)
    usable = length.isfinite() & scales.exp().isfinite().all(dim=1)
    drawn = good & (length > 0).numpy() & usable.numpy()
    _say(path, good, "are not finite in float32")
    _say(path, (length > 0).numpy(), "have quaternions of length 0")
    _say(path, usable.numpy(), "have quaternions or sizes beyond float32")
    if not drawn.any():
        raise ValueError(f"'{path}': none of {n} Gaussians can be drawn")
    gaussians = {"means": means, "scales": scales, "quats": quats, "opacities": opacity[:, 0]}
    gaussians["sh0"] = sh0[:, None]
    if n_rest:
        gaussians["shN"] = rest.reshape(n, 3, -1).transpose(1, 2)
    rows = torch.from_numpy(drawn)
    return {name: value[rows].contiguous() for name, value in gaussians.items()}
