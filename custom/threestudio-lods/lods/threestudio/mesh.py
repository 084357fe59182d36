"""A textured mesh as threestudio's geometry, renderer and exporter."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Float
from lods.gaussians.axes import PLY_AXES
from lods.gaussians.cameras import intrinsics, world_to_camera
from lods.meshes import backends
from lods.meshes.edited import Before, EditedTexture
from lods.meshes.initialize import (
    INIT_TYPES,
    MeshBallInit,
    MeshFileInit,
    MeshRunInit,
    initial_mesh,
)
from lods.meshes.parameters import MeshParameters
from lods.threestudio.regions import Region, inside
from lods.threestudio.renderer import DrawsSources, drawn
from omegaconf import ListConfig
from torch import Tensor

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.models.geometry.base import BaseGeometry
from threestudio.models.renderers.base import Rasterizer

FORMATS = ("glb", "obj")


@threestudio.register("lods-mesh")
class TexturedMeshGeometry(MeshParameters, BaseGeometry):
    """A mesh whose start is set in a configuration; see
    :class:`lods.meshes.parameters.MeshParameters` for the parameters."""

    @dataclass
    class Config(BaseGeometry.Config):
        init_type: Annotated[str, INIT_TYPES] = "ball"  # ball | file | run | none
        # texels a side of a texture that is made here; a file's own stays as it is
        texture_size: Annotated[int, "[16, 8192]"] = 512
        # the most texels a side of a file's own, which is halved until it has no more; 0: any
        most_texels: Annotated[int, "[0, 16384]"] = 0
        # texture coordinates of our own also where the file has some: for charts that overlap,
        # as of a part that is there twice, which else would be painted alike
        unwrap: bool = False
        # standard deviation in texels by which the texture's gradient is smoothed over the surface,
        # seams included: its noise stays out of the texture, and what is coarse is learned first;
        # 0: none
        texture_smoothing: Annotated[float, "[0, 64]"] = 0.0
        # whether vertices are trained too, at the rate of system.optimizer.params.geometry.vertices
        free_vertices: bool = False
        # the settings of each init_type: MeshBallInit, MeshFileInit and MeshRunInit in
        # lods/meshes/initialize.py
        ball: Annotated[dict, MeshBallInit] = field(default_factory=dict)
        file: Annotated[dict, MeshFileInit] = field(default_factory=dict)
        run: Annotated[dict, MeshRunInit] = field(default_factory=dict)

    cfg: Config

    def configure(self) -> None:
        mesh = initial_mesh(self.cfg)
        self.set_mesh(mesh, self.cfg.free_vertices)
        self.smooth_gradient(self.cfg.texture_smoothing)
        self.to(self.device)
        if len(mesh.faces):
            height, width = self.texture.shape[:2]
            threestudio.info(
                f"a mesh of {len(mesh.faces)} triangles with a texture of {width} x {height} "
                f"from init_type={self.cfg.init_type}"
            )


@threestudio.register("lods-edited-mesh")
class EditedMesh(EditedTexture, TexturedMeshGeometry):
    """A mesh of a file whose texture a method of :mod:`lods.methods.editing` changes: the system
    has renders of it as it was from :attr:`source`, for the same cameras. What is locked is said in
    :class:`lods.meshes.edited.EditedTexture`."""

    @dataclass
    class Config(Region, TexturedMeshGeometry.Config):
        """A texel is in the region if the point of the surface at its centre is."""

        def contradictions(self):
            """Fields that do not go together: (field, what is wrong)."""
            if self.free_vertices:
                yield "free_vertices", "=true: an edit changes the texture, and the shape stays"

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self.begin()
        if self.cfg.box is not None or self.cfg.mask is not None:
            points = self.points()
            found = inside(self.cfg, points, "system.geometry.", "texels of the surface")
            if self.charts is not None:
                free = torch.zeros_like(self.inside)
                free[self.charts.own] = found
                self.restrict(free)
        if len(self.faces):
            threestudio.info(f"{self.count} of {self.source.count} texels may change")


@threestudio.register("lods-mesh-rasterizer")
class MeshRasterizer(DrawsSources):
    """Rasterises a ``lods-mesh`` geometry; the background module paints what is behind."""

    @dataclass
    class Config(Rasterizer.Config):
        near_plane: Annotated[float, "(0, 1e6]"] = 0.01
        far_plane: Annotated[float, "(0, 1e12]"] = 100.0
        # whether silhouettes are smoothed; vertices have no gradient there without
        antialias: bool = True
        # auto | cpu | reference | nvdiffrast
        backend: Annotated[str, backends.BACKENDS] = "auto"

        def contradictions(self):
            """Fields that do not go together: (field, what is wrong)."""
            if self.near_plane >= self.far_plane:
                yield "far_plane", f"must be above near_plane={self.near_plane:g}"

    cfg: Config
    geometry: Any  # a MeshParameters

    geometry_needs = ("draw", "limit_colours")

    def _draw(self, mesh: Any, c2w: Tensor, fovy: Tensor, height: int, width: int, **more: Any):
        cfg = self.cfg
        return mesh.draw(
            world_to_camera(c2w),
            intrinsics(fovy, height, width),
            width,
            height,
            near_plane=cfg.near_plane,
            far_plane=cfg.far_plane,
            antialias=cfg.antialias,
            backend=cfg.backend,
            **more,
        )

    def draw(
        self,
        source: Before,
        texels: Float[Tensor, "N 3"],
        c2w: Float[Tensor, "B 4 4"],
        fovy: Float[Tensor, " B"],
        height: int,
        width: int,
    ) -> tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W 1"], dict[str, Any]]:
        """Images, opacities and ``info`` of what is edited, with these colours of its texels."""
        return self._draw(source, c2w, fovy, height, width, texels=texels)

    def picture(
        self, source: Any, c2w: Tensor, fovy: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        image, alpha, _ = self._draw(source, c2w, fovy, height, width)
        return image, alpha

    def forward(
        self,
        c2w: Float[Tensor, "B 4 4"],
        fovy: Float[Tensor, " B"],
        height: int,
        width: int,
        rays_d: Float[Tensor, "B H W 3"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Render all cameras in one call, as
        :meth:`lods.threestudio.renderer.GaussianRasterizer.forward` does; ``opacity`` is 0 or 1
        but for the share of a pixel at silhouettes, and ``info`` that of
        :func:`lods.meshes.rasterization`."""
        # projections lose too many bits in 16-bit floats
        with torch.autocast(c2w.device.type, enabled=False):
            c2w, fovy = c2w.float(), fovy.float()
            foreground, alpha, info = self._draw(self.geometry, c2w, fovy, height, width)
        return drawn(self.background, foreground, alpha, info["depth"], info, c2w, fovy, rays_d)


@threestudio.register("lods-mesh-exporter")
class TexturedMeshExporter(Exporter):
    """'glb': the mesh with its texture in one file, y up as glTF prescribes; 'obj': with its
    material and texture beside it (mesh.obj, mesh.mtl, mesh.png); one or a list of them."""

    @dataclass
    class Config(Exporter.Config):
        fmt: Any = field(default_factory=lambda: ["glb", "obj"])
        save_name: str = "mesh"
        # of an obj: a name, or file: in the space of the file that the mesh came from, as then is
        # the glb
        axes: Annotated[str, (*PLY_AXES, "file")] = "z-up"

        def contradictions(self):
            """Formats that there are not: (field, what is wrong)."""
            if wrong := _unknown(self.fmt):
                yield "fmt", wrong

    cfg: Config
    geometry: Any  # a MeshParameters

    geometry_needs = ("mesh", "draw")

    def configure(self, *args, **kwargs) -> None:
        super().configure(*args, **kwargs)
        if wrong := _unknown(self.cfg.fmt):  # upstream does not ask for contradictions
            raise ValueError(f"system.exporter.fmt {wrong}")

    def __call__(self) -> list[ExporterOutput]:
        mesh, axes = self.geometry.mesh(), self.cfg.axes
        placement = mesh.placement if axes == "file" else None
        outputs = []
        for fmt in _listed(self.cfg.fmt):
            named = None if fmt == "glb" or placement is not None else axes
            params = {"mesh": mesh, "axes": named, "placement": placement}
            outputs.append(ExporterOutput(f"{self.cfg.save_name}.{fmt}", "textured_mesh", params))
        return outputs


def _listed(fmt: Any) -> list[Any]:
    several = isinstance(fmt, (list, tuple, ListConfig))
    return list(fmt) if several else [fmt]


def _unknown(fmt: Any) -> str:
    """What is wrong with a format or a list of them; nothing if there are all."""
    for each in _listed(fmt):
        if each not in FORMATS:
            return f"has {str(each)[:40]!r}: the formats are {', '.join(FORMATS)}"
    return ""
