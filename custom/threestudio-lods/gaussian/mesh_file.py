"""Meshes from files that others made, and to files, through ``trimesh``."""

import json
import struct
from pathlib import Path

from threestudio.utils.typing import *

from ..whole_file import whole_file

FORMATS = ("obj", "ply", "glb", "gltf", "off", "stl")  # not archives, which can grow when unpacked
MAX_VALUES = 100_000_000  # vertices and triangles of all instances together


def read_mesh(path: Path):
    """The file as one ``trimesh.Trimesh``, its instances written out.

    Textures and buffers of other files are read only from the file's own folder. Raises
    ``ValueError``, one line, for another format, and for a file that is damaged or would take more
    memory than its size explains.
    """
    import trimesh
    from trimesh.resolvers import FilePathResolver

    class Beside(FilePathResolver):
        """Regular files below the folder of the mesh: no devices, nothing above."""

        def get(self, name):
            root = Path(self.parent).resolve()
            file = (root / str(name).strip()).resolve()
            if not file.is_relative_to(root) or not file.is_file():
                raise ValueError(f"it refers to {name!r}, which is not a file in its folder")
            return file.read_bytes()

    suffix = path.suffix.lower()[1:]
    if suffix not in FORMATS:
        raise ValueError(f"'{path}' is not a mesh of a known format: {', '.join(FORMATS)}")
    try:
        if suffix in ("glb", "gltf"):
            _check_gltf(path)
        with open(path, "rb") as file:
            scene = trimesh.load(
                file, file_type=suffix, resolver=Beside(str(path.resolve())), force="scene"
            )
        names = [scene.graph.get(node)[1] for node in scene.graph.nodes_geometry]
        parts = [scene.geometry[name] for name in names]
        values = sum(len(p.vertices) + len(getattr(p, "faces", ())) for p in parts)
        if values > MAX_VALUES:
            raise ValueError(f"its instances have {values} vertices and triangles")
        join = getattr(scene, "to_mesh", None)  # trimesh before 4.6 has only the other
        return join() if join else scene.dump(concatenate=True)
    except Exception as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"'{path}' cannot be read as a mesh: {detail}") from error


def _check_gltf(path: Path) -> None:
    """Refuse accessors without data (they mean zeros) that claim more items than the file has
    bytes."""
    data = path.read_bytes()
    if path.suffix.lower() == ".glb":
        length = struct.unpack_from("<I", data, 12)[0]
        data = data[20 : 20 + length]
    accessors = json.loads(data).get("accessors", [])
    counts = [int(a["count"]) for a in accessors if "bufferView" not in a]
    if any(n < 0 for n in counts) or sum(counts) > path.stat().st_size:
        raise ValueError(f"it claims {sum(counts)} items without any data")


def write_mesh(
    path: Union[str, Path],
    v_pos: Float[Tensor, "V 3"],
    t_pos_idx: Int[Tensor, "F 3"],
    v_rgb: Float[Tensor, "V 3"],
) -> None:
    """Write a mesh with colours (0..1) of its vertices, in the format of the path's ending, through
    ``trimesh``; the file is replaced only when it is complete."""
    import trimesh

    byte = (v_rgb.detach().cpu().clamp(0, 1) * 255).round().byte().numpy()
    mesh = trimesh.Trimesh(
        v_pos.cpu().numpy(), t_pos_idx.cpu().numpy(), vertex_colors=byte, process=False
    )
    with whole_file(path) as partial:
        mesh.export(partial, file_type=partial.suffix[1:])
