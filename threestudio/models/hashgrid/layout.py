"""Where the parameters of a multi-resolution hash grid lie.

Method: Müller et al. 2022, "Instant Neural Graphics Primitives" (arXiv:2201.05989), section 3.
Numbers, rounding and order are those of tiny-cuda-nn (github.com/NVlabs/tiny-cuda-nn,
``encodings/grid.h`` and ``common_device.h``), so that parameters can be exchanged with it.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from threestudio.utils.errors import UserError, nearest
from threestudio.utils.typing import *

PRIMES = (1, 2654435761, 805459861, 3674653429)
INTERPOLATIONS = ("Linear", "Smoothstep")
# Beyond this many cells a side, positions in single precision tell no cells apart.
MAX_SCALE = 2.0**30


@dataclass(frozen=True)
class Level:
    """One level: vertices at ``position = x * scale + 0.5`` = 0, 1, 2, ... along each axis.

    A vertex (i, j, k) has the entry ``(i + j r + k r^2) mod size`` when ``dense``, r being the
    resolution, else ``(i xor j p1 xor k p2) mod size``; ``strides`` holds the factors. All of it is
    arithmetic of unsigned 32-bit integers, which wraps. ``offset`` is the first entry of the level.
    """

    scale: float
    resolution: int
    offset: int
    size: int
    dense: bool
    strides: Tuple[int, ...]


@dataclass(frozen=True)
class GridLayout:
    """The whole grid. Parameters are one flat vector, ordered by level, entry, feature."""

    n_input_dims: int
    n_levels: int
    n_features_per_level: int
    log2_hashmap_size: int
    base_resolution: int
    per_level_scale: float
    interpolation: str
    levels: Tuple[Level, ...]

    @property
    def n_output_dims(self) -> int:
        return self.n_levels * self.n_features_per_level

    @property
    def n_params(self) -> int:
        return (self.levels[-1].offset + self.levels[-1].size) * self.n_features_per_level

    @cached_property
    def arrays(self) -> Tuple[np.ndarray, ...]:
        """Per level: scale, size, offset, dense, and three strides. In 2 dimensions the third
        stride is 0: both vertices along a third axis have the same entry, so it changes nothing."""
        return (
            np.array([level.scale for level in self.levels], np.float32),
            np.array([level.size for level in self.levels], np.uint32),
            np.array([level.offset for level in self.levels], np.uint64),
            np.array([level.dense for level in self.levels]),
            np.array([(*level.strides, 0)[:3] for level in self.levels], np.uint32),
        )


def _check(key: str, value, allowed, text: str) -> int:
    """``value`` as an integer; an error that names the key unless it is among ``allowed``."""
    if isinstance(value, bool) or value not in allowed:
        raise UserError(f"hash grid: {key} has to be {text}, not {value!r}")
    return int(value)


def grid_layout(
    n_input_dims: int = 3,
    n_levels: int = 16,
    n_features_per_level: int = 2,
    log2_hashmap_size: int = 19,
    base_resolution: int = 16,
    per_level_scale: float = 2.0,
    interpolation: str = "Linear",
) -> GridLayout:
    """The layout for tiny-cuda-nn's configuration keys (and its defaults). For level l:

        scale      = 2^(l log2(per_level_scale)) base_resolution - 1      in single precision
        resolution = ceil(scale) + 1
        size       = min(resolution^n_input_dims rounded up to 8, 2^log2_hashmap_size)

    and the level is dense if it has an entry for each vertex. Raises ``UserError``, which names
    the key, for a value that cannot be.
    """
    dims = _check("n_input_dims", n_input_dims, (2, 3, 4), "2, 3 or 4")
    n_levels = _check("n_levels", n_levels, range(1, 129), "an integer from 1 to 128")
    features = _check("n_features_per_level", n_features_per_level, (1, 2, 4, 8), "1, 2, 4 or 8")
    log2_size = _check(
        "log2_hashmap_size", log2_hashmap_size, range(1, 29), "an integer from 1 to 28"
    )
    base = _check("base_resolution", base_resolution, range(1, 2**20), "an integer from 1 to 2^20")
    growth = per_level_scale
    if isinstance(growth, bool | str) or not 1 <= growth < math.inf:
        raise UserError(f"hash grid: per_level_scale has to be a number >= 1, not {growth!r}")
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"hash grid: interpolation has to be Linear or Smoothstep, not {interpolation!r}"
            f"{nearest(interpolation, INTERPOLATIONS)}"
        )
    log2_growth = np.float32(math.log2(np.float32(growth)))
    levels, offset = [], 0
    for l in range(n_levels):
        power = float(np.float32(l) * log2_growth)
        if power + math.log2(base) > math.log2(MAX_SCALE):
            raise UserError(
                f"hash grid: per_level_scale {growth} gives level {l} more than 2^30 cells a side; "
                "lower per_level_scale or n_levels"
            )
        scale = np.float32(2.0**power) * np.float32(base) - np.float32(1)
        resolution = math.ceil(scale) + 1
        vertices = resolution**dims
        size = min(-(-vertices // 8) * 8, 2**log2_size)
        dense = vertices <= size
        strides = tuple(resolution**d for d in range(dims)) if dense else PRIMES[:dims]
        levels.append(Level(float(scale), resolution, offset, size, dense, strides))
        offset += size
    return GridLayout(
        dims, n_levels, features, log2_size, base, float(growth), interpolation, tuple(levels)
    )
