"""The surface of a geometry as a mesh file."""

import copy
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from PIL import Image

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.models.exporters.texture import fill_image, surface_points
from threestudio.models.exporters.unwrap_options import ChartOptions, PackOptions
from threestudio.models.mesh import Mesh
from threestudio.utils.errors import UserError
from threestudio.utils.ops import chunk_batch
from threestudio.utils.typing import *

FORMATS = ("obj-mtl", "obj", "glb", "ply")
GLB_COLORS = ("texture", "vertices")
AXES = {"z-up": [0, 1, 2], "y-up": [1, 2, 0]}  # an even order: a rotation
_CHUNK = 2**18  # points whose colours are computed at a time
_MAPS = {  # what materials export -> (entry of the .mtl, channels)
    "albedo": ("map_Kd", 3),
    "metallic": ("map_Pm", 1),
    "roughness": ("map_Pr", 1),
    "bump": ("map_Bump", 3),
}


@threestudio.register("mesh-exporter")
class MeshExporter(Exporter):
    """The mesh of ``geometry.isosurface()``, coloured by ``material.export(points,
    **geometry.export(points))``.

    - ``obj-mtl``: Wavefront with texture images, unwrapped by xatlas
    - ``glb``: one file with the material's ``albedo`` as a texture, on a surface with fewer
      triangles, or with ``glb_colors`` 'vertices' at the vertices
    - ``obj``, ``ply``: the ``albedo`` at the vertices

    The material's colours are taken as they are rendered, that is as they are shown (sRGB).
    Textures, ``obj`` and ``ply`` have them so; at the vertices of a ``glb``, where colours are
    light, they are converted, and there are always normals and a material without gloss, so that
    viewers show what was rendered. Axes are threestudio's: z up, azimuth 0 on +x; with ``axes``
    'y-up' those of most other programs: y up, the front on +z, so (x, y, z) becomes (y, z, x). A
    ``glb`` is always so, as glTF prescribes.

    Everything runs on any device, without a rasteriser of the GPU.
    """

    @dataclass
    class Config(Exporter.Config):
        fmt: Annotated[str, FORMATS] = "obj-mtl"  # one of FORMATS
        save_name: str = "model"
        axes: Annotated[str, tuple(AXES)] = "z-up"  # or y-up; a glb is always y up
        save_normal: bool = False  # a glb always has them
        save_uv: bool = True  # obj-mtl and obj
        save_texture: bool = True  # images for obj-mtl, vertex colours for the others
        texture_size: Annotated[int, "[1, 16384]"] = 1024
        glb_colors: Annotated[str, GLB_COLORS] = "texture"  # or vertices
        # of a glb with a texture: the most triangles, since many take many minutes to be unwrapped;
        # 0: those of the isosurface
        texture_faces: Annotated[int, "[0, 1e9]"] = 12000
        texture_format: str = "jpg"
        xatlas_chart_options: Annotated[dict, ChartOptions] = field(default_factory=dict)
        # with a texture, padding is 4 and resolution is texture_size unless they are given here
        xatlas_pack_options: Annotated[dict, PackOptions] = field(default_factory=dict)
        context_type: str = "gl"  # of upstream's rasteriser; accepted and without effect

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            if self.fmt == "obj-mtl" and self.save_texture and not self.save_uv:
                yield (
                    "save_texture",
                    "needs save_uv: set save_uv=true, or save_texture=false, or fmt=obj for "
                    "colours at the vertices",
                )
            if Image.registered_extensions().get(f".{self.texture_format}") not in Image.SAVE:
                yield (
                    "texture_format",
                    f"={self.texture_format!r} cannot be written: use jpg or png",
                )

    cfg: Config
    formats = FORMATS  # for code that has to work with upstream's exporter, which has two of them

    geometry_needs = ("isosurface",)

    def __call__(self) -> List[ExporterOutput]:
        if not hasattr(self.geometry, "isosurface"):
            raise UserError(
                f"mesh-exporter cannot mesh a {type(self.geometry).__name__}, which has no "
                "isosurface: set system.exporter_type to an exporter for it"
            )
        mesh: Mesh = self.geometry.isosurface()
        if self.cfg.fmt == "obj-mtl":
            return [self._textured_obj(mesh)]
        if self.cfg.fmt == "glb" and self.cfg.save_texture and self.cfg.glb_colors == "texture":
            return [self._textured_glb(mesh)]
        if self.cfg.save_texture:
            threestudio.info("Colouring the vertices ...")
            colors = self._colors(mesh.v_pos)
            if "albedo" in colors:
                mesh.set_vertex_color(colors["albedo"])
        return [self._obj(mesh) if self.cfg.fmt == "obj" else self._file(mesh)]

    @torch.no_grad()
    def _colors(self, points: Float[Tensor, "N 3"]) -> Dict[str, Float[Tensor, "N C"]]:
        """What the material exports at points of the surface, as far as files have a place for
        it. A warning says when there is no colour."""

        def at(points):
            features = self.geometry.export(points=points)
            if not features:
                return {}
            exported = self.material.export(points=points, **features)
            return {key: exported[key].float() for key in _MAPS if key in exported}

        colors = chunk_batch(at, _CHUNK, points)
        if "albedo" not in colors:
            threestudio.warn(
                "the geometry and material export no albedo: the mesh is written without colours"
            )
        return colors

    def _unwrap(self, mesh: Mesh) -> None:
        packing = {"padding": 4, "resolution": self.cfg.texture_size}
        mesh.unwrap_uv(self.cfg.xatlas_chart_options, {**packing, **self.cfg.xatlas_pack_options})

    def _maps(self, mesh: Mesh) -> Dict[str, Float[np.ndarray, "S S C"]]:
        """The images of what the material exports, by the entries of an .mtl."""
        size, maps = self.cfg.texture_size, {}
        threestudio.info(f"Painting the texture, {size} x {size} ...")
        arrays = (mesh.v_pos, mesh.t_pos_idx, mesh.v_tex, mesh.t_tex_idx)
        texels, points = surface_points(*[a.cpu().numpy() for a in arrays], size)
        colors = self._colors(torch.from_numpy(points).to(mesh.v_pos))
        for key, value in colors.items():
            entry, channels = _MAPS[key]
            value = value.reshape(len(value), -1)[:, :channels].cpu().numpy()
            maps[entry] = fill_image(value, texels, size)
        return maps

    def _textured_glb(self, mesh: Mesh) -> ExporterOutput:
        cfg = self.cfg
        mesh = mesh.simplified(cfg.texture_faces)
        self._unwrap(mesh)
        params = file_arrays(mesh, "glb")
        params |= {"v_tex": mesh.v_tex, "t_tex_idx": mesh.t_tex_idx}
        params["texture"] = self._maps(mesh).get("map_Kd")
        return ExporterOutput(f"{cfg.save_name}.glb", "mesh", params)

    def _textured_obj(self, mesh: Mesh) -> ExporterOutput:
        cfg, maps = self.cfg, {}
        if cfg.save_uv:
            self._unwrap(mesh)
        if cfg.save_texture:
            maps = self._maps(mesh)
        params = {
            "mesh": turned(mesh, cfg.axes),
            "save_mat": True,
            "save_normal": cfg.save_normal,
            "save_uv": cfg.save_uv,
            "save_vertex_color": False,
            "map_format": cfg.texture_format,
            **maps,
        }
        return ExporterOutput(f"{cfg.save_name}.obj", "obj", params)

    def _obj(self, mesh: Mesh) -> ExporterOutput:
        cfg = self.cfg
        if cfg.save_uv:
            mesh.unwrap_uv(cfg.xatlas_chart_options, cfg.xatlas_pack_options)
        params = {
            "mesh": turned(mesh, cfg.axes),
            "save_mat": False,
            "save_normal": cfg.save_normal,
            "save_uv": cfg.save_uv,
            "save_vertex_color": mesh.v_rgb is not None,
        }
        return ExporterOutput(f"{cfg.save_name}.obj", "obj", params)

    def _file(self, mesh: Mesh) -> ExporterOutput:
        params = file_arrays(mesh, self.cfg.fmt, self.cfg.save_normal, self.cfg.axes)
        return ExporterOutput(f"{self.cfg.save_name}.{self.cfg.fmt}", "mesh", params)


def turned(mesh: Mesh, axes: str) -> Mesh:
    """The mesh in other axes, one of AXES, with its texture coordinates and colours."""
    if axes == "z-up":
        return mesh
    other = copy.copy(mesh)
    other.v_pos = mesh.v_pos[:, AXES[axes]]
    other._v_nrm = None if mesh._v_nrm is None else mesh._v_nrm[:, AXES[axes]]
    other._v_tng = None
    return other


def file_arrays(
    mesh: Mesh, fmt: str, save_normal: bool = False, axes: str = "z-up"
) -> Dict[str, Any]:
    """The arguments of ``save_mesh`` for a 'glb', which is y up and has normals whatever is asked
    for, or a 'ply'."""
    mesh = turned(mesh, "y-up" if fmt == "glb" else axes)
    return {
        "v_pos": mesh.v_pos,
        "t_pos_idx": mesh.t_pos_idx,
        "v_nrm": mesh.v_nrm if save_normal or fmt == "glb" else None,
        "v_rgb": mesh.v_rgb,
    }
