"""The spherical harmonics of 3DGS, in which Gaussians keep colours that depend on the view."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))


def spherical_harmonics(d: Float[Tensor, "*N 3"], degree: int) -> Float[Tensor, "*N K"]:
    """The (degree+1)^2 - 1 real spherical harmonics above the constant one, at unit directions, in
    the order and with the signs of 3DGS (arXiv:2308.04079): within a degree l the order is
    m = -l..l, and the sign is (-1)^m."""
    x, y, z = d.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    terms = [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree > 1:
        terms += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
        ]
    if degree > 2:
        terms += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    return torch.stack(terms, dim=-1)


def view_colors(
    sh0: Float[Tensor, "N 1 3"],
    shN: Float[Tensor, "N K 3"] | None = None,
    means: Float[Tensor, "N 3"] | None = None,
    camera_positions: Float[Tensor, "B 3"] | None = None,
) -> Float[Tensor, "*B N 3"]:
    """Colours (N, 3), or with ``shN`` (B, N, 3), which depend on the view:
    max(1/2 + SH_C0 sh0 + sum_k Y_k(direction from the camera) shN_k, 0)."""
    if shN is None:
        return (sh0[:, 0] * SH_C0 + 0.5).clamp_min(0.0)
    if means is None or camera_positions is None:
        raise ValueError("colours that depend on the view need means and camera_positions")
    directions = F.normalize(means - camera_positions[:, None], dim=-1)
    basis = spherical_harmonics(directions, math.isqrt(shN.shape[1] + 1) - 1)
    rest = torch.einsum("bnk,nkc->bnc", basis, shN)
    return (sh0[:, 0] * SH_C0 + 0.5 + rest).clamp_min(0.0)
