"""Triangle meshes to images by nvdiffrast (arXiv:2011.03277), which is optional."""

import torch

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

CONTEXTS = {"gl": "RasterizeGLContext", "cuda": "RasterizeCudaContext"}


def _nvdiffrast():
    try:
        import nvdiffrast.torch as dr
    except ImportError as error:
        raise UserError(
            f"rasterising a mesh needs nvdiffrast and a CUDA device ({error}): pip install "
            "git+https://github.com/NVlabs/nvdiffrast.git (it is compiled, on no package index)"
        ) from None
    return dr


class NVDiffRasterizerContext:
    """nvdiffrast behind the interface of threestudio 0.2.3.

    `context_type`: "gl" or "cuda". Raises :class:`UserError` for another one, and where nvdiffrast
    is not installed; importing this module needs nothing.

    ``rast`` (B, H, W, 4) holds u, v, z/w and 1 + the triangle's index (0: none); positions are in
    clip space; triangles index vertices.
    """

    def __init__(self, context_type: str, device: torch.device) -> None:
        if context_type not in CONTEXTS:
            raise UserError(f"context_type is one of {', '.join(CONTEXTS)}, not {context_type!r}")
        self.device = device
        self._dr = _nvdiffrast()
        self.ctx = getattr(self._dr, CONTEXTS[context_type])(device=device)

    def vertex_transform(
        self, verts: Float[Tensor, "Nv 3"], mvp_mtx: Float[Tensor, "B 4 4"]
    ) -> Float[Tensor, "B Nv 4"]:
        """World to clip space: (x, y, z, 1) @ mvp^T."""
        homogeneous = torch.nn.functional.pad(verts, (0, 1), value=1.0)
        return homogeneous @ mvp_mtx.mT

    def rasterize(
        self,
        pos: Float[Tensor, "B Nv 4"],
        tri: Integer[Tensor, "Nf 3"],
        resolution: Union[int, Tuple[int, int]],
    ) -> Tuple[Float[Tensor, "B H W 4"], Float[Tensor, "B H W 4"]]:
        """``(rast, derivatives of u and v by the pixel's x and y)``; `resolution`: (H, W), or one
        number for both."""
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        return self._dr.rasterize(
            self.ctx, pos.float().contiguous(), tri.int().contiguous(), size, grad_db=True
        )

    def rasterize_one(
        self,
        pos: Float[Tensor, "Nv 4"],
        tri: Integer[Tensor, "Nf 3"],
        resolution: Union[int, Tuple[int, int]],
    ) -> Tuple[Float[Tensor, "H W 4"], Float[Tensor, "H W 4"]]:
        """:meth:`rasterize` of one image."""
        rast, rast_db = self.rasterize(pos[None], tri, resolution)
        return rast[0], rast_db[0]

    def antialias(
        self,
        color: Float[Tensor, "B H W C"],
        rast: Float[Tensor, "B H W 4"],
        pos: Float[Tensor, "B Nv 4"],
        tri: Integer[Tensor, "Nf 3"],
    ) -> Float[Tensor, "B H W C"]:
        """`color` blended across silhouettes, which is what gives vertices a gradient there."""
        return self._dr.antialias(
            color.float().contiguous(), rast, pos.float().contiguous(), tri.int().contiguous()
        )

    def interpolate(
        self,
        attr: Float[Tensor, "B Nv C"],
        rast: Float[Tensor, "B H W 4"],
        tri: Integer[Tensor, "Nf 3"],
        rast_db: Optional[Float[Tensor, "B H W 4"]] = None,
        diff_attrs: Optional[Union[str, List[int]]] = None,
    ) -> Tuple[Float[Tensor, "B H W C"], Optional[Tensor]]:
        """``(attributes of the pixels, their derivatives)``. The derivatives are those of the
        attributes `diff_attrs` ("all" or indices), and need `rast_db`."""
        return self._dr.interpolate(
            attr.float().contiguous(),
            rast,
            tri.int().contiguous(),
            rast_db=rast_db,
            diff_attrs=diff_attrs,
        )

    def interpolate_one(
        self,
        attr: Float[Tensor, "Nv C"],
        rast: Float[Tensor, "B H W 4"],
        tri: Integer[Tensor, "Nf 3"],
        rast_db: Optional[Float[Tensor, "B H W 4"]] = None,
        diff_attrs: Optional[Union[str, List[int]]] = None,
    ) -> Tuple[Float[Tensor, "B H W C"], Optional[Tensor]]:
        """:meth:`interpolate` of attributes that all images share."""
        return self.interpolate(attr[None], rast, tri, rast_db, diff_attrs)
