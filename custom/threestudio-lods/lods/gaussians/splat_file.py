"""Gaussians as a ``.splat`` file, which many viewers in browsers read.

    python -m lods.gaussians.splat_file gaussians.ply gaussians.splat

A Gaussian is 32 bytes, little-endian: the position and the three standard deviations as float32,
the colour and opacity as four bytes, the quaternion (w, x, y, z) as four bytes, 128 + 128 q. Higher
harmonics have no place in it, so that the colour is the same from all sides. The Gaussians that
matter most, by opacity times volume, come first, as viewers that load a file piece by piece expect.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from lods.files import whole_file
from lods.gaussians.compressed_ply import logit_of_byte
from lods.gaussians.harmonics import SH_C0
from torch import Tensor

ROW = np.dtype([("place", "<f4", 6), ("rgba", "u1", 4), ("turned", "u1", 4)])


def splat_bytes(
    means: Float[Tensor, "N 3"],
    scales: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    opacities: Float[Tensor, " N"],
    sh0: Float[Tensor, "N 1 3"],
) -> bytes:
    """The content of a file, of parameters as :func:`lods.gaussians.ply.read_ply` gives them:
    ``scales`` are logarithms, ``opacities`` logits, ``sh0`` the constant harmonic."""
    solid = torch.sigmoid(opacities)
    order = torch.argsort(solid * scales.sum(dim=1).exp(), descending=True)
    rgba = torch.cat([0.5 + SH_C0 * sh0[:, 0], solid[:, None]], dim=1)
    turned = torch.nn.functional.normalize(quats, dim=1)
    rows = np.empty(len(means), ROW)
    rows["place"] = torch.cat([means, scales.exp()], dim=1)[order].numpy()
    rows["rgba"] = (255 * rgba.clamp(0, 1)).round().byte()[order].numpy()
    rows["turned"] = (128 + 128 * turned).round().clamp(0, 255).byte()[order].numpy()
    return rows.tobytes()


def read_splat(path: str | Path) -> dict[str, Tensor]:
    """The Gaussians of a file, in its own axes, which it does not say; see
    :class:`lods.gaussians.parameters.GaussianParameters` for the names.

    Raises:
        ValueError: an empty file, one of another length than whole rows, or one in which no
            Gaussian can be drawn.
    """
    from lods.gaussians.ply import MAX_ROWS, checked_gaussians

    size = Path(path).stat().st_size
    if size == 0 or size % ROW.itemsize:
        raise ValueError(
            f"'{path}' is not a .splat file: it has {size} bytes, which are no rows of "
            f"{ROW.itemsize}"
        )
    if size > MAX_ROWS * ROW.itemsize:
        raise ValueError(f"'{path}' has more than {MAX_ROWS} Gaussians: make it smaller")
    rows = np.fromfile(path, ROW)
    place = rows["place"]
    with np.errstate(invalid="ignore", divide="ignore"):
        scales = np.log(np.maximum(place[:, 3:], np.finfo(np.float32).tiny))
    values = [
        place[:, :3],
        (rows["rgba"][:, :3] / 255 - 0.5) / SH_C0,
        logit_of_byte(rows["rgba"][:, 3])[:, None],
        scales,
        (rows["turned"].astype(np.float64) - 128) / 128,
    ]
    return checked_gaussians(path, np.concatenate(values, axis=1))


def convert(source: Path, target: Path) -> int:
    """Write the Gaussians of a ply file to ``target``, in the axes that they have there; returns
    their number. Raises ``ValueError`` for a ply file without Gaussians."""
    from lods.gaussians.ply import read_ply

    found = read_ply(source)
    if "scales" not in found:
        raise ValueError(f"{source} holds no Gaussians")
    names = ("means", "scales", "quats", "opacities", "sh0")
    content = splat_bytes(**{name: found[name] for name in names})
    with whole_file(target) as partial:
        partial.write_bytes(content)
    return len(found["means"])


def main(argv: list[str]) -> int:
    """Two words: the ply file and the file to write."""
    try:
        source, target = map(Path, argv)
        print(f"{convert(source, target)} Gaussians: {target}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
