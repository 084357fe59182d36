"""Triangles with a texture or with colours at their vertices, as files of meshes bring them."""

from dataclasses import dataclass

from jaxtyping import Float, Int
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
