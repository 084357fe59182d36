"""Gaussians as an ``.spz`` file, Niantic's: tables of bytes, compressed by gzip or zstd.

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

In version 4 the header has 16 bytes more, of which the first four tell where a list of the tables
is (two numbers of 64 bits each: the size in the file, and unpacked), and each table is compressed
by zstd; the last byte of the first 16 is their number. The tables follow the list.

y is up and the front on +z, as in glTF. Versions 1 to 4 are read, and 3 is written, which readers
of both kinds know.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt
from lods import log
from lods.files import whole_file
from lods.gaussians.compressed_ply import byte_of_logit, logit_of_byte
from torch import Tensor

MAGIC, HEADER = b"NGSP", struct.Struct("<4sIIBBBB")
VERSIONS, WRITTEN, ZSTD = (1, 2, 3, 4), 3, 4
MAX_WINDOW = 1 << 27  # bytes that zstd may look back
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
    if size > MAX_GAUSSIANS * 90:
        raise ValueError(f"it has {size} bytes")
    packed = path.read_bytes()
    zipped = packed[:2] == b"\x1f\x8b"
    unpacker = zlib.decompressobj(wbits=31)
    head = unpacker.decompress(packed, HEADER.size) if zipped else packed[: HEADER.size]
    if len(head) < HEADER.size:
        raise ValueError("it is shorter than its header")
    magic, version, n, degree, bits, _, streams = HEADER.unpack(head)
    if magic != MAGIC:
        raise ValueError("it does not begin as an spz file does")
    if version not in VERSIONS or zipped != (version < ZSTD):
        raise ValueError(f"it is of version {version}: versions 1 to 4 are read")
    if degree > 4 or bits > MAX_BITS:
        raise ValueError(f"it has harmonics of degree {degree} and {bits} fractional bits")
    if not 0 < n <= MAX_GAUSSIANS:
        raise ValueError(f"it promises {n} Gaussians, of which 1 to {MAX_GAUSSIANS} are read")
    rest = (degree + 1) ** 2 - 1
    widths = [6 if version == 1 else 9, 1, 3, 3, 3 if version < 3 else 4, 3 * rest]
    if version < ZSTD:
        wanted = n * sum(widths)
        if wanted > MAX_RATIO * size:
            raise ValueError(f"it promises {wanted} bytes, which {size} cannot hold")
        data = unpacker.decompress(unpacker.unconsumed_tail, wanted)
        if len(data) < wanted:
            raise ValueError(f"it promises {wanted} bytes, and has {len(data)}")
        tables = np.split(np.frombuffer(data, np.uint8), np.cumsum(widths)[:-1] * n)
    else:
        tables = _streams(packed, streams, [n * width for width in widths])
    place, alpha, color, scale, turned, harmonics = (
        table.reshape(n, width) for table, width in zip(tables, widths)
    )
    kept = min(rest, 15)  # up to degree 3
    if kept < rest:
        log.warn(f"'{path}': harmonics of degree {degree} are read up to degree 3")
    levels = (harmonics.reshape(n, rest, 3)[:, :kept].astype(np.float32) - 128) / 128
    quats = _first_three(turned) if version < 3 else _largest_left_out(turned)
    parts = [
        _positions(place, version, bits),
        (color / 255 - 0.5) / COLOR,
        levels.transpose(0, 2, 1).reshape(n, 3 * kept),  # channel after channel, as in a ply
        logit_of_byte(alpha[:, 0])[:, None],
        scale / 16 - 10,
        quats,
    ]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _streams(packed: bytes, count: int, sizes: list[int]) -> list[UInt[np.ndarray, " M"]]:
    """The tables of version 4, each compressed by zstd. Raises ValueError where one does not have
    the bytes that it shall have."""
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "it is of version 4, which needs zstandard: pip install zstandard"
        ) from None
    (at,) = struct.unpack_from("<I", packed, HEADER.size)
    expected = [size for size in sizes if size]
    if count < len(expected):
        raise ValueError(f"it has {count} tables, and shall have {len(expected)}")
    lengths = [struct.unpack_from("<QQ", packed, at + 16 * i) for i in range(count)]
    start = at + 16 * count
    found = []
    for (length, size), wanted in zip(lengths, expected):
        if size != wanted or start + length > len(packed):
            raise ValueError(f"it has a table of {size} bytes, and shall have one of {wanted}")
        try:
            # not decompress(), which takes as much memory as the data ask for
            unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
            data = unpacker.stream_reader(packed[start : start + length]).read(wanted)
        except zstandard.ZstdError as error:
            raise ValueError(f"a table of it is damaged: {error}") from error
        if len(data) < wanted:
            raise ValueError(f"it has a table of {len(data)} bytes, and shall have {wanted}")
        found.append(np.frombuffer(data, np.uint8))
        start += length
    # harmonics of degree 0 are none
    return [*found, *(np.zeros(0, np.uint8) for size in sizes if not size)]


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
    if n > MAX_GAUSSIANS:
        raise ValueError(f"'{path}': at most {MAX_GAUSSIANS} Gaussians are written, not {n}")
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
    data = HEADER.pack(MAGIC, WRITTEN, n, degree, bits, 0, 0)
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
