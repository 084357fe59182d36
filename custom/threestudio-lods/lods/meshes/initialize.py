"""Where a textured mesh starts: a file, the surface of a run, or a ball."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from lods.assets import Mesh
from lods.gaussians.axes import AXES, PLY_AXES
from lods.meshes.charts import smaller
from lods.settings import make

INIT_TYPES = ("ball", "file", "run", "none")


@dataclass
class MeshBallInit:
    """A ball of even triangles (an icosphere), mid grey."""

    radius: Annotated[float, "(0, 1e6]"] = 0.6  # world units
    subdivisions: Annotated[int, "[0, 8]"] = 4  # 20 * 4^n triangles

    def load(self) -> Mesh:
        """The ball."""
        import trimesh

        ball = trimesh.creation.icosphere(subdivisions=self.subdivisions, radius=self.radius)
        return Mesh(
            torch.from_numpy(np.array(ball.vertices, np.float32)),
            torch.from_numpy(np.array(ball.faces, np.int64)),
        )


@dataclass
class MeshFileInit:
    """A mesh (glb, gltf, obj, ply, stl or off) with its texture or its colours."""

    path: str = ""
    # above 0: centre the mesh, and make the longest half side of its box so many world units
    half_side: Annotated[float, "[0, 1e6]"] = 0.0
    # the file's axes that shall face azimuth 0 and point up; auto: +z and +y for glTF, as its
    # specification says, else +x and +z
    front: Annotated[str, ("auto", *AXES)] = "auto"
    up: Annotated[str, ("auto", *AXES)] = "auto"

    def load(self) -> Mesh:
        """The file's mesh in the world, read by :func:`lods.assets.read`. Raises ``ValueError``,
        one line, for a file that is not there, cannot be read, or holds no triangles."""
        if not self.path:
            raise ValueError("init_type=file needs system.geometry.file.path=<mesh>")
        from lods.assets import read  # which imports what compiles

        own = PLY_AXES["y-up" if self.path.lower().endswith((".glb", ".gltf")) else "z-up"]
        asked = zip((self.front, self.up), own, strict=True)
        front, up = (default if name == "auto" else name for name, default in asked)
        mesh = read(self.path, (front, up), self.half_side or None)
        if not isinstance(mesh, Mesh):
            raise ValueError(
                f"'{self.path}' holds Gaussians: make a mesh of them first, by "
                "system.exporter.fmt=glb of a run that has them"
            )
        return mesh


@dataclass
class MeshRunInit:
    """What a run, of Gaussians, of a radiance field or of a mesh, has exported as a glb: its
    surface with a texture, where and as large as it is in the run."""

    path: str = ""  # the folder of the run

    def load(self) -> Mesh:
        """The mesh. Raises ``ValueError``, one line, for a folder that is no run's, or of a run
        that has exported no glb."""
        if not self.path:
            raise ValueError("init_type=run needs system.geometry.run.path=<folder of a run>")
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"system.geometry.run.path: there is no folder '{folder}'")
        found = exported_glb(folder)
        if found is None:
            raise ValueError(
                f"'{folder}' holds no exported glb: lods export {folder} --format glb makes one"
            )
        return MeshFileInit(str(found)).load()


def exported_glb(run: Path) -> Path | None:
    """The glb in the folder of a run that was exported at the latest step, of several the newest;
    None where there is none."""
    found = []
    for path in run.glob("save/it*-export/*.glb"):
        step = re.fullmatch(r"it(\d{1,12})-export", path.parent.name)
        if step and path.is_file():
            found.append((int(step[1]), path.stat().st_mtime, path))
    return max(found)[2] if found else None


def textured(mesh: Mesh, size: int, unwrap: bool = False) -> Mesh:
    """The mesh with a texture. One that has ``uv`` and a texture stays as it is, unless ``unwrap``
    asks for charts of its own, as a mesh needs whose charts overlap or repeat.

    Else xatlas cuts the surface into charts that do not overlap, in a texture of ``size`` texels a
    side, which gets the colours that the mesh has: those of the old texture, or those of the
    vertices, or mid grey.
    """
    if mesh.uv is not None and mesh.texture is not None and not unwrap:
        return mesh
    from lods.assets.baking import spread, texels_of, unwrapped
    from lods.assets.mesh import sampled
    from lods.meshes.topology import weld

    # where the old texture has seams the surface has none
    places, index = weld(mesh.vertices)
    origin, faces, uv = unwrapped(places, index[mesh.faces], size)
    face, weights = texels_of(uv, faces, size, size)
    known = face >= 0
    corners = mesh.faces[torch.from_numpy(face[known])]
    share = torch.from_numpy(weights[known]).float()[..., None]
    if mesh.uv is not None and mesh.texture is not None:
        painted = sampled(mesh.texture, (mesh.uv[corners] * share).sum(1))
    else:
        painted = (mesh.shown_colours()[corners] * share).sum(1)
    image = np.full((size, size, 3), 0.5, np.float32)
    image[known] = painted.clamp(0, 1).numpy()
    texture = torch.from_numpy(np.ascontiguousarray(spread(image, known)))
    return Mesh(places[origin], faces, uv, texture, placement=mesh.placement)


def initial_mesh(cfg: Any, where: str = "system.geometry.") -> Mesh:
    """The mesh that a configuration with the fields of ``lods-mesh`` asks for; with ``init_type``
    'none' one without triangles (a checkpoint fills it in). ``where`` stands before the fields'
    names in messages."""
    # both blocks are looked at, so that a misspelt key is found whichever source is chosen
    ball = make(MeshBallInit, cfg.ball, f"{where}ball.")
    file = make(MeshFileInit, cfg.file, f"{where}file.")
    run = make(MeshRunInit, cfg.run, f"{where}run.")
    if cfg.init_type == "none":
        nothing = torch.zeros(0, 3)
        return Mesh(nothing, nothing.long(), nothing[:, :2], torch.zeros(1, 1, 3))
    if cfg.init_type not in INIT_TYPES:
        known = ", ".join(INIT_TYPES)
        raise ValueError(f"{where}init_type='{cfg.init_type}' is unknown: use one of {known}")
    mesh = {"ball": ball, "file": file, "run": run}[cfg.init_type].load()
    own = mesh.texture is not None and mesh.uv is not None and not cfg.unwrap
    mesh = textured(mesh, cfg.texture_size, cfg.unwrap)
    if own and cfg.most_texels and mesh.texture is not None:
        level, side = 0, max(mesh.texture.shape[:2])
        while side >> level > cfg.most_texels:
            level += 1
        mesh.texture = smaller(mesh.texture, level) if level else mesh.texture
    return mesh
