"""Gaussians as files that viewers open."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from lods.assets.baking import bake, nearest_normals, simplified
from lods.assets.mesh import Mesh as Asset
from lods.gaussians.axes import PLY_AXES
from lods.gaussians.surface import PICTURE, shape, surface
from lods.preflight import unknown_export
from omegaconf import ListConfig

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.models.mesh import Mesh

FORMATS = {  # each of lods.preflight.EXPORTS -> (ending of the file, save_<type> of the system)
    "ply": (".ply", "gaussian_ply"),
    "points": ("-points.ply", "point_ply"),
    "glb": (".glb", "gaussian_mesh"),
    "splat": (".splat", "gaussian_file"),
    "compressed-ply": (".compressed.ply", "gaussian_file"),
    "spz": (".spz", "gaussian_file"),
}
GLB_COLORS = ("texture", "vertices")
MOST_PIXELS = 1024  # along each side of the renders that the colours of a texture are of


@threestudio.register("lods-gaussian-exporter")
class GaussianExporter(Exporter):
    """'ply': all parameters in the standard 3DGS layout; 'points': centres and colours only;
    'glb': a coloured mesh, where the Gaussians stop the light (see :mod:`lods.gaussians.surface`),
    with a texture or with colours at its vertices; 'splat', 'compressed-ply', 'spz': smaller files
    of Gaussians for viewers, whose values are rounded (see :mod:`lods.gaussians.files`).

    The files of Gaussians and points are in threestudio's axes, z up and the front on +x, or with
    ``axes`` 'y-down' as 3DGS has them, whose viewers then show the object upright: x right, y down,
    the front on -z. A glb is always y up with the front on +z, as glTF prescribes, and so is an
    spz."""

    @dataclass
    class Config(Exporter.Config):
        fmt: Any = field(default_factory=lambda: ["ply", "points"])  # one or a list of FORMATS
        save_name: str = "gaussians"
        # of all but glb and spz: z-up, to go on from, or y-down, for 3DGS viewers
        axes: Annotated[str, tuple(PLY_AXES)] = "z-up"
        # glb: points of the grid along each axis, and the share of the light, 0..1, that is stopped
        # where the surface is; or, if given, the density there
        mesh_resolution: Annotated[int, "[8, 2048]"] = 128
        mesh_opacity: Annotated[float, "(0, 1)"] = 0.15
        mesh_threshold: Annotated[float | None, "(0, inf)"] = None
        # glb: a texture, which keeps fine detail on few triangles, or colours at the vertices; the
        # texture's side in texels (it is of renders with three quarters as many pixels), and the
        # most triangles under it (0: those of the grid, which can take many minutes to be laid out)
        glb_colors: Annotated[str, GLB_COLORS] = "texture"
        texture_size: Annotated[int, "[16, 8192]"] = 512
        texture_faces: Annotated[int, "[0, 1e8]"] = 12000

        def contradictions(self):
            """Formats that there are not: (field, what is wrong)."""
            if wrong := unknown_export(self.fmt):
                yield "fmt", wrong

    cfg: Config

    geometry_needs = ("gaussians", "base_colors")

    def configure(self, *args, **kwargs) -> None:
        super().configure(*args, **kwargs)
        several = isinstance(self.cfg.fmt, (list, tuple, ListConfig))
        self.formats = list(self.cfg.fmt) if several else [self.cfg.fmt]
        if wrong := unknown_export(self.formats):  # upstream does not ask for contradictions
            raise ValueError(f"system.exporter.fmt {wrong}")

    def _mesh(self) -> dict[str, Any]:
        """The arguments of the system's ``save_gaussian_mesh``."""
        cfg = self.cfg
        threestudio.info("making a mesh of the Gaussians, which can take a minute")
        level = cfg.mesh_resolution, cfg.mesh_opacity, cfg.mesh_threshold
        if cfg.glb_colors == "vertices":
            found = surface(self.geometry, *level)
            mesh = Mesh(found.vertices, found.faces)
            mesh.set_vertex_color(found.rgb)
            return {"mesh": mesh}
        pixels = min(max(PICTURE, cfg.texture_size * 3 // 4), MOST_PIXELS)
        found, colours_at = shape(self.geometry, *level, pixels=pixels)
        vertices, faces = simplified(found.vertices, found.faces, cfg.texture_faces)
        normals = nearest_normals(found)
        asset = bake(
            Asset(vertices, faces),
            lambda points, _: colours_at(points, normals(points)),
            cfg.texture_size,
        )
        mesh = Mesh(asset.vertices, asset.faces)
        mesh._v_nrm = normals(asset.vertices)
        return {"mesh": mesh, "uv": asset.uv, "texture": asset.texture}

    def __call__(self) -> list[ExporterOutput]:
        outputs = []
        for fmt in self.formats:
            ending, save_type = FORMATS[fmt]
            if save_type in ("gaussian_ply", "gaussian_file"):
                params = {**self.geometry.export(), "axes": self.cfg.axes}
            elif fmt == "glb":
                try:
                    params = self._mesh()
                except ValueError as error:
                    if len(self.formats) == 1:
                        raise
                    threestudio.warn(f"no glb beside the other formats: {error}")
                    continue
            else:
                params = {"xyz": self.geometry.means, "rgb": self.geometry.base_colors()}
                params["axes"] = self.cfg.axes
            outputs.append(ExporterOutput(self.cfg.save_name + ending, save_type, params))
        return outputs
