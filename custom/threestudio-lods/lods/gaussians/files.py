"""Files of Gaussians, whatever their format: 3DGS and compressed ply, ``.splat``, ``.spz``."""

from pathlib import Path
from typing import Any

import torch
from lods.files import whole_file
from lods.gaussians.axes import PLY_AXES
from torch import Tensor

COMPRESSED = ".compressed.ply"  # the end of names of compressed ply files
ENDINGS = (".ply", COMPRESSED, ".splat", ".spz")
NAMES = ("means", "scales", "quats", "opacities", "sh0")  # shN may be missing


def is_of_gaussians(path: str | Path) -> bool:
    """Whether the name is that of a format that holds nothing but Gaussians."""
    return Path(path).suffix.lower() in (".splat", ".spz")


def read_gaussians(path: str | Path) -> dict[str, Any]:
    """What a file holds, in its own axes: Gaussians, or of a ply what
    :func:`lods.gaussians.ply.read_ply` gives. ``axes``, where the file or its format names them:
    those that hold the front and up.

    Raises:
        ValueError: a file of another format, or one that cannot be read.
    """
    from lods.gaussians.ply import read_ply
    from lods.gaussians.splat_file import read_splat
    from lods.gaussians.spz_file import read_spz

    suffix = Path(path).suffix.lower()
    if suffix == ".ply":
        return read_ply(path)
    if suffix == ".splat":
        return read_splat(path)
    if suffix == ".spz":
        return read_spz(path) | {"axes": PLY_AXES["y-up"]}
    raise ValueError(f"'{path}' is not a file of Gaussians: {', '.join(ENDINGS)} are read")


def write_gaussians(path: str | Path, gaussians: dict[str, Tensor], axes: str = "z-up") -> int:
    """Write Gaussians, by the names of :class:`lods.gaussians.parameters.GaussianParameters`, given
    in threestudio's axes, in the format of the name's ending, one of ENDINGS, with the file's
    ``axes``, one of :data:`lods.gaussians.axes.PLY_AXES`; an ``.spz`` always has y up. Returns how
    many are written.

    A 3DGS ply keeps every bit; the others round: a ``.splat`` has no harmonics either.
    """
    from lods.gaussians.compressed_ply import write_compressed_ply
    from lods.gaussians.ply import gaussian_rows, write_ply
    from lods.gaussians.splat_file import splat_bytes
    from lods.gaussians.spz_file import write_spz

    name = Path(path).name.lower()
    if name.endswith(COMPRESSED):
        return write_compressed_ply(path, gaussians, axes)
    if name.endswith(".ply"):
        return write_ply(path, **gaussians, axes=axes)
    if name.endswith(".spz"):
        return write_spz(path, gaussians)
    if name.endswith(".splat"):
        flat = {name: gaussians[name] for name in NAMES}
        rows = torch.from_numpy(gaussian_rows(flat, axes))
        means, dc, opacities, scales, quats = rows.split([3, 3, 1, 3, 4], dim=1)
        content = splat_bytes(means, scales, quats, opacities[:, 0], dc[:, None])
        with whole_file(path) as partial:
            partial.write_bytes(content)
        return len(rows)
    raise ValueError(f"'{path}': Gaussians are written as {', '.join(ENDINGS)}")
