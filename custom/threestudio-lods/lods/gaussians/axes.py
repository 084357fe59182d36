"""Turning Gaussians and points from some axes to others."""

import math

import numpy as np
import torch
from jaxtyping import Float
from lods.gaussians.harmonics import spherical_harmonics
from scipy.spatial.transform import Rotation
from torch import Tensor

AXES = {
    sign + axis: (1.0 if sign == "+" else -1.0) * np.eye(3)[i]
    for i, axis in enumerate("xyz")
    for sign in "+-"
}
# of a ply file -> the file's axes that hold threestudio's front (+x) and up (+z)
PLY_AXES = {
    "z-up": ("+x", "+z"),  # threestudio's own
    "y-down": ("-z", "-y"),  # of pictures, x right and z into them: 3DGS and its viewers
    "y-up": ("+z", "+y"),  # of glTF and spz, x right and z out of the picture
}


def axes_rotation(front: str, up: str) -> np.ndarray:
    """The rotation (3, 3) that turns ``front`` to +x (azimuth 0, where the cameras see the front)
    and ``up`` to +z. Both are '+x', '-x', '+y', '-y', '+z' or '-z'.

    Its rows are front, up x front and up, hence R @ front = e_x and R @ up = e_z.
    """
    for name, value in (("front", front), ("up", up)):
        if value not in AXES:
            raise ValueError(f"{name}='{value}' is not an axis: use one of {', '.join(AXES)}")
    f, u = AXES[front], AXES[up]
    if abs(f @ u) > 0.5:
        raise ValueError(f"front='{front}' and up='{up}' are the same axis")
    return np.stack([f, np.cross(u, f), u])


def rotate_gaussians(
    gaussians: dict[str, Tensor], rotation: Float[np.ndarray, "3 3"]
) -> dict[str, Tensor]:
    """The Gaussians (parameters by name) turned about the origin: a camera that turns with them
    sees what it saw before. The same tensors where the rotation is none.

    Means become R mu, quaternions q_R q. Harmonics of degree l mix among themselves: with the
    colour of direction d being Y(d) k, the new coefficients solve Y(d) k' = Y(R^T d) k for all d.
    """
    if np.array_equal(rotation, np.eye(3)):
        return gaussians
    R = torch.as_tensor(rotation, dtype=torch.float64)
    turned = dict(gaussians)
    means, quats = gaussians["means"], gaussians["quats"]
    turned["means"] = (means.double() @ R.T.to(means.device)).to(means.dtype)
    b, c, d, a = Rotation.from_matrix(rotation).as_quat()  # scipy's real part is the last
    w, x, y, z = quats.double().unbind(-1)
    product = [
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    ]
    turned["quats"] = torch.stack(product, dim=-1).to(quats.dtype)
    rest = gaussians.get("shN")
    if rest is not None and rest.shape[1] > 0:
        degree = math.isqrt(rest.shape[1] + 1) - 1
        i = torch.arange(64, dtype=torch.float64)  # directions spread over the sphere: a spiral
        height, angle = 1 - (2 * i + 1) / 64, i * math.pi * (3 - math.sqrt(5))
        flat = (1 - height**2).sqrt()
        d = torch.stack([flat * angle.cos(), flat * angle.sin(), height], dim=-1)
        before, after = spherical_harmonics(d @ R, degree), spherical_harmonics(d, degree)
        mix = torch.zeros(rest.shape[1], rest.shape[1], dtype=torch.float64)
        for l in range(1, degree + 1):
            of = slice(l * l - 1, (l + 1) ** 2 - 1)
            mix[of, of] = torch.linalg.lstsq(after[:, of], before[:, of]).solution
        turned["shN"] = (mix.to(rest.device) @ rest.double()).to(rest.dtype)
    return turned
