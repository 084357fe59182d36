"""Reading glb files from their bytes, for tests of what writes them, and what sRGB means."""

import json
import struct

import numpy as np


def shown(linear):
    """sRGB's curve (IEC 61966-2-1)."""
    linear = np.asarray(linear, float)
    curve = 1.055 * linear.clip(0.0031308, None) ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curve)


def linear(shown):
    shown = np.asarray(shown, float)
    return np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)


def read_glb(path):
    """``(tree, attributes by name, faces)`` of a glb with one mesh of one primitive."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size = struct.unpack_from("<I", data, 12)[0]
    tree = json.loads(data[20 : 20 + size])
    blob = data[28 + size :]

    def values(index):
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        kind = {5121: "<u1", 5123: "<u2", 5125: "<u4", 5126: "<f4"}[accessor["componentType"]]
        width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        found = np.frombuffer(blob, kind, accessor["count"] * width, start).reshape(-1, width)
        return found / np.iinfo(found.dtype).max if accessor.get("normalized") else found

    [mesh] = tree["meshes"]
    [primitive] = mesh["primitives"]
    attributes = {name: values(index) for name, index in primitive["attributes"].items()}
    return tree, attributes, values(primitive["indices"]).reshape(-1, 3)


def material_of(tree):
    return tree["materials"][tree["meshes"][0]["primitives"][0]["material"]]


def glb(tree, blob=b""):
    """The bytes of a glb file."""
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    if blob:
        chunks += struct.pack("<II", len(blob), 0x004E4942) + blob
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks
