"""Compressed ply files of Gaussians, as SuperSplat and PlayCanvas' splat-transform have them.

Gaussians stand in chunks of CHUNK, near to each other. A chunk has the least and the largest
position, logarithm of a standard deviation and colour (0..1, beyond it where the harmonic is) along
each axis; a Gaussian has four words of 32 bits, which tell where it is between them:

    packed_position, packed_scale   11, 10 and 11 bits for x, y and z, x the highest
    packed_rotation                 2 bits for the largest component of the quaternion (w, x, y, z),
                                    which is left out and positive, and 10 for each other one in
                                    their order, from -1/sqrt(2) to 1/sqrt(2)
    packed_color                    8 bits each for red, green, blue and the opacity (0..1)

Higher harmonics are an element of bytes, channel after channel, from -4 to 4.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt
from lods.gaussians.harmonics import SH_C0

CHUNK = 256
LARGEST_SCALE = 20.0  # of a logarithm, either sign
AXES, CHANNELS = ("x", "y", "z"), ("r", "g", "b")
CHUNK_COLUMNS = [
    f"{end}_{prefix}{name}"
    for prefix, names in (("", AXES), ("scale_", AXES), ("", CHANNELS))
    for end in ("min", "max")
    for name in names
]
WORDS = ("packed_position", "packed_rotation", "packed_scale", "packed_color")


def logit_of_byte(values: UInt[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Logits of opacities 0..255; those of 0 and 255, which are not finite, as of a quarter more
    and less."""
    share = np.clip(np.asarray(values, np.float64), 0.25, 254.75) / 255
    return np.log(share) - np.log1p(-share)


def byte_of_logit(logits: Float[np.ndarray, " N"]) -> UInt[np.ndarray, " N"]:
    """The nearest opacities 0..255."""
    share = 1 / (1 + np.exp(-np.asarray(logits, np.float64).clip(-50, 50)))
    return np.rint(255 * share).astype(np.uint8)


def _unit(words: UInt[np.ndarray, " N"], shift: int, bits: int) -> Float[np.ndarray, " N"]:
    most = (1 << bits) - 1
    return ((words >> np.uint32(shift)) & np.uint32(most)) / most


def unpacked(data: Any) -> dict[str, Float[np.ndarray, " N"]]:
    """The columns of a 3DGS ply of plyfile's ``data``. Raises ValueError or KeyError for a file
    whose elements do not fit together."""
    vertex, chunk = data["vertex"], data["chunk"]
    words = [np.asarray(vertex[name]) for name in WORDS]
    if any(word.dtype.kind not in "iu" for word in words):
        raise ValueError("its packed values are no whole numbers")
    position, rotation, scale, color = (word.astype(np.uint32) for word in words)
    n = len(position)
    if chunk.count != -(-n // CHUNK):
        raise ValueError(f"it has {chunk.count} chunks for {n} Gaussians")
    named = {p.name for p in chunk.properties}
    which = np.arange(n) // CHUNK

    def between(name: str, share: np.ndarray) -> np.ndarray:
        low, high = (np.asarray(chunk[f"{end}_{name}"], np.float64) for end in ("min", "max"))
        return low[which] * (1 - share) + high[which] * share

    columns: dict[str, np.ndarray] = {}
    places = ((21, 11), (11, 10), (0, 11))
    for i, (axis, place) in enumerate(zip(AXES, places)):
        columns[axis] = between(axis, _unit(position, *place))
        columns[f"scale_{i}"] = between(f"scale_{axis}", _unit(scale, *place))
    for i, channel in enumerate(CHANNELS):
        share = _unit(color, 24 - 8 * i, 8)
        shown = between(channel, share) if f"min_{channel}" in named else share
        columns[f"f_dc_{i}"] = (shown - 0.5) / SH_C0
    columns["opacity"] = logit_of_byte(color & np.uint32(255))
    others = [(_unit(rotation, shift, 10) - 0.5) * 2**0.5 for shift in (20, 10, 0)]
    others = np.stack(others, axis=1)
    largest = np.sqrt((1 - (others**2).sum(1)).clip(0))
    left_out = (rotation >> np.uint32(30)).astype(np.int64)
    quats = np.zeros((n, 4))
    at = np.arange(4)
    for index in range(4):
        rows = left_out == index
        quats[np.ix_(rows, at[at != index])] = others[rows]
        quats[rows, index] = largest[rows]
    columns |= {f"rot_{i}": quats[:, i] for i in range(4)}
    if "sh" in data:
        sh = data["sh"]
        if sh.count != n:
            raise ValueError(f"it has {sh.count} rows of harmonics for {n} Gaussians")
        for prop in sh.properties:
            byte = np.asarray(sh[prop.name])
            if byte.dtype != np.uint8:
                raise ValueError("its harmonics are no bytes")
            share = np.where(byte == 0, 0.0, np.where(byte == 255, 1.0, (byte + 0.5) / 256))
            columns[prop.name] = (share - 0.5) * 8
    return {name: values.astype(np.float32) for name, values in columns.items()}


def packed(rows: Float[np.ndarray, "N K"]) -> dict[str, np.ndarray]:
    """The elements of a compressed ply, of rows as :func:`lods.gaussians.ply.gaussian_rows` gives
    them. Gaussians come in another order: those of a chunk are neighbours."""
    n_rest = rows.shape[1] - 14
    rows = rows[morton_order(rows[:, :3])].astype(np.float64)
    n = len(rows)
    ends = np.cumsum([3, 3, n_rest, 1, 3, 4])[:-1]
    means, dc, rest, opacity, scales, quats = np.split(rows, ends, axis=1)
    starts = np.arange(0, n, CHUNK)
    which = np.arange(n) // CHUNK
    shown = 0.5 + SH_C0 * dc
    chunk = np.empty(len(starts), [(name, "<f4") for name in CHUNK_COLUMNS])
    units = {}
    limited = scales.clip(-LARGEST_SCALE, LARGEST_SCALE)
    for prefix, names, values in (
        ("", AXES, means),
        ("scale_", AXES, limited),
        ("", CHANNELS, shown),
    ):
        for i, name in enumerate(names):
            low = np.minimum.reduceat(values[:, i], starts).astype(np.float32)
            high = np.maximum.reduceat(values[:, i], starts).astype(np.float32)
            chunk[f"min_{prefix}{name}"], chunk[f"max_{prefix}{name}"] = low, high
            width = (high.astype(np.float64) - low)[which]
            share = (values[:, i] - low[which]) / np.where(width > 0, width, 1)
            units[prefix + name] = share.clip(0, 1)

    def word(*parts: tuple[np.ndarray, int]) -> np.ndarray:
        total = np.zeros(n, np.uint32)
        for share, bits in parts:
            level = np.rint(share * ((1 << bits) - 1)).astype(np.uint32)
            total = (total << np.uint32(bits)) | level
        return total

    bits = (11, 10, 11)
    vertex = np.empty(n, [(name, "<u4") for name in WORDS])
    vertex["packed_position"] = word(*((units[a], b) for a, b in zip(AXES, bits)))
    vertex["packed_scale"] = word(*((units[f"scale_{a}"], b) for a, b in zip(AXES, bits)))
    alpha = byte_of_logit(opacity[:, 0]) / 255
    vertex["packed_color"] = word(*((units[c], 8) for c in CHANNELS), (alpha, 8))
    quats = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    largest = np.abs(quats).argmax(axis=1)
    quats = quats * np.where(quats[np.arange(n), largest] < 0, -1, 1)[:, None]
    others = quats[np.arange(4) != largest[:, None]].reshape(n, 3) / 2**0.5 + 0.5
    turned = word(*((others[:, i].clip(0, 1), 10) for i in range(3)))
    vertex["packed_rotation"] = turned | (largest.astype(np.uint32) << np.uint32(30))
    elements = {"chunk": chunk, "vertex": vertex}
    if n_rest:
        sh = np.empty(n, [(f"f_rest_{i}", "u1") for i in range(n_rest)])
        levels = np.floor((rest / 8 + 0.5) * 256).clip(0, 255).astype(np.uint8)
        for i in range(n_rest):
            sh[f"f_rest_{i}"] = levels[:, i]
        elements["sh"] = sh
    return elements


def morton_order(points: Float[np.ndarray, "N 3"]) -> np.ndarray:
    """An order in which neighbours in space are near to each other: bits of x, y and z in turn."""
    points = points.astype(np.float64)  # the sides of a box may be larger than float32 holds
    low, high = points.min(axis=0), points.max(axis=0)
    cells = (points - low) / np.maximum(high - low, 1e-30) * 1023
    cells = cells.astype(np.uint64)
    key = np.zeros(len(points), np.uint64)
    for bit in range(10):
        for axis in range(3):
            part = (cells[:, axis] >> np.uint64(bit)) & np.uint64(1)
            key |= part << np.uint64(3 * bit + axis)
    return np.argsort(key, kind="stable")


def write_compressed_ply(path: str | Path, gaussians: dict[str, Any], axes: str = "z-up") -> int:
    """Write Gaussians, by the names of :class:`lods.gaussians.parameters.GaussianParameters`, given
    in threestudio's axes, as a compressed ply in ``axes``, one of
    :data:`lods.gaussians.axes.PLY_AXES`. Returns their number."""
    from lods.gaussians.ply import gaussian_rows, write_elements

    rows = gaussian_rows(gaussians, axes)
    write_elements(path, packed(rows), axes)
    return len(rows)
