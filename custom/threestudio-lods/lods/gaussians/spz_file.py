"""Gaussians as an ``.spz`` file, Niantic's: tables of bytes, compressed by gzip.

After a header of 16 bytes - "NGSP", the version, the number of Gaussians (both 32 bits), the degree
of the harmonics, the fractional bits of positions, flags, a byte of nothing - come, for all
Gaussians one after the other:

    positions    three whole numbers of 24 bits with a sign, times 2^-bits (version 1: float16)
    opacities    a byte, 0..1
    colours      three bytes, 255 (0.15 f_dc + 1/2)
    sizes        three bytes, 16 (log of the standard deviation + 10)
    rotations    of the quaternion (x, y, z, w) a word of 32 bits: 2 for the largest component,
                 which is left out and positive, and for each other one in turn a bit for its sign
                 and 9 from 0 to 1/sqrt(2), the last the lowest; up to version 2 the bytes
                 127.5 (x + 1), ... of x, y and z, with w positive
    harmonics    bytes 128 (f_rest + 1), for each coefficient the three channels

y is up and the front on +z, as in glTF. Versions 1 to 3 are read, and 3 is written.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt
from lods.files import whole_file
from lods.gaussians.compressed_ply import byte_of_logit, logit_of_byte
from torch import Tensor

MAGIC, HEADER = b"NGSP", struct.Struct("<4sIIBBBB")
VERSIONS = (1, 2, 3)
MAX_GAUSSIANS = 10_000_000  # some gigabytes of work, and as many as other readers take
MAX_RATIO = 1100  # deflate makes nothing smaller than 1/1032
COLOR = 0.15
MAX_BITS = 23  # fractional bits


def read_spz(path: str | Path) -> dict[str, Tensor]:
    """The Gaussians of a file, y up and the front on +z; see
    :class:`lods.gaussians.parameters.GaussianParameters` for the names.

    Raises:
        ValueError: not such a file, of another version, damaged, larger than MAX_GAUSSIANS, or
            without a Gaussian that can be drawn.
    """
    from lods.gaussians.ply import checked_gaussians

    try:
        values = _rows(Path(path))
    except (ValueError, struct.error, zlib.error, EOFError) as error:
        raise ValueError(f"'{path}' is not a readable spz file: {error}") from error
    return checked_gaussians(path, values)


def _rows(path: Path) -> Float[np.ndarray, "N K"]:
    size = path.stat().st_size
    if size > MAX_GAUSSIANS * 68:
        raise ValueError(f"it has {size} bytes")
    packed = path.read_bytes()
    if packed[:2] != b"\x1f\x8b":
        raise ValueError("it is not compressed by gzip, as versions 1 to 3 are")
    unpacker = zlib.decompressobj(wbits=31)
    head = unpacker.decompress(packed, HEADER.size)
    if len(head) < HEADER.size:
        raise ValueError("it is shorter than its header")
    magic, version, n, degree, bits, _, _ = HEADER.unpack(head)
    if magic != MAGIC:
        raise ValueError("it does not begin as an spz file does")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version}: versions 1 to 3 are read")
    if degree > 3 or bits > MAX_BITS:
        raise ValueError(f"it has harmonics of degree {degree} and {bits} fractional bits")
    if not 0 < n <= MAX_GAUSSIANS:
        raise ValueError(f"it promises {n} Gaussians, of which 1 to {MAX_GAUSSIANS} are read")
    rest = (degree + 1) ** 2 - 1
    widths = [6 if version == 1 else 9, 1, 3, 3, 3 if version < 3 else 4, 3 * rest]
    wanted = n * sum(widths)
    if wanted > MAX_RATIO * size:
        raise ValueError(f"it promises {wanted} bytes, which {size} cannot hold")
    data = unpacker.decompress(unpacker.unconsumed_tail, wanted)
    if len(data) < wanted:
        raise ValueError(f"it promises {wanted} bytes, and has {len(data)}")
    ends = np.cumsum([n * width for width in widths])[:-1]
    tables = np.split(np.frombuffer(data, np.uint8), ends)
    place, alpha, color, scale, turned, harmonics = (
        table.reshape(n, width) for table, width in zip(tables, widths)
    )
    quats = _first_three(turned) if version < 3 else _largest_left_out(turned)
    parts = [
        _positions(place, version, bits),
        (color / 255 - 0.5) / COLOR,
        # channel after channel, as in a ply
        ((harmonics.astype(np.float32) - 128) / 128)
        .reshape(n, rest, 3)
        .transpose(0, 2, 1)
        .reshape(n, 3 * rest),
        logit_of_byte(alpha[:, 0])[:, None],
        scale / 16 - 10,
        quats,
    ]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _positions(table: UInt[np.ndarray, "N W"], version: int, bits: int) -> np.ndarray:
    if version == 1:
        return np.ascontiguousarray(table).view("<f2").astype(np.float64)
    low, middle, high = table.reshape(len(table), 3, 3).astype(np.int32).transpose(2, 0, 1)
    whole = low | (middle << 8) | (high << 16)
    return np.where(whole >= 1 << 23, whole - (1 << 24), whole) / (1 << bits)


def _first_three(table: UInt[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 4"]:
    """Quaternions wxyz of bytes of x, y and z."""
    xyz = table / 127.5 - 1
    w = np.sqrt((1 - (xyz**2).sum(1)).clip(0))
    return np.concatenate([w[:, None], xyz], axis=1)


def _largest_left_out(table: UInt[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
    """Quaternions wxyz of words."""
    words = np.ascontiguousarray(table).view("<u4")[:, 0].astype(np.int64)
    left_out = words >> 30
    xyzw = np.zeros((len(words), 4))
    left = words.copy()
    for i in (3, 2, 1, 0):
        rows = left_out != i
        share = (left & 511) / 511 / 2**0.5
        xyzw[rows, i] = np.where((left >> 9) & 1, -share, share)[rows]
        left = np.where(rows, left >> 10, left)
    xyzw[np.arange(len(words)), left_out] = np.sqrt((1 - (xyzw**2).sum(1)).clip(0))
    return xyzw[:, [3, 0, 1, 2]]


def write_spz(path: str | Path, gaussians: dict[str, Tensor]) -> int:
    """Write Gaussians, by the names of :class:`lods.gaussians.parameters.GaussianParameters`, given
    in threestudio's axes. Returns their number.

    Positions have as many fractional bits as their largest leaves, 12 or more up to +-2048 units;
    what does not fit is at the end of the range.
    """
    from lods.gaussians.ply import gaussian_rows

    rows = gaussian_rows(gaussians, "y-up").astype(np.float64)
    n, rest = len(rows), (rows.shape[1] - 14) // 3
    if not 0 < n <= MAX_GAUSSIANS:
        raise ValueError(f"'{path}': 1 to {MAX_GAUSSIANS} Gaussians are written, not {n}")
    ends = np.cumsum([3, 3, 3 * rest, 1, 3, 4])[:-1]
    means, dc, harmonics, opacity, scales, quats = np.split(rows, ends, axis=1)
    largest = max(float(np.abs(means).max()), 2.0**-MAX_BITS)
    bits = int(np.clip(np.floor(np.log2((2**23 - 1) / largest)), 0, MAX_BITS))
    whole = np.rint(means * (1 << bits)).clip(-(2**23), 2**23 - 1).astype(np.int64) & 0xFFFFFF
    place = np.stack([whole & 255, (whole >> 8) & 255, whole >> 16], axis=-1)
    levels = harmonics.reshape(n, 3, rest).transpose(0, 2, 1)
    tables = [
        place,
        byte_of_logit(opacity),
        _byte(255 * (COLOR * dc + 0.5)),
        _byte(16 * (scales + 10)),
        _words(quats).view(np.uint8),
        _byte(128 * (levels + 1)),
    ]
    degree = {0: 0, 3: 1, 8: 2, 15: 3}[rest]
    data = HEADER.pack(MAGIC, VERSIONS[-1], n, degree, bits, 0, 0)
    data += b"".join(table.astype(np.uint8).tobytes() for table in tables)
    with whole_file(path) as partial:
        # no name and no time, so that the same Gaussians are the same file
        partial.write_bytes(gzip.compress(data, mtime=0))
    return n


def _byte(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255)


def _words(quats: Float[np.ndarray, "N 4"]) -> UInt[np.ndarray, " N"]:
    xyzw = quats[:, [1, 2, 3, 0]] / np.linalg.norm(quats, axis=1, keepdims=True)
    largest = np.abs(xyzw).argmax(axis=1)
    xyzw *= np.where(xyzw[np.arange(len(xyzw)), largest] < 0, -1, 1)[:, None]
    words = largest.astype(np.uint32)
    for i in range(4):
        share = np.rint(np.abs(xyzw[:, i]) * 2**0.5 * 511).clip(0, 511).astype(np.uint32)
        part = (
            (words << np.uint32(10)) | ((xyzw[:, i] < 0).astype(np.uint32) << np.uint32(9)) | share
        )
        words = np.where(largest == i, words, part).astype(np.uint32)
    return words.astype("<u4")
