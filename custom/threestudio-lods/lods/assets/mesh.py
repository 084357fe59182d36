"""Triangles with a texture or with colours at their vertices, as files of meshes bring them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lods.gaussians.mesh import Mesh as Surface
from torch import Tensor


@dataclass
class Mesh:
    """Triangles and what they look like; tensors of the CPU.

    - ``vertices`` (V, 3) float32, in world units
    - ``faces`` (F, 3) int64, counterclockwise seen from outside
    - ``uv`` (V, 2) float32, where the vertices lie in the texture: (0, 0) is its lower left corner
      and (1, 1) the upper right one, as for OpenGL. A vertex on a seam stands once for each place
    - ``texture`` (H, W, 3) float32, shown colours (sRGB) 0..1, row 0 at the top
    - ``colours`` (V, 3) float32, shown colours (sRGB) 0..1 of the vertices, between which they are
      linear

    Where there is a texture with ``uv`` it alone tells the colour, else ``colours`` do, else it is
    mid grey.
    """

    vertices: Float[Tensor, "V 3"]
    faces: Int[Tensor, "F 3"]
    uv: Float[Tensor, "V 2"] | None = None
    texture: Float[Tensor, "H W 3"] | None = None
    colours: Float[Tensor, "V 3"] | None = None
    placement: Any = None  # of one that was read: lods.assets.Placement, where it was in its file

    def finite(self) -> "Mesh":
        """Without the triangles that have a corner which is not finite."""
        good = self.vertices.isfinite().all(1)[self.faces].all(1)
        return self if good.all() else replace(self, faces=self.faces[good])

    def compact(self) -> "Mesh":
        """Without the vertices that no triangle has."""
        used, faces = self.faces.unique(return_inverse=True)
        own = {name: getattr(self, name) for name in ("vertices", "uv", "colours")}
        kept = {name: None if rows is None else rows[used] for name, rows in own.items()}
        return replace(self, faces=faces, **kept)

    def normals(self) -> Float[Tensor, "V 3"]:
        """Unit vectors outward: the mean of the faces' normals, weighted by area, over all vertices
        at the same place, so that a seam of the texture is none of the surface; (0, 0, 1) where
        that is zero."""
        place, which = torch.unique(self.vertices, dim=0, return_inverse=True)
        return Surface(place, which[self.faces]).normals()[which]

    def shown_colours(self) -> Float[Tensor, "V 3"]:
        """The colours 0..1 at the vertices: the texture's there, or ``colours``, or mid grey."""
        if self.texture is not None and self.uv is not None:
            return sampled(self.texture, self.uv)
        if self.colours is not None:
            return self.colours
        return torch.full_like(self.vertices, 0.5)


def sampled(texture: Float[Tensor, "H W 3"], uv: Float[Tensor, "*N 2"]) -> Float[Tensor, "*N 3"]:
    """The texture at ``uv``, between the centres of texels linearly, and beyond its edge as at
    it."""
    where = torch.stack([2 * uv[..., 0] - 1, 1 - 2 * uv[..., 1]], dim=-1).reshape(1, 1, -1, 2)
    image = texture.permute(2, 0, 1)[None].to(where)
    found = F.grid_sample(image, where, align_corners=False, padding_mode="border")
    return found[0, :, 0].T.reshape(*uv.shape[:-1], 3).to(texture)
