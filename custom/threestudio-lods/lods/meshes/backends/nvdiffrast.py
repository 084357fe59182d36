"""nvdiffrast's CUDA kernels behind our four functions (github.com/NVlabs/nvdiffrast,
arXiv:2011.03277). No part of this has been run on a CUDA device yet.

Two differences are nvdiffrast's: triangles smaller than a pixel have no smoothed edge (it looks at
the edges of the triangle that a pixel shows, and our own rasterisers walk on from there), and
single precision decides which triangle has a pixel on an edge.
"""

import importlib
from functools import lru_cache
from typing import Any

import torch
from lods.meshes.fragments import Fragments
from torch import Tensor

GET = (
    "pip install --no-build-isolation git+https://github.com/NVlabs/nvdiffrast.git, with a CUDA "
    "toolkit (nvcc)"
)


@lru_cache(maxsize=1)
def missing() -> str:
    """Why nvdiffrast cannot be used here, with the remedy; empty if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; use backend='cpu'"
    try:
        importlib.import_module("nvdiffrast.torch")
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"nvdiffrast cannot be loaded ({reason}); {GET}"
    return ""


@lru_cache
def _context(device: torch.device) -> Any:
    return importlib.import_module("nvdiffrast.torch").RasterizeCudaContext(device=device)


def _clip(points: Tensor, Ks: Tensor, width: int, height: int, near: float, far: float) -> Tensor:
    """Clip space, y down, as the rows of a picture are: x = 2 (fx X + cx Z) / W - Z, y alike, z
    from -Z at ``near`` to Z at ``far``, w = Z."""
    X, Y, Z = points.unbind(-1)
    fx, fy = Ks[:, 0, 0, None], Ks[:, 1, 1, None]
    cx, cy = Ks[:, 0, 2, None], Ks[:, 1, 2, None]
    x, y = 2 * (fx * X + cx * Z) / width - Z, 2 * (fy * Y + cy * Z) / height - Z
    z = ((far + near) * Z - 2 * far * near) / (far - near)
    return torch.stack([x, y, z, Z], dim=-1).contiguous()


def rasterize(points, faces, Ks, width, height, near_plane, far_plane) -> Fragments:
    """See ``reference.rasterize``."""
    dr = importlib.import_module("nvdiffrast.torch")
    clip = _clip(points.float(), Ks.float(), width, height, near_plane, far_plane)
    triangles = faces.int().contiguous()
    rast, _ = dr.rasterize(_context(points.device), clip, triangles, (height, width))
    # the weights are what attributes that are 1 at one corner and 0 at the others become
    count = len(faces)
    corners = torch.eye(3, device=points.device).repeat(count, 1)
    own = torch.arange(3 * count, device=points.device, dtype=torch.int32).view(count, 3)
    weights, _ = dr.interpolate(corners[None], rast, own)
    depth, _ = dr.interpolate(points.float()[..., 2:].contiguous(), rast, triangles)
    face = rast[..., 3].long() - 1
    return Fragments(face, weights, depth[..., 0], (rast, clip))


def interpolate(attributes, faces, fragments: Fragments) -> Tensor:
    """See ``reference.interpolate``."""
    dr = importlib.import_module("nvdiffrast.torch")
    rast, _ = fragments.native
    values, _ = dr.interpolate(
        attributes.float()[None].contiguous(), rast, faces.int().contiguous()
    )
    return values


def sample(texture, uv, fragments: Fragments) -> Tensor:
    """See ``reference.sample``. nvdiffrast has row 0 at v = 0."""
    dr = importlib.import_module("nvdiffrast.torch")
    flipped = torch.stack([uv[..., 0], 1 - uv[..., 1]], dim=-1)
    values = dr.texture(
        texture.float()[None].contiguous(), flipped, filter_mode="linear", boundary_mode="wrap"
    )
    return values * (fragments.face >= 0)[..., None]


def antialias(image, fragments: Fragments, points, faces, neighbours, Ks) -> Tensor:
    """See ``reference.antialias``."""
    dr = importlib.import_module("nvdiffrast.torch")
    rast, clip = fragments.native
    return dr.antialias(image.contiguous(), rast, clip, faces.int().contiguous())
