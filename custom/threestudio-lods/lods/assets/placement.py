"""Where an asset stood in its scene, so that it can go back there."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lods.assets.mesh import Mesh
from lods.gaussians.axes import axes_rotation, rotate_gaussians
from lods.gaussians.parameters import Gaussians
from torch import Tensor

HALF_SIDE = 0.87  # world units: of the longest side of the box of what is trained
FAINT = 0.01  # Gaussians of less opacity do not count for the box
STRAY = 0.001  # of the Gaussians that may be outside of the box on each side of each axis


@dataclass(frozen=True, eq=False)
class Placement:
    """The similarity from a file's space to the world, z up and the front on +x:

        x_world = scale * rotation @ x_file + shift

    with ``scale`` > 0, a rotation (3, 3) and a ``shift`` (3,), all in 64 bits.
    """

    scale: float
    rotation: Float[np.ndarray, "3 3"]
    shift: Float[np.ndarray, "3"]

    @classmethod
    def none(cls) -> "Placement":
        """That of an asset which is where it was."""
        return cls(1.0, np.eye(3), np.zeros(3))

    def apply(self, asset: Any) -> Any:
        """From the file's space to the world: a :class:`lods.assets.Mesh`,
        :class:`lods.gaussians.Gaussians`, their tensors by name, or points (N, 3). The argument
        stays as it is."""
        return _moved(asset, self.scale, self.rotation, self.shift)

    def undo(self, asset: Any) -> Any:
        """From the world back to the file's space, the same kinds."""
        back = self.rotation.T
        return _moved(asset, 1 / self.scale, back, -(back @ self.shift) / self.scale)


def _moved(asset: Any, scale: float, rotation: np.ndarray, shift: np.ndarray) -> Any:
    if isinstance(asset, Mesh):
        vertices = _points(asset.vertices, scale, rotation, shift)
        return Mesh(vertices, asset.faces, asset.uv, asset.texture, asset.colours)
    if isinstance(asset, Gaussians):
        return Gaussians(_moved(asset.export(), scale, rotation, shift))
    if isinstance(asset, dict):
        turned = dict(rotate_gaussians(asset, rotation))
        turned["means"] = _points(asset["means"], scale, rotation, shift)
        turned["scales"] = asset["scales"] + math.log(scale)
        return turned
    return _points(asset, scale, rotation, shift)


def _points(points: Tensor, scale: float, rotation: np.ndarray, shift: np.ndarray) -> Tensor:
    turn = torch.as_tensor(scale * rotation.T, dtype=torch.float64, device=points.device)
    offset = torch.as_tensor(shift, dtype=torch.float64, device=points.device)
    return (points.detach().double() @ turn + offset).to(points.dtype)


def placement_of(
    asset: Mesh | dict[str, Tensor], axes: tuple[str, str], half_side: float | None = HALF_SIDE
) -> Placement:
    """What turns an asset upright, ``axes`` being those of the file that hold the front and up,
    puts the middle of its box at the origin, and makes the longest half side of the box
    ``half_side``; None: it is only turned.

    The box of Gaussians is that of their centres without the faint ones, and without the outermost
    thousandth on each side, since captured scenes have strays far out.
    """
    rotation = axes_rotation(*axes)
    if half_side is None:
        return Placement(1.0, rotation, np.zeros(3))
    if isinstance(asset, Mesh):
        used = asset.vertices[asset.faces.unique()].double() @ torch.from_numpy(rotation.T)
        low, high = used.amin(0).numpy(), used.amax(0).numpy()
    else:
        solid = asset["opacities"].sigmoid() >= FAINT
        means = asset["means"][solid] if solid.any() else asset["means"]
        points = means.detach().double().cpu().numpy() @ rotation.T
        low, high = np.quantile(points, [STRAY, 1 - STRAY], axis=0)
    longest = float((high - low).max())
    if not 0 < longest < math.inf:
        raise ValueError("it has no size: all its points are the same, or too far apart")
    scale = 2 * half_side / longest
    return Placement(scale, rotation, -scale * (low + high) / 2)
