"""From where each image is seen."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """One camera per row, in threestudio's conventions.

    ``elevation`` and ``azimuth`` are in degrees (azimuth 0 sees the front, 180 the back),
    ``distance`` in world units. ``c2w`` is camera to world with OpenGL axes (x right, y up, z
    backward), ``mvp`` the product of projection and world to camera; both are read by VSD only.
    """

    elevation: Float[Tensor, " B"]
    azimuth: Float[Tensor, " B"]
    distance: Float[Tensor, " B"]
    c2w: Float[Tensor, "B 4 4"] | None = None
    mvp: Float[Tensor, "B 4 4"] | None = None

    def repeat(self, times: int) -> "Cameras":
        """All rows, so many times one after the other: rows 0..B-1, 0..B-1, ..."""
        if times == 1:
            return self
        parts = {name: value for name, value in vars(self).items() if value is not None}
        return Cameras(**{name: torch.cat([value] * times) for name, value in parts.items()})

    def __len__(self) -> int:
        return len(self.elevation)

    @property
    def views(
        self,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
        """(elevation, azimuth, distance)."""
        return self.elevation, self.azimuth, self.distance
