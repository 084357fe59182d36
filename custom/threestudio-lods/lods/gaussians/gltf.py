"""glTF 2.0 files as triangles with colours, after the specification of the Khronos Group.

A reader of our own, because trimesh's takes vertex colours for sRGB, leaves out those that stand
beside a material, does not scale 16-bit ones, and packs all textures into one picture.
"""

import base64
import binascii
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from jaxtyping import Float, Integer
from lods.gaussians.mesh_parts import Part, Picture

TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS: dict[Any, int] = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES, STRIP, FAN = 4, 5, 6
WRAPS: dict[Any, str] = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")
MAX_PARTS = 100_000  # primitives of all instances: some ten seconds
GREY = 0.21404114048223255  # linear, shown as one half: without a material and colours


def read_gltf(path: Path, beside: Callable[[str], bytes], max_values: int) -> list[Part]:
    """The triangles of the file's scene, an instance a part.

    ``beside(name)`` reads a file that this one refers to. Raises ValueError where the file does
    not hold what it says, and for more than ``max_values`` vertices and triangles of all instances
    together.
    """
    return _Reader(path, beside, max_values).parts()


class _Reader:
    def __init__(self, path: Path, beside: Callable[[str], bytes], max_values: int) -> None:
        data = path.read_bytes()
        self.size, self.beside, self.chunk = len(data), beside, None
        self.max_values, self._values, self._zeros = max_values, 0, 0
        if path.suffix.lower() == ".glb":
            data = self._unpack(data)
        self.tree = json.loads(data)
        if not isinstance(self.tree, dict):
            raise ValueError("it is not a glTF file")
        version = str(self.tree.get("asset", {}).get("version", ""))
        if not version.startswith("2"):
            raise ValueError(f"it is glTF of version {version or 'none'}: version 2 is read")
        self._kept: dict[Any, Any] = {}

    def _unpack(self, data: bytes) -> bytes:
        """The JSON of a glb; its binary chunk is kept."""
        if len(data) < 20 or data[:4] != b"glTF":
            raise ValueError("it is not a glb file")
        chunks, at = {}, 12
        while at + 8 <= len(data):
            length, kind = struct.unpack_from("<I4s", data, at)
            if at + 8 + length > len(data):
                raise ValueError("it is cut short")
            chunks.setdefault(kind, data[at + 8 : at + 8 + length])
            at += 8 + length
        self.chunk = chunks.get(b"BIN\0")
        if b"JSON" not in chunks:
            raise ValueError("it has no JSON")
        return chunks[b"JSON"]

    # -- what it says ----------------------------------------------------------------------------

    def item(self, kind: str, index: Any) -> dict[str, Any]:
        """``tree[kind][index]``. Raises ValueError if there is none."""
        items = self.tree.get(kind, [])
        if not isinstance(index, int) or not 0 <= index < len(items):
            raise ValueError(f"it refers to {kind}[{index}], and has {len(items)}")
        return items[index]

    def kept(self, make: Callable, index: Any) -> Any:
        """``make(index)``, made once."""
        key = make.__name__, index
        if key not in self._kept:
            self._kept[key] = make(index)
        return self._kept[key]

    def buffer(self, index: int) -> bytes:
        described = self.item("buffers", index)
        if "uri" in described:
            data = self.uri(described["uri"])
        elif index == 0 and self.chunk is not None:
            data = self.chunk
        else:
            raise ValueError(f"buffers[{index}] has no data")
        length = _whole(described, "byteLength")
        if length > len(data):
            raise ValueError(f"buffers[{index}] shall have {length} bytes, and has {len(data)}")
        return data

    def file(self, name: str) -> bytes:
        return self.beside(name)

    def uri(self, uri: Any) -> bytes:
        if not isinstance(uri, str):
            raise ValueError(f"it has a uri that is none: {str(uri)[:60]}")
        if not uri.startswith("data:"):
            return self.kept(self.file, unquote(uri))  # many buffers may name the same one
        try:
            return base64.b64decode(uri.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"it has data that are not base64 ({error})") from error

    def view(self, index: Any) -> tuple[memoryview, int]:
        """The bytes of a buffer view, and its stride (0: none)."""
        view = self.item("bufferViews", index)
        if any(name in view.get("extensions", {}) for name in COMPRESSED):
            raise ValueError("it is compressed by meshopt: save it without")
        data = memoryview(self.kept(self.buffer, view.get("buffer")))
        start, length = _whole(view, "byteOffset", 0), _whole(view, "byteLength")
        if start + length > len(data):
            raise ValueError(f"bufferViews[{index}] ends beyond its buffer")
        return data[start : start + length], _whole(view, "byteStride", 0)

    def array(self, where: dict[str, Any], count: int, width: int) -> np.ndarray:
        """(count, width) values of a view, at an accessor's or a sparse accessor's part."""
        data, stride = self.view(where.get("bufferView"))
        kind = np.dtype(TYPES[where["componentType"]])
        start, stride = _whole(where, "byteOffset", 0), stride or kind.itemsize * width
        if count and start + stride * (count - 1) + kind.itemsize * width > len(data):
            raise ValueError(f"its buffer is too short for {count} items")
        strides = (stride, kind.itemsize)
        return (
            np.ndarray((count, width), kind, data, start, strides)
            if count
            else np.zeros((0, width))
        )

    def accessor(self, index: int) -> np.ndarray:
        """(count, width) as stored."""
        described = self.item("accessors", index)
        count, width = _whole(described, "count"), WIDTHS.get(described.get("type"))
        if described.get("componentType") not in TYPES or width is None:
            raise ValueError(f"accessors[{index}] is of an unknown type")
        if "bufferView" in described:
            values = self.array(described, count, width)
        else:
            self._zeros += count  # of all accessors: a short one may claim much
            if self._zeros > self.size:
                raise ValueError(f"accessors[{index}] claims {count} items without any data")
            values = np.broadcast_to(np.zeros(1, TYPES[described["componentType"]]), (count, width))
        if "sparse" not in described:
            return values
        self._count(count)
        sparse, values = described["sparse"], np.array(values)
        n = _whole(sparse, "count")
        rows = self.array(sparse["indices"], n, 1)[:, 0].astype(np.int64)
        if n and not (rows.min() >= 0 and rows.max() < count):
            raise ValueError(f"accessors[{index}] replaces items that it does not have")
        kind = {"componentType": described["componentType"], **sparse["values"]}
        values[rows] = self.array(kind, n, width)
        return values

    def floats(self, index: int) -> Float[np.ndarray, "N W"]:
        """Whole numbers that are ``normalized`` as 0..1 (-1..1 if they have a sign)."""
        values = self.kept(self.accessor, index)
        if values.dtype.kind == "f":
            return values
        whole = values.astype(np.float32)
        if not self.item("accessors", index).get("normalized", False):
            return whole
        return np.maximum(whole / np.iinfo(values.dtype).max, -1.0)

    # -- colours ---------------------------------------------------------------------------------

    def picture(self, index: int) -> Picture | None:
        """Of ``textures[index]``."""
        texture = self.item("textures", index)
        extensions = texture.get("extensions", {})
        source = extensions.get("EXT_texture_webp", {}).get("source", texture.get("source"))
        if source is None:
            names = ", ".join(extensions) or "no picture"
            raise ValueError(f"a texture of it cannot be read: it has {names}")
        image = self.item("images", source)
        if "bufferView" in image:
            data = bytes(self.view(image["bufferView"])[0])
        else:
            data = self.uri(image.get("uri"))
        sampler = self.item("samplers", texture["sampler"]) if "sampler" in texture else {}
        u, v = (WRAPS.get(sampler.get(name), "repeat") for name in ("wrapS", "wrapT"))
        return Picture(data, (u, v))

    def look(self, primitive: dict[str, Any]) -> dict[str, Any]:
        """The fields of :class:`Part` that tell its colour."""
        attributes: dict[str, Any] = primitive["attributes"]
        fields: dict[str, Any] = {"linear": True}
        colored = "COLOR_0" in attributes
        if colored:
            fields["rgb"] = self.kept(self.vertex_colors, attributes["COLOR_0"])
        if "material" not in primitive:
            return fields if colored else {**fields, "factor": np.full(3, GREY)}
        material = self.item("materials", primitive["material"])
        pbr = material.get("pbrMetallicRoughness", {})
        names = "baseColorFactor", "baseColorTexture"
        old = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
        if old is not None and "baseColorTexture" not in pbr:
            pbr, names = old, ("diffuseFactor", "diffuseTexture")
        factor = np.array(pbr.get(names[0], [1, 1, 1]), np.float64)[:3]
        if factor.shape != (3,) or not np.isfinite(factor).all():
            raise ValueError(f"materials[{primitive['material']}] has a {names[0]} that is none")
        fields["factor"] = factor
        texture = pbr.get(names[1])
        if texture is None:
            return fields
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        name = f"TEXCOORD_{transform.get('texCoord', texture.get('texCoord', 0))}"
        if name in attributes:
            fields["picture"] = self.kept(self.picture, texture.get("index"))
            fields["uv"] = _moved(self.floats(attributes[name]), transform)
        return fields

    def vertex_colors(self, index: int) -> Float[np.ndarray, "V 3"]:
        """COLOR_0, whose whole numbers are always normalised."""
        values = self.kept(self.accessor, index)
        scale = 1.0 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        return values[:, :3].astype(np.float32) / scale

    # -- triangles -------------------------------------------------------------------------------

    def instances(self) -> Iterable[tuple[int, Float[np.ndarray, "4 4"]]]:
        """(mesh, matrix) of every node of the scene that has a mesh."""
        nodes, scenes = self.tree.get("nodes", []), self.tree.get("scenes", [])
        if scenes:
            roots = self.item("scenes", self.tree.get("scene", 0)).get("nodes", [])
        else:
            children = {child for node in nodes for child in node.get("children", [])}
            roots = [i for i in range(len(nodes)) if i not in children]
        stack, seen = [(root, np.eye(4)) for root in reversed(roots)], set()
        while stack:
            index, matrix = stack.pop()
            node = self.item("nodes", index)
            if index in seen:
                raise ValueError(f"nodes[{index}] is reached twice")
            seen.add(index)
            with np.errstate(all="ignore"):  # what is not finite is left out later
                matrix = matrix @ _matrix(node)
            if "mesh" in node:
                yield node["mesh"], matrix
            stack += [(child, matrix) for child in reversed(node.get("children", []))]

    def parts(self) -> list[Part]:
        made, values = [], 0
        for mesh, matrix in self.instances():
            for fields in self.kept(self.primitives, mesh):
                values += len(fields["vertices"]) + len(fields["faces"])
                if values > self.max_values:
                    raise ValueError(f"its instances have {values} vertices and triangles")
                made.append(Part(matrix=matrix, **fields))
            if len(made) > MAX_PARTS:
                raise ValueError(f"it has more than {MAX_PARTS} parts: save it with fewer")
        return made

    def _count(self, values: int) -> None:
        """Many primitives may claim the same bytes, each for itself."""
        self._values += values
        if self._values > 4 * self.max_values:
            raise ValueError(f"it has {self._values} vertices and corners of triangles")

    def primitives(self, mesh: int) -> list[dict[str, Any]]:
        """The fields of :class:`Part` for each primitive of a mesh that has triangles."""
        made, primitives = [], self.item("meshes", mesh)["primitives"]
        if len(primitives) > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} parts: save it with fewer")
        for primitive in primitives:
            mode = primitive.get("mode", TRIANGLES)
            if mode not in (TRIANGLES, STRIP, FAN):
                continue
            used = [name for name in COMPRESSED if name in primitive.get("extensions", {})]
            if used:
                raise ValueError(f"it is compressed by {used[0]}: save it without")
            vertices = self.floats(primitive["attributes"].get("POSITION"))
            if vertices.shape[1] != 3:
                raise ValueError(f"meshes[{mesh}] has positions that are no points")
            if "indices" in primitive:
                corners = self.kept(self.accessor, primitive["indices"])
                if corners.dtype.kind not in "iu" or corners.shape[1] != 1:
                    raise ValueError(f"meshes[{mesh}] has indices that are no whole numbers")
                corners = corners[:, 0]
            else:
                corners = np.arange(len(vertices))
            self._count(len(vertices) + len(corners))
            faces = _faces(corners, mode)
            if len(faces) and not (faces.min() >= 0 and faces.max() < len(vertices)):
                raise ValueError(
                    f"meshes[{mesh}] has a triangle of vertex {faces.max()}, and "
                    f"{len(vertices)} vertices"
                )
            look = self.look(primitive)
            for name in ("rgb", "uv"):
                if name in look and len(look[name]) != len(vertices):
                    raise ValueError(f"meshes[{mesh}] has not as many colours as vertices")
            made.append({"vertices": vertices, "faces": faces, **look})
        return made


def _whole(where: dict[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of at least 0."""
    value = where.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"it has {value!r} as {name}")
    return value


def _faces(corners: Integer[np.ndarray, " N"], mode: int) -> Integer[np.ndarray, "F 3"]:
    n = len(corners)
    if mode == TRIANGLES:
        return corners[: n - n % 3].reshape(-1, 3)
    first = corners[:-2] if mode == STRIP else np.broadcast_to(corners[:1], (max(n - 2, 0),))
    return np.stack([first[: max(n - 2, 0)], corners[1:-1], corners[2:]], axis=1)


def _matrix(node: dict[str, Any]) -> Float[np.ndarray, "4 4"]:
    """From a node's space to its parent's: ``matrix``, column after column, or T R S."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = (float(value) for value in node.get("rotation", (0, 0, 0, 1)))
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _moved(uv: Float[np.ndarray, "V 2"], transform: dict[str, Any]) -> Float[np.ndarray, "V 2"]:
    """KHR_texture_transform: translation, rotation and scale of texture coordinates."""
    if not transform:
        return uv
    scale, angle = np.array(transform.get("scale", (1, 1))), float(transform.get("rotation", 0))
    c, s = np.cos(angle), np.sin(angle)
    rotation = np.array([[c, s], [-s, c]])
    return (uv * scale) @ rotation.T + np.array(transform.get("offset", (0, 0)))
