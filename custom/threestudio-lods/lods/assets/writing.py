"""Writing assets for other programs."""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from lods import log
from lods.assets.mesh import Mesh
from lods.assets.placement import Placement
from lods.files import whole_file
from lods.gaussians.axes import PLY_AXES, axes_rotation
from lods.gaussians.files import write_gaussians
from lods.gaussians.parameters import GaussianParameters

MESH_ENDINGS = (".glb", ".obj", ".ply", ".stl")
MAX_MATERIAL = 1 << 20  # characters of a material that are looked through


def write(
    path: str | Path,
    asset: GaussianParameters | Mesh,
    axes: str | None = None,
    placement: Placement | None = None,
) -> None:
    """Write an asset in the format of the name's ending: Gaussians as ``.ply`` (3DGS, every bit),
    ``.compressed.ply``, ``.splat`` or ``.spz`` (rounded); a mesh as ``.glb`` (with its texture, or
    with vertex colours), ``.obj`` (with a material and its texture beside it), ``.ply`` (vertex
    colours) or ``.stl`` (no colours).

    Args:
        axes: of the file, a name of :data:`lods.gaussians.axes.PLY_AXES`; by default z-up, except
            for glb and spz, which are y-up always.
        placement: that of the asset that this one came from: the file is then in that one's own
            space, whatever its axes were.

    Triangles and Gaussians that are not finite are left out with a warning.

    Raises:
        ValueError: one line, for an ending or axes that do not go with the asset, for an asset
            with nothing to write, and where an obj would go over a picture that is not its own.
        OSError: the file cannot be written. What was there is as it was.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if axes is not None and axes not in PLY_AXES:
        raise ValueError(f"axes={axes!r}: give {', '.join(PLY_AXES)}")
    fixed = suffix in (".glb", ".spz")
    if fixed and axes not in (None, "y-up"):
        raise ValueError(f"'{path}': a {suffix[1:]} is y-up always")
    if placement is not None and axes is not None:
        raise ValueError("give axes or a placement: a placement brings the axes of its file")
    if isinstance(asset, Mesh) and suffix not in MESH_ENDINGS:
        raise ValueError(f"'{path}': a mesh is written as {', '.join(MESH_ENDINGS)}")
    name = "y-up" if fixed else axes or "z-up"
    if not isinstance(asset, Mesh):
        tensors = asset.export()
        if placement is not None:
            tensors = placement.undo(tensors)
            if not fixed:
                name = _name_of(placement.rotation)
            # which the writer turns back, so that the file says its axes
            upright = Placement(1.0, axes_rotation(*PLY_AXES[name]), np.zeros(3))
            tensors = upright.apply(tensors)
        write_gaussians(path, tensors, name)
        return
    if placement is None:
        placement = Placement(1.0, axes_rotation(*PLY_AXES[name]), np.zeros(3))
    _write_mesh(path, placement.undo(asset), suffix)


def _name_of(rotation: np.ndarray) -> str:
    """The axes that this turns upright; those that a file does not say where they have no name."""
    found = (name for name, own in PLY_AXES.items() if np.allclose(axes_rotation(*own), rotation))
    return next(found, "z-up")


def _write_mesh(path: Path, mesh: Mesh, suffix: str) -> None:
    from lods.gaussians.mesh_file import write_mesh

    whole = mesh.finite()
    if not len(whole.faces):
        raise ValueError(f"'{path}': there are no triangles to write")
    if len(whole.faces) < len(mesh.faces):
        left_out = len(mesh.faces) - len(whole.faces)
        log.warn(f"'{path}': {left_out} triangles are not finite and left out")
    if not mesh.vertices.isfinite().all():
        mesh = whole.compact()
    normals = mesh.normals()
    textured = mesh.texture is not None and mesh.uv is not None
    if suffix == ".glb":
        colours = None if textured else mesh.shown_colours()
        write_mesh(path, mesh.vertices, mesh.faces, colours, normals, mesh.uv, mesh.texture)
    elif suffix == ".obj":
        _write_obj(path, mesh, normals, textured)
    else:
        import trimesh

        byte = (255 * mesh.shown_colours()).round().byte().numpy()
        plain = trimesh.Trimesh(
            mesh.vertices.numpy(),
            mesh.faces.numpy(),
            vertex_colors=byte if suffix == ".ply" else None,
            process=False,
        )
        with whole_file(path) as partial:
            plain.export(partial, file_type=suffix[1:])


def _write_obj(path: Path, mesh: Mesh, normals: torch.Tensor, textured: bool) -> None:
    """The texture and the material are named as the file is. All are written before one of them
    takes its place."""
    from PIL import Image

    lines = []
    with contextlib.ExitStack() as files:
        if textured and mesh.texture is not None:
            material, picture = path.with_suffix(".mtl"), path.with_suffix(".png")
            if not path.name.isprintable():
                raise ValueError(f"{path.name!r} cannot be named in an obj: take another name")
            _refuse_another(path, material, picture)
            byte = (255 * mesh.texture.clamp(0, 1)).round().byte().numpy()
            Image.fromarray(byte).save(files.enter_context(whole_file(picture)))
            text = "newmtl texture\nKa 1 1 1\nKd 1 1 1\nKs 0 0 0\nPm 0\nPr 1\n"
            files.enter_context(whole_file(material)).write_text(
                f"{text}map_Kd {picture.name}\n", encoding="utf-8"
            )
            lines += [f"mtllib {material.name}", "usemtl texture"]
        target = files.enter_context(whole_file(path))
        points = mesh.vertices
        if not textured:
            points = torch.cat([points, mesh.shown_colours()], dim=1)
        lines += _rows("v", points)
        if textured and mesh.uv is not None:
            lines += _rows("vt", mesh.uv)
        lines += _rows("vn", normals)
        form = "{0}/{0}/{0}" if textured else "{0}//{0}"
        for face in (mesh.faces + 1).tolist():
            lines.append("f " + " ".join(form.format(corner) for corner in face))
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _refuse_another(path: Path, material: Path, picture: Path) -> None:
    """Raise ValueError where the texture's name is that of a picture which no material of this
    name refers to: somebody's own."""
    if not os.path.lexists(picture):
        return
    known = False
    if os.path.isfile(material):
        with open(material, encoding="utf-8", errors="replace") as file:
            known = picture.name in file.read(MAX_MATERIAL)
    if not known:
        raise ValueError(
            f"'{path}': its texture would go over '{picture}', which is not of it: write it under "
            "another name"
        )


def _rows(keyword: str, rows: torch.Tensor) -> list[str]:
    return [f"{keyword} " + " ".join(f"{value:.9g}" for value in row) for row in rows.tolist()]
