"""A textured mesh as the parameters of a module."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from jaxtyping import Float, Int
from lods.assets import Mesh, Placement
from lods.gaussians.cameras import intrinsics, world_to_camera
from lods.meshes.charts import Charts, charts_of, filled, smaller, with_unseen
from lods.meshes.rasterize import rasterization
from lods.meshes.regularize import laplacian, normal_consistency, smoothed
from lods.meshes.topology import neighbours, weld
from torch import Tensor

PLAIN = 1 / 512  # half a step of 8 bits: what differs by no more is of one colour
# name -> (dimensions, sizes of the last ones, whether it holds indices)
STORED: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "vertices": (2, (3,), False),
    "texture": (3, (3,), False),
    "start": (2, (3,), False),
    "start_texture": (3, (3,), False),
    "faces": (2, (3,), True),
    "uv": (2, (2,), False),
    "uv_faces": (2, (3,), True),
    "placement": (1, (13,), False),
}


class MeshParameters(nn.Module):
    """What a module with a textured mesh can do, whoever makes it.

    Parameters, directly on the module (so that an optimizer names them ``geometry.texture`` and so
    on): ``vertices`` (V, 3) in world units, and ``texture`` (H, W, 3), shown colours (sRGB) 0..1,
    row 0 at the top. Buffers: ``start`` (V, 3) and ``start_texture`` (H, W, 3), the vertices and
    the texture before training; ``faces`` (F, 3); texture coordinates ``uv`` (T, 2), the origin at
    the lower left, and ``uv_faces`` (F, 3), which index them. A vertex on a seam of the texture is
    there once, so that no training tears a seam.
    ``placement`` (13,) has the numbers of a :class:`lods.assets.Placement`: where the mesh stood in
    its file.

    All of them are in the state dict; loading one takes over the mesh that is stored in it.

    Of the texture only the texels that belong to a chart are trained (:class:`.charts.Charts`). The
    others go with the borders of the charts, in what is drawn as in what is written: see
    :meth:`shown_texture`.
    """

    vertices: nn.Parameter
    texture: nn.Parameter
    start: Tensor
    start_texture: Tensor
    faces: Tensor
    uv: Tensor
    uv_faces: Tensor
    placement: Tensor

    def set_mesh(self, mesh: Mesh, free_vertices: bool = False) -> None:
        """Take this mesh, which has ``uv`` and a texture. Vertices at the same place become one.
        ``free_vertices``: whether they are trained; else they take no gradient."""
        if mesh.uv is None or mesh.texture is None:
            raise ValueError("the mesh has no texture: see lods.meshes.initialize.textured")
        places, index = weld(mesh.vertices.detach().cpu().float())
        self.vertices = nn.Parameter(places.clone(), requires_grad=free_vertices)
        self.texture = nn.Parameter(mesh.texture.detach().cpu().float().clone())
        faces = mesh.faces.detach().cpu().long()
        buffers = {"start": places, "start_texture": self.texture.detach(), "faces": index[faces]}
        buffers["uv"] = mesh.uv.detach().cpu().float()
        stood = mesh.placement or Placement.none()
        numbers = np.concatenate([[stood.scale], stood.rotation.ravel(), stood.shift])
        buffers |= {"uv_faces": faces, "placement": torch.from_numpy(numbers)}
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())
        self._neighbours: Tensor | None = None
        self._charts: tuple[Charts | None] | None = None

    @property
    def charts(self) -> Charts | None:
        """The charts of the texture, see :func:`lods.meshes.charts.charts_of`."""
        if self._charts is None:
            size = self.texture.shape[:2]
            self._charts = (charts_of(self.start, self.faces, self.uv, self.uv_faces, *size),)
        (found,) = self._charts
        if found is not None and found.number.device != self.texture.device:
            found = found.to(self.texture.device)
            self._charts = (found,)
        return found

    @property
    def neighbours(self) -> Int[Tensor, "F 3"]:
        """Those of ``faces``, see :func:`lods.meshes.topology.neighbours`."""
        if self._neighbours is None or self._neighbours.device != self.faces.device:
            self._neighbours = neighbours(self.faces)
        return self._neighbours

    def smooth_gradient(self, sigma: float) -> None:
        """From now on the texture's gradient is smoothed over the surface, see
        :meth:`lods.meshes.charts.Charts.smoothed`; 0: as it is."""

        def smooth(gradient: Tensor) -> Tensor:
            charts = self.charts
            return smoothed(gradient, sigma) if charts is None else charts.smoothed(gradient, sigma)

        if sigma > 0:
            self.texture.register_hook(smooth)

    def shown_texture(self, complete: bool = False) -> Float[Tensor, "H W 3"]:
        """What is drawn: ``texture``, and beside the charts the colours of their borders, where
        these have changed (:func:`lods.meshes.charts.filled`), so that no filter finds there what
        was never trained. A texture that repeats is drawn as it is. ``complete``: with what
        :meth:`fill_unseen` would fill, and without a gradient."""
        charts, texture = self.charts, self._complete() if complete else self.texture
        return texture if charts is None else filled(texture, self.start_texture, charts)

    @torch.no_grad()
    def fill_unseen(self) -> None:
        """In place, after the training, before what is final is drawn (a file has it in any case):
        where the texture was of one colour at the start, texels that no view has changed take the
        colours of those nearest on the surface that some have
        (:func:`lods.meshes.charts.with_unseen`). A texture that had something to show keeps it."""
        self.texture.copy_(self._complete())

    def _complete(self) -> Tensor:
        charts, start, texture = self.charts, self.start_texture, self.texture.detach()
        if charts is None or (start - start[0, 0]).abs().max() > PLAIN:
            return texture
        mesh = self.vertices, self.faces, self.uv, self.uv_faces
        return with_unseen(texture, start, charts, *mesh)

    @torch.no_grad()
    def limit_colours(self) -> None:
        """texture <- min(max(texture, 0), 1), in place, after a step of the optimizer."""
        self.texture.clamp_(0, 1)

    def laplacian(self) -> Float[Tensor, ""]:
        """See :func:`lods.meshes.regularize.laplacian`."""
        return laplacian(self.vertices, self.start, self.faces)

    def normal_consistency(self) -> Float[Tensor, ""]:
        """See :func:`lods.meshes.regularize.normal_consistency`."""
        return normal_consistency(self.vertices, self.faces, self.neighbours)

    def draw(
        self,
        viewmats: Float[Tensor, "C 4 4"],
        Ks: Float[Tensor, "C 3 3"],
        width: int,
        height: int,
        texture: Float[Tensor, "h w 3"] | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "C H W 3"], Float[Tensor, "C H W 1"], dict[str, Any]]:
        """Images, alphas and ``info`` of :func:`lods.meshes.rasterization`, which takes the
        ``options``; with another ``texture`` of the same size, if given. Of one with two texels a
        pixel or more a smaller copy is drawn (:func:`lods.meshes.charts.smaller`): it neither
        aliases, nor has texels between those that pixels look up, which nothing would train."""
        texture = self.shown_texture() if texture is None else texture
        if level := self._level(viewmats, Ks):
            texture = smaller(texture, level)
        return rasterization(
            self.vertices,
            self.faces,
            viewmats,
            Ks,
            width,
            height,
            texture=texture,
            uv=self.uv,
            uv_faces=self.uv_faces,
            neighbours=self.neighbours,
            **options,
        )

    @torch.no_grad()
    def _level(self, viewmats: Float[Tensor, "C 4 4"], Ks: Float[Tensor, "C 3 3"]) -> int:
        """How many times the texture may be halved until its texels are as large as the pixels, at
        the middle of the mesh, the mean over the cameras."""
        charts = self.charts
        if charts is None or not charts.texel > 0 or not len(viewmats):
            return 0
        low, high = self.start.aminmax(dim=0)
        depth = viewmats[:, 2, :3].to(low) @ ((low + high) / 2) + viewmats[:, 2, 3].to(low)
        texels = float((depth.clamp_min(0) / Ks[:, 1, 1].to(low)).mean()) / charts.texel
        most = max(self.texture.shape[:2]).bit_length() - 1
        return min(most, int(math.log2(texels))) if 2 <= texels < math.inf else 0

    @torch.no_grad()
    def mesh(self) -> Mesh:
        """The mesh as a file holds it: a vertex on a seam is there once for each of its places in
        the texture. On the CPU, with its placement."""
        pairs = torch.stack([self.faces, self.uv_faces], dim=-1).view(-1, 2)
        pairs, index = torch.unique(pairs, dim=0, return_inverse=True)
        return Mesh(
            self.vertices.detach()[pairs[:, 0]].cpu(),
            index.view(-1, 3).cpu(),
            self.uv[pairs[:, 1]].cpu(),
            self.shown_texture(complete=True).clamp(0, 1).cpu(),
            placement=self._placement(),
        )

    def _placement(self) -> Placement:
        scale, *rest = self.placement.cpu().double().tolist()
        return Placement(scale, np.array(rest[:9]).reshape(3, 3), np.array(rest[9:]))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        found = {name: state_dict[prefix + name] for name in STORED if prefix + name in state_dict}
        for name, value in found.items():
            _refuse(prefix + name, value, *STORED[name])
        if "texture" in found and "start_texture" not in found:
            # of a run from before there was one: all of it counts as trained
            found["start_texture"] = torch.full_like(found["texture"], 0.5)
            state_dict[f"{prefix}start_texture"] = found["start_texture"]
        for indices, of in (("faces", "vertices"), ("uv_faces", "uv")):
            if indices in found and of in found:
                values, count = found[indices], len(found[of])
                if len(values) and not (int(values.min()) >= 0 and int(values.max()) < count):
                    raise ValueError(
                        f"the checkpoint's {prefix}{indices} point beyond its {count} {of}"
                    )
        for one, other in (("faces", "uv_faces"), ("vertices", "start")):
            if one in found and other in found and len(found[one]) != len(found[other]):
                raise ValueError(
                    f"the checkpoint's {prefix}{one} and {other} do not agree in number"
                )
        if "texture" in found and not found["texture"].numel():
            raise ValueError(f"the checkpoint's {prefix}texture is empty")
        if "texture" in found and found["texture"].shape != found["start_texture"].shape:
            raise ValueError(
                f"the checkpoint's {prefix}texture and start_texture do not agree in size"
            )
        for name, value in found.items():
            target = getattr(self, name)
            # the object stays the same, so an existing optimizer keeps pointing at it
            target.data = target.data.new_empty(value.shape)
        self._neighbours = self._charts = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _refuse(key: str, value: Any, dimensions: int, last: tuple[int, ...], indices: bool) -> None:
    """Raise ValueError for a stored value that no mesh has."""
    kind = isinstance(value, Tensor) and (
        value.dtype == torch.int64 if indices else value.is_floating_point()
    )
    if not kind or value.ndim != dimensions or tuple(value.shape[-len(last) :]) != last:
        raise ValueError(f"the checkpoint's {key} is no part of a mesh")
    # a view that repeats one number can claim any size; it would be allocated
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"the checkpoint's {key} claims more values than the file holds")
    if not indices and not torch.isfinite(value).all():
        raise ValueError(f"the checkpoint's {key} has values that are not finite")


class TexturedMesh(MeshParameters):
    """A mesh to draw, to train and to write, without a host:

    mesh = TexturedMesh.file("chair.obj", texture_size=512)
    images, alphas, info = mesh.render(lods.gaussians.orbit(8, distance=2.5))
    mesh.write("result.glb")
    """

    def __init__(self, mesh: Mesh, free_vertices: bool = False, device: Any = "cpu") -> None:
        """``mesh``: with ``uv`` and a texture, which are copied."""
        super().__init__()
        self.set_mesh(mesh, free_vertices)
        self.to(device)

    @classmethod
    def file(
        cls, path: str | Path, half_side: float = 0.0, texture_size: int = 512, **options: Any
    ) -> "TexturedMesh":
        """That of a file, see :class:`lods.meshes.initialize.MeshFileInit`; where the file has no
        texture, its colours become one of ``texture_size`` texels a side. ``options``: those of
        the constructor."""
        from lods.meshes.initialize import MeshFileInit, textured

        return cls(textured(MeshFileInit(str(path), half_side).load(), texture_size), **options)

    @classmethod
    def ball(
        cls, radius: float = 0.6, subdivisions: int = 4, texture_size: int = 512, **options: Any
    ) -> "TexturedMesh":
        """A grey ball around the origin, of 20 * 4^``subdivisions`` triangles."""
        from lods.meshes.initialize import MeshBallInit, textured

        return cls(textured(MeshBallInit(radius, subdivisions).load(), texture_size), **options)

    def render(
        self,
        c2w: Float[Tensor, "C 4 4"],
        width: int = 256,
        height: int = 256,
        fovy: float = 40.0,
        **options: Any,
    ) -> tuple[Float[Tensor, "C H W 3"], Float[Tensor, "C H W 1"], dict[str, Any]]:
        """What cameras see: images, alphas and ``info`` of :func:`lods.meshes.rasterization`, which
        takes the ``options``.

        ``c2w``: camera to world with OpenGL's axes (x right, y up, z backward), as
        :func:`lods.gaussians.orbit` makes them; ``fovy``: vertical field of view in degrees.
        """
        c2w = c2w.to(self.texture)
        K = intrinsics(torch.deg2rad(c2w.new_full((len(c2w),), fovy)), height, width)
        return self.draw(world_to_camera(c2w), K, width, height, **options)

    def groups(self, texture: float = 0.01, vertices: float = 1e-4) -> list[dict[str, Any]]:
        """Groups for an optimizer with these learning rates; without the vertices if they are not
        free."""
        rates = {"texture": texture, "vertices": vertices}
        return [
            {"params": [value], "lr": rates[name], "name": name}
            for name in rates
            if (value := getattr(self, name)).requires_grad
        ]

    def write(self, path: str | Path, axes: str | None = None, in_place: bool = False) -> None:
        """Write a glb, obj, ply or stl; see :func:`lods.assets.write`. ``in_place``: in the space
        of the file that the mesh came from, instead of ``axes``."""
        from lods.assets import write

        mesh = self.mesh()
        write(path, mesh, axes, mesh.placement if in_place else None)
