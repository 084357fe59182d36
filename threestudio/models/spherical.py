"""Real spherical harmonics of directions."""

import math

import torch
from torch import nn

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *


def real_spherical_harmonics(d: Float[Tensor, "*N 3"], degree: int) -> Float[Tensor, "*N K"]:
    """The ``degree``^2 real spherical harmonics with l = 0 .. degree - 1 at unit directions.

    Index l^2 + l + m holds Y_l^m, m = -l..l:

        Y_l^m = sqrt(2) (-1)^m K_l^m Re((x + iy)^m) Q_l^m(z)    for m > 0
        Y_l^-m = sqrt(2) (-1)^m K_l^m Im((x + iy)^m) Q_l^m(z)
        Y_l^0 = K_l^0 Q_l^0(z),      K_l^m = sqrt((2l + 1) / (4 pi) (l - m)! / (l + m)!)

    with Q_l^m = P_l^m / (1 - z^2)^(m/2) up to the sign (-1)^m, by the recurrences of the associated
    Legendre functions. Order and signs are tiny-cuda-nn's (and 3DGS's).
    """
    x, y, z = d.unbind(-1)
    out: List[Optional[Tensor]] = [None] * degree**2
    real, imag = torch.ones_like(x), torch.zeros_like(x)  # (x + iy)^m
    diagonal = 1.0  # Q_m^m = (2m - 1)!!
    for m in range(degree):
        before, here = torch.zeros_like(z), torch.full_like(z, diagonal)
        for k in range(m, degree):
            norm = math.sqrt(
                (2 * k + 1) / (4 * math.pi) * math.factorial(k - m) / math.factorial(k + m)
            )
            if m == 0:
                out[k * k + k] = norm * here
            else:
                sign = math.sqrt(2) * (-1) ** m * norm
                out[k * k + k + m] = sign * real * here
                out[k * k + k - m] = sign * imag * here
            # (k - m + 1) Q_{k+1} = (2k + 1) z Q_k - (k + m) Q_{k-1}
            before, here = here, ((2 * k + 1) * z * here - (k + m) * before) / (k - m + 1)
        real, imag = real * x - imag * y, real * y + imag * x
        diagonal *= 2 * m + 1
    return torch.stack(out, dim=-1)


class SphericalHarmonics(nn.Module):
    """Directions (N, 3), mapped to [0, 1] as (d + 1) / 2, -> (N, degree^2).

    ``degree`` counts bands as tiny-cuda-nn does: 1 is the constant alone; 1 to 8.
    """

    def __init__(self, n_input_dims: int = 3, degree: int = 4) -> None:
        super().__init__()
        if n_input_dims != 3 or not 1 <= degree <= 8:
            raise UserError(
                "encoding SphericalHarmonics takes 3 inputs and a degree from 1 to 8, not "
                f"{n_input_dims} inputs and degree {degree}"
            )
        self.degree, self.n_output_dims = degree, degree**2

    def forward(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N K"]:
        return real_spherical_harmonics(2 * x - 1, self.degree)
