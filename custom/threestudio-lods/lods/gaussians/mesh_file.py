"""Meshes from files that others made, and to files that viewers open."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from lods import log
from lods.files import whole_file
from lods.gaussians.gltf import read_gltf
from lods.gaussians.mesh_parts import (
    MAX_BYTES,
    Part,
    Picture,
    check_pictures,
    linear_from_shown,
    unit_colors,
)
from torch import Tensor

FORMATS = ("obj", "ply", "glb", "gltf", "off", "stl")  # not archives, which can grow when unpacked
MAX_VALUES = 20_000_000  # vertices and triangles of all instances together: some gigabytes of work
# LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP_TO_EDGE
SMOOTH = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}
MAX_OBJ_STEPS = 4_000_000_000  # materials times vertices: some ten seconds


def read_mesh(path: Path) -> list[Part]:
    """The file's triangles, in the file's own axes.

    Textures, materials and buffers of other files are read only from the file's own folder and
    below. Raises ``ValueError``, one line, for another format, and for a file that is damaged or
    would take more memory than its size explains.
    """
    suffix = path.suffix.lower()[1:]
    if suffix not in FORMATS:
        raise ValueError(f"'{path}' is not a mesh of a known format: {', '.join(FORMATS)}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, of which {MAX_BYTES} are read")
        if suffix in ("glb", "gltf"):
            parts = read_gltf(path, lambda name: _file_beside(path, name), MAX_VALUES)
        else:
            parts = _read_with_trimesh(path, suffix)
        check_pictures(parts)
    except Exception as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        if not isinstance(error, (ValueError, OSError, MemoryError)):
            detail = "it is damaged, or refers to what it does not hold" + f" ({detail})"
        raise ValueError(f"'{path}' cannot be read as a mesh: {detail}") from error
    return parts


def _file_beside(path: Path, name: str) -> bytes:
    """Regular files below the folder of the mesh: no devices, nothing above."""
    root = path.resolve().parent
    file = (root / str(name).strip()).resolve()
    if not file.is_relative_to(root) or not file.is_file():
        raise ValueError(f"it refers to {str(name)[:80]!r}, which is not a file in its folder")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"it refers to {str(name)[:80]!r}, which is larger than {MAX_BYTES} bytes")
    return file.read_bytes()


def _read_with_trimesh(path: Path, suffix: str) -> list[Part]:
    import trimesh
    from trimesh.exchange.obj import load_obj
    from trimesh.resolvers import FilePathResolver

    known: dict[str, bytes | ValueError] = {}  # each file is read once, however often it is named

    class Beside(FilePathResolver):
        def get(self, name):
            name = str(name)
            if name not in known:
                try:
                    known[name] = _file_beside(path, name)
                    if not name.lower().strip().endswith(".mtl"):
                        Picture(known[name])
                except ValueError as error:
                    known[name] = error
            if isinstance(found := known[name], ValueError):
                raise found  # which trimesh takes for a material that is not there
            return found

    resolver = Beside(str(path.resolve()))
    with _silent("trimesh"), open(path, "rb") as file:
        if suffix == "obj":
            # not trimesh.load, which leaves out vertex colours that stand beside a material
            _check_obj(file.read())
            file.seek(0)
            parts = []
            for fields in load_obj(file, resolver=resolver).get("geometry", {}).values():
                visual, rgb = fields.get("visual"), fields.get("vertex_colors")
                mesh = trimesh.Trimesh(fields["vertices"], fields["faces"], process=False)
                parts.append(_part(mesh, visual, None if rgb is None else unit_colors(rgb)))
        else:
            options = {"file_type": suffix, "force": "mesh", "process": False}
            mesh: Any = trimesh.load(file, resolver=resolver, **options)
            triangles, visual = isinstance(mesh, trimesh.Trimesh), mesh.visual
            rgb = visual.vertex_colors / 255.0 if visual.kind in ("vertex", "face") else None
            parts = [_part(mesh, visual, None if rgb is None else rgb[:, :3])] if triangles else []
    for part in parts:
        if len(part.faces) and not 0 <= part.faces.min() <= part.faces.max() < len(part.vertices):
            raise ValueError(
                f"it has a triangle of vertex {part.faces.max()}, and {len(part.vertices)} vertices"
            )
    failed = [found for found in known.values() if isinstance(found, ValueError)]
    large = next((error for error in failed if "pixels" in str(error)), None)
    if large is not None:
        raise large
    if failed:
        log.warn(f"'{path}' is read without some of its colours: {failed[0]}")
    return parts


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Within this, a library neither warns nor logs: what is wrong with a file is said here."""
    logger = logging.getLogger(name)  # whose level those of its modules have
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _check_obj(text: bytes) -> None:
    """Refuse more materials than trimesh can take: for each it goes through all vertices."""
    materials = len(set(re.findall(rb"^[ \t]*usemtl[^\n]*", text, re.MULTILINE)))
    vertices = len(re.findall(rb"^[ \t]*v[ \t]", text, re.MULTILINE))
    if materials * vertices > MAX_OBJ_STEPS:
        raise ValueError(
            f"it has {materials} materials and {vertices} vertices: save it with fewer materials, "
            "or as glb"
        )


def _part(mesh, visual, rgb: np.ndarray | None) -> Part:
    """A mesh of trimesh with what it looks like; mid grey where that cannot be told."""
    part = Part(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    if part.vertices.shape[1:] != (3,) or part.faces.shape[1:] != (3,):
        raise ValueError("it holds no triangles")
    try:
        _paint(part, visual, rgb)
    except ValueError:
        raise
    except Exception as error:  # of many kinds: a material has what its file says
        log.warn(f"colours of a mesh cannot be read ({error}): they are grey")
        part.factor, part.rgb, part.picture = np.full(3, 0.5), None, None
    return part


def _paint(part: Part, visual, rgb: np.ndarray | None) -> None:
    """A picture alone, or one colour of a material, times the vertices' own."""
    if rgb is not None and len(rgb) == len(part.vertices):
        part.rgb = rgb[:, :3]
    material = getattr(visual, "material", None)
    images = (getattr(material, name, None) for name in ("image", "baseColorTexture"))
    image = next((image for image in images if image is not None), None)
    uv = getattr(visual, "uv", None)
    if image is not None and uv is not None and len(uv) == len(part.vertices):
        part.picture, part.uv = Picture(image), np.asarray(uv)[:, :2] * [1, -1] + [0, 1]
        part.rgb = None
    elif material is not None and part.rgb is None:
        part.factor = np.asarray(material.main_color, np.float64)[:3] / 255
    elif material is not None and part.rgb is not None and "kd" in getattr(material, "kwargs", {}):
        # multiplied as light is, as viewers do
        part.factor = linear_from_shown(np.asarray(material.main_color, np.float64)[:3] / 255)
        part.rgb, part.linear = linear_from_shown(part.rgb), True
    elif part.rgb is None:
        part.factor = np.full(3, 0.5)


def write_mesh(
    path: str | Path,
    v_pos: Float[Tensor, "V 3"],
    t_pos_idx: Int[Tensor, "F 3"],
    v_rgb: Float[Tensor, "V 3"] | None = None,
    v_nrm: Float[Tensor, "V 3"] | None = None,
    uv: Float[Tensor, "V 2"] | None = None,
    texture: Float[Tensor, "H W 3"] | None = None,
) -> None:
    """Write a glb whose vertices have shown colours (0..1), or a ``texture`` of them (row 0 at the
    top) at ``uv`` (v upward), and normals, if none are given the faces' means; axes as they are.
    The file is replaced only when it is complete.

    A texture is a PNG, whose colours are shown ones, as glTF wants it. ``COLOR_0`` is linear, as
    glTF wants that, and in floats: bytes would leave steps of up to 13 among dark shown ones. The
    material is not metal, fully rough and without highlights: under the same light from everywhere
    it shows the colours themselves.
    """
    import trimesh
    from PIL import Image
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    look: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    visual: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    if texture is not None and uv is not None:
        shown = texture.detach().cpu().float().clamp(0, 1).numpy()
        look["baseColorTexture"] = Image.fromarray((255 * shown).round().astype(np.uint8))
        visual["uv"] = uv.detach().cpu().double().numpy()
    elif v_rgb is not None:
        shown = v_rgb.detach().cpu().double().numpy()
        attributes["COLOR"] = linear_from_shown(shown).astype(np.float32)
    mesh = trimesh.Trimesh(
        v_pos.detach().cpu().numpy(),
        t_pos_idx.cpu().numpy(),
        vertex_normals=None if v_nrm is None else v_nrm.detach().cpu().numpy(),
        vertex_attributes=attributes,
        visual=TextureVisuals(material=PBRMaterial(**look), **visual),
        process=False,
    )

    def finish(tree: dict[str, Any]) -> None:
        """trimesh writes bytes only as COLOR_0, other attributes with an underscore, and no
        extensions; and its textures repeat, so that filters mix opposite edges."""
        for written in tree["meshes"]:
            for primitive in written["primitives"]:
                attributes = primitive["attributes"]
                if "_COLOR" in attributes:
                    attributes["COLOR_0"] = attributes.pop("_COLOR")
        for material in tree["materials"]:
            material["extensions"] = {"KHR_materials_specular": {"specularFactor": 0.0}}
        tree["extensionsUsed"] = ["KHR_materials_specular"]
        for sampled in tree.get("textures", []):
            tree["samplers"] = [SMOOTH]
            sampled["sampler"] = 0

    with whole_file(path) as partial:
        mesh.export(partial, file_type="glb", include_normals=True, tree_postprocessor=finish)
