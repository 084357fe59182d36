"""Drawing a mesh: one function over several backends, and the steps that it consists of."""

from typing import Any

import torch
from jaxtyping import Float, Int
from lods.meshes import backends
from lods.meshes.topology import neighbours as neighbours_of
from torch import Tensor


def rasterization(
    vertices: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    viewmats: Float[Tensor, "C 4 4"],
    Ks: Float[Tensor, "C 3 3"],
    width: int,
    height: int,
    *,
    texture: Float[Tensor, "h w D"] | None = None,
    uv: Float[Tensor, "T 2"] | None = None,
    uv_faces: Int[Tensor, "F 3"] | None = None,
    colours: Float[Tensor, "V D"] | None = None,
    backgrounds: Float[Tensor, "C D"] | None = None,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    antialias: bool = True,
    neighbours: Int[Tensor, "F 3"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "C H W D"], Float[Tensor, "C H W 1"], dict[str, Any]]:
    """Draws a triangle mesh into C images. :mod:`lods.meshes.reference` has the formulas.

    Args:
        vertices: in the world.
        faces: indices of the corners; both sides of a triangle are drawn.
        viewmats: world to camera, OpenCV axes (x right, y down, z forward). Differentiable.
        Ks: intrinsics in pixels; the centre of the first pixel is (0.5, 0.5). No gradient.
        texture: row 0 at the top; interpolated between the four nearest texels, and repeated beyond
            its borders. It is looked up at ``uv``, whose origin is the lower left corner.
        uv_faces: indices of ``uv`` at the corners of each triangle; ``faces`` where it is left out.
        colours: of the vertices instead of a texture; any number of channels.
        backgrounds: colours behind everything.
        near_plane, far_plane: range of camera z that is drawn; 0 < near_plane < far_plane.
        antialias: whether silhouettes are smoothed; without, vertices have no gradient there.
        neighbours: those of ``faces`` (:func:`lods.meshes.topology.neighbours`), found anew at each
            call where they are left out.
        backend: one of ``lods.meshes.backends.BACKENDS``.

    Returns the images, the alphas in 0..1, and ``info``: ``face`` (C, H, W), the triangle at the
    centre of each pixel or -1, ``weights`` (C, H, W, 3) of its corners and ``depth`` (C, H, W, 1),
    the camera's z there, 0 where nothing is. Images, alphas, weights and depths have gradients with
    respect to the vertices, the images also to texture, ``uv``, colours and backgrounds.

    Raises ``ValueError``, one line, for shapes that do not fit, indices that are out of range, and
    a backend that is unknown or not usable here.
    """
    uv_faces = faces if uv_faces is None else uv_faces
    _check(vertices, faces, viewmats, Ks, texture, uv, uv_faces, colours, backgrounds)
    if not 0 < near_plane < far_plane or width < 1 or height < 1:
        raise ValueError("width and height must be 1 or more, and 0 < near_plane < far_plane")
    device = vertices.device
    chosen = backends.get(backends.resolve_backend(backend, device))
    dtype = vertices.dtype if backend == "reference" else torch.float32
    viewmats, Ks = viewmats.to(vertices), Ks.to(vertices)
    points = torch.einsum("cij,vj->cvi", viewmats[:, :3, :3], vertices) + viewmats[:, None, :3, 3]
    points = points.to(dtype)
    if antialias and neighbours is None:
        neighbours = neighbours_of(faces)

    found = chosen.rasterize(points, faces, Ks, width, height, near_plane, far_plane)
    seen = (found.face >= 0).to(device, dtype)[..., None]
    if texture is not None:
        assert uv is not None
        places = chosen.interpolate(uv.to(dtype), uv_faces, found)
        image = chosen.sample(texture.to(dtype), places, found)
    else:
        assert colours is not None
        image = chosen.interpolate(colours.to(dtype), faces, found)
    drawn = torch.cat([image.to(device), seen], dim=-1)
    if antialias:
        drawn = chosen.antialias(drawn, found, points, faces, neighbours, Ks)
    image, alpha = drawn[..., :-1], drawn[..., -1:]
    if backgrounds is not None:
        image = image + (1 - alpha) * backgrounds[:, None, None].to(drawn)
    info = {
        "face": found.face.to(device),
        "weights": found.weights.to(device),
        "depth": found.depth.to(device)[..., None],
    }
    return image, alpha, info


def _check(vertices, faces, viewmats, Ks, texture, uv, uv_faces, colours, backgrounds) -> None:
    cameras, channels = len(viewmats), None
    if texture is not None:
        if uv is None or colours is not None:
            raise ValueError("a texture needs uv, and no colours beside it")
        if texture.ndim != 3 or not texture.numel():
            raise ValueError(f"texture must be (h, w, D), not {tuple(texture.shape)}")
        channels = texture.shape[2]
    elif colours is None or colours.ndim != 2:
        raise ValueError("give a texture with uv, or colours (V, D)")
    else:
        channels = colours.shape[1]
    expected = {
        "vertices": (vertices, (len(vertices), 3)),
        "faces": (faces, (len(faces), 3)),
        "viewmats": (viewmats, (cameras, 4, 4)),
        "Ks": (Ks, (cameras, 3, 3)),
        "uv": (uv, (len(uv) if uv is not None else 0, 2)),
        "uv_faces": (uv_faces, (len(faces), 3)),
        "colours": (colours, (len(vertices), channels)),
        "backgrounds": (backgrounds, (cameras, channels)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {shape}")
    lists = [("faces", faces, len(vertices))]
    if uv is not None:
        lists.append(("uv_faces", uv_faces, len(uv)))
    for name, indices, count in lists:
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < count):
            raise ValueError(f"{name} has indices that are not in 0..{count - 1}")
