"""Reading assets: Gaussians and meshes of other programs, as large as what is trained here."""

import os
from pathlib import Path

import torch
from lods import log
from lods.assets.atlas import mesh_of
from lods.assets.mesh import Mesh
from lods.assets.placement import HALF_SIDE, placement_of
from lods.files import told
from lods.gaussians.axes import AXES, PLY_AXES
from lods.gaussians.files import is_of_gaussians, read_gaussians
from lods.gaussians.mesh_file import FORMATS, read_mesh
from lods.gaussians.parameters import Gaussians

ENDINGS = (*(f".{name}" for name in FORMATS), ".splat", ".spz")
Axes = str | tuple[str, str] | None


def read(path: str | Path, axes: Axes = None, half_side: float | None = HALF_SIDE):
    """The asset of a file: :class:`lods.gaussians.Gaussians` of a 3DGS or compressed ply, a
    ``.splat`` or an ``.spz``, with their harmonics; a :class:`lods.assets.Mesh` of a glb, gltf,
    obj, ply, stl or off, with its textures, materials and vertex colours.

    It is turned so that z is up and the front on +x, its box is centred on the origin, and the
    box's longest half side is ``half_side`` (None: neither moved nor scaled). What was done is its
    ``placement``: ``asset.placement.undo(changed)`` puts what became of it back into its scene.

    Args:
        axes: the file's own. "y-up" (front +z), "z-up" (front +x) or "y-down" (front -z), or the
            two axes of the file that hold the front and up, such as ("-y", "+z"). None: y-up for
            glTF and spz, as they prescribe, what a ply of ours says of itself, else z-up.

    Raises:
        ValueError: one line, for a file that is missing, of another format, damaged, or without
            anything to draw, and for axes that are none.
    """
    path = _expanded(Path(path))
    given = _axes(axes)
    if not os.path.isfile(path):
        raise ValueError(f"there is no file '{path}'")
    suffix = path.suffix.lower()
    if suffix not in ENDINGS:
        raise ValueError(f"'{path}' is of no known format: {', '.join(ENDINGS)} are read")
    try:
        return _asset(path, suffix, given, half_side)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {told(error)}") from None
    except MemoryError:
        raise ValueError(f"'{path}' takes more memory than there is: make it smaller") from None


def _asset(path: Path, suffix: str, given: tuple[str, str] | None, half_side: float | None):
    """What :func:`read` returns, of a file that is there."""
    content = read_gaussians(path) if suffix == ".ply" or is_of_gaussians(path) else {}
    said = content.pop("axes", None)
    own = given or said or PLY_AXES["y-up" if suffix in (".glb", ".gltf") else "z-up"]
    found = content
    if "means" not in content:
        if content and "faces" not in content:
            raise ValueError(
                f"'{path}' holds points without Gaussians or triangles: start from it with "
                "system.geometry.init_type=file"
            )
        parts = read_mesh(path)
        for part in parts:  # trimesh does not know the range of a ply's colours
            if part.rgb is not None and len(part.rgb) == len(content.get("rgb", ())):
                part.rgb = content["rgb"]
        try:
            whole = mesh_of(parts)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from None
        found = _finite(path, whole)
    try:
        placement = placement_of(found, own, half_side)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    if isinstance(found, dict):
        asset: Gaussians | Mesh = Gaussians(_drawable(path, placement.apply(found)))
    else:
        placed = placement.apply(found)
        placed.vertices = placed.vertices.float()
        asset = _finite(path, placed)
    asset.placement = placement
    return asset


def _expanded(path: Path) -> Path:
    """``~`` as the user's home, unless that is a part of a name ("~chair.glb")."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _axes(axes: Axes) -> tuple[str, str] | None:
    """Front and up. Raises ValueError for what is neither a name nor two axes."""
    if axes is None:
        return None
    if isinstance(axes, str) and axes in PLY_AXES:
        return PLY_AXES[axes]
    if not isinstance(axes, str) and len(axes) == 2 and all(each in AXES for each in axes):
        return axes[0], axes[1]
    raise ValueError(
        f"axes={axes!r}: give {', '.join(PLY_AXES)}, or the file's axes of the front and up, such "
        "as ('-y', '+z')"
    )


def _drawable(path: Path, gaussians: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Gaussians whose size is finite. One as large as float32 holds is not any more where a
    tiny scene has been made larger. Raises ValueError if none is left."""
    good = gaussians["scales"].exp().isfinite().all(1)
    if not good.any():
        raise ValueError(f"'{path}': its Gaussians are too large for where they are")
    if not good.all():
        log.warn(f"'{path}': {int((~good).sum())} Gaussians are too large and left out")
    return {name: value[good] for name, value in gaussians.items()}


def _finite(path: Path, mesh: Mesh) -> Mesh:
    """The mesh without triangles whose corners are not finite. Raises ValueError if none is
    left."""
    found = mesh.finite()
    if not len(found.faces):
        raise ValueError(f"'{path}' holds no triangles that can be drawn")
    left_out = len(mesh.faces) - len(found.faces)
    if left_out:
        log.warn(f"'{path}': {left_out} triangles are not finite and left out")
    return found
