"""Readers refuse sizes, types and values that a file cannot hold, and do not allocate them."""

import importlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from plyfile import PlyData, PlyElement

import threestudio
from tests.glb_files import glb
from tests.hostile import one_line
from tests.runs import ROOT


@pytest.fixture(scope="module")
def ply(lods):
    return importlib.import_module("lods.gaussians.ply")


def start_from(path, **cfg):
    cfg = {"init_type": "file", "file": {"path": str(path), "n_points": 50}, **cfg}
    return threestudio.find("lods-gaussians")(cfg)


# --- ply ---


def header(form, *elements):
    lines = ["ply", f"format {form} 1.0"]
    for name, count, *properties in elements:
        lines += [f"element {name} {count}", *(f"property {p}" for p in properties)]
    return ("\n".join([*lines, "end_header"]) + "\n").encode()


XYZ = ("float x", "float y", "float z")
FACES = ("list uchar int vertex_indices",)
BINARY, ASCII = "binary_little_endian", "ascii"
THREE = np.arange(9, dtype="<f4").tobytes()

LIARS = {
    "binary": header(BINARY, ("vertex", 10**12, *XYZ)) + bytes(800),
    "ascii": header(ASCII, ("vertex", 10**12, *XYZ)) + b"0 0 0\n" * 100,
    "an end in a comment": header(BINARY, ("vertex", 10**12, *XYZ)).replace(
        b"element", b"comment end_header\nelement", 1
    )
    + bytes(800),
    "negative": header(BINARY, ("vertex", -1, *XYZ)) + bytes(800),
    "negative, ascii": header(ASCII, ("vertex", -5, *XYZ)) + b"0 0 0\n",
    "a little too many": header(BINARY, ("vertex", 80, *XYZ)) + bytes(79 * 12),
    "faces": header(BINARY, ("vertex", 3, *XYZ), ("face", 10**12, *FACES)) + THREE,
    "faces first": header(BINARY, ("face", 10**12, *FACES), ("vertex", 3, *XYZ)) + THREE,
    "something else first": header(BINARY, ("junk", 10**12, "uchar a"), ("vertex", 3, *XYZ))
    + THREE,
    "without properties": header(BINARY, ("vertex", 3, *XYZ), ("junk", 10**12)) + THREE,
    "a long list": header(BINARY, ("face", 1, "list uint double i"), ("vertex", 3, *XYZ))
    + struct.pack("<I", 2**32 - 1)
    + THREE,
    "a list of negative length": header(BINARY, ("vertex", 1, "list int float x", *XYZ[1:]))
    + struct.pack("<i", -1)
    + bytes(400),
    "a long list, ascii": header(ASCII, ("vertex", 1, "list uint float x", *XYZ[1:]))
    + b"4000000000 1 2 3\n",
    "missing rows": header(ASCII, ("vertex", 5, *XYZ)) + b"0.00000000 0 0.0000000\n" * 3,
    "short rows": header(ASCII, ("vertex", 3, *XYZ)) + b"0 0\n" * 8,
    "long rows": header(ASCII, ("vertex", 2, *XYZ)) + b"0 0 0 0\n" * 2,
    "words": header(ASCII, ("vertex", 2, *XYZ)) + b"0 0 zero\n" * 2,
    "no number": header(BINARY, ("vertex", "many", *XYZ)) + bytes(99),
    "a huge number": header(BINARY, ("vertex", "9" * 5000, *XYZ)) + bytes(99),
    "unknown type": header(BINARY, ("vertex", 3, "float128 x")) + bytes(99),
    "twice the same": header(BINARY, ("vertex", 3, *XYZ, "float x")) + bytes(99),
    "no end": header(BINARY, ("vertex", 3, *XYZ))[:-12] + b"comment x\n" * 200_000,
    "no elements": header(BINARY) + THREE,
    "property of nothing": b"ply\nformat ascii 1.0\nproperty float x\nend_header\n",
    "half a line": b"ply\nformat ascii 1.0\nelement\nend_header\n",
}


@pytest.mark.parametrize("content", LIARS.values(), ids=LIARS)
def test_ply_files_that_promise_more_than_they_hold(ply, tmp_path, content):
    path = tmp_path / "liar.ply"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable ply") as caught:
        ply.read_ply(path)
    one_line(caught)


def test_a_long_list_is_not_set_aside(ply, tmp_path):
    """plyfile asks the file for all of it at once; a file makes room for what it is asked for."""
    path = tmp_path / "list.ply"
    elements = ("face", 1, "list uint uchar i"), ("vertex", 3, *XYZ)
    path.write_bytes(header(BINARY, *elements) + struct.pack("<I", 10**9) + THREE)
    tracemalloc.start()
    with pytest.raises(ValueError, match="not a readable ply"):
        ply.read_ply(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_ply_files_that_are_just_right(ply, tmp_path):
    """As many bytes as promised, and no more; lists of every kind."""
    path = tmp_path / "a.ply"
    rows = b"0 0 0\n1 1 1\n2 2 2"
    face = struct.pack("<B4i", 4, 0, 1, 2, 0)
    for content, faces in (
        (header(BINARY, ("vertex", 3, *XYZ)) + THREE, None),
        (header(ASCII, ("vertex", 3, *XYZ)) + rows, None),
        (header(ASCII, ("vertex", 3, *XYZ), ("face", 1, *FACES)) + rows + b"\n3 0 1 2", 1),
        (header(BINARY, ("vertex", 3, *XYZ), ("face", 1, *FACES)) + THREE + face, 1),
        (header(BINARY, ("face", 1, *FACES), ("vertex", 3, *XYZ)) + face + THREE, 1),
        (header(BINARY, ("vertex", 3, *XYZ), ("junk", 0)) + THREE, None),
        (header(BINARY, ("vertex", 3, *XYZ)).replace(b"\n", b"\r\n") + THREE, None),
    ):
        path.write_bytes(content)
        result = ply.read_ply(path)
        assert result["xyz"].shape == (3, 3) and result.get("faces") == faces


def gaussian_columns(ply, n=5, **changed):
    """Columns of a good 3DGS file: name -> (numpy type, values)."""
    columns = {name: ("f4", np.full(n, 0.5)) for name in ply.gaussian_properties(0)}
    for name, (kind, value) in changed.items():
        columns[name] = (kind, np.broadcast_to(value, n))
    return columns


def write_columns(path, columns):
    n = len(next(iter(columns.values()))[1])
    data = np.empty(n, dtype=[(name, kind) for name, (kind, _) in columns.items()])
    for name, (_, values) in columns.items():
        with np.errstate(over="ignore"):
            data[name] = values
    PlyData([PlyElement.describe(data, "vertex")], byte_order="<").write(str(path))


@pytest.mark.parametrize(
    "name, kind, value, message",
    [
        ("x", "f4", np.nan, "5 of 5 points are not finite"),
        ("y", "f4", -np.inf, "not finite"),
        ("z", "f8", 1e39, "not finite in float32"),
        ("opacity", "f8", [1e300, np.nan, -1e300, np.inf, -np.inf], "5 of 5 points"),
        ("f_dc_1", "f8", np.nan, "not finite"),
        ("scale_0", "f4", 89.0, "sizes beyond float32"),
        ("rot_0", "f4", 1e20, "quaternions or sizes beyond float32"),
        ("opacity", "u1", 3, "lists or whole numbers as opacity"),
        ("x", "i4", 3, "lists or whole numbers as x"),
        ("rot_3", "u2", 3, "lists or whole numbers as rot_3"),
    ],
)
def test_gaussians_with_values_that_are_none(ply, tmp_path, name, kind, value, message):
    path = tmp_path / "g.ply"
    write_columns(path, gaussian_columns(ply))
    assert start_from(path).count == 5
    write_columns(path, gaussian_columns(ply, **{name: (kind, value)}))
    with pytest.raises(ValueError, match=message) as caught:
        start_from(path)
    one_line(caught)


@pytest.mark.parametrize("name", ["x", "opacity", "rot_1"])
def test_gaussians_with_lists(ply, tmp_path, name):
    path = tmp_path / "g.ply"
    columns = gaussian_columns(ply)
    data = np.empty(5, dtype=[(n, "O" if n == name else "f4") for n in columns])
    for n in columns:
        data[n] = 0.5
    for i in range(5):
        data[name][i] = np.zeros(i, np.float32)
    element = PlyElement.describe(data, "vertex", val_types={name: "f4"}, len_types={name: "u1"})
    PlyData([element], byte_order="<").write(str(path))
    with pytest.raises(ValueError, match=f"has lists or whole numbers as {name}") as caught:
        start_from(path)
    one_line(caught)


def test_points_beyond_float32(ply, tmp_path):
    path = tmp_path / "p.ply"
    good = np.random.default_rng(0).normal(size=(9, 3))
    for scale, message in ((1, None), (1e-30, None), (1e39, "float32"), (1e200, "float32")):
        write_columns(path, {n: ("f8", good[:, i] * scale) for i, n in enumerate("xyz")})
        if message is None:
            assert all(p.isfinite().all() for p in start_from(path).parameters())
            continue
        with pytest.raises(ValueError, match=message) as caught:
            start_from(path)
        one_line(caught)


def test_colours_out_of_range_are_clipped(ply, tmp_path):
    path = tmp_path / "p.ply"
    columns = {n: ("f4", np.arange(4.0)) for n in "xyz"}
    for kind, values in (("i2", [-300, 0, 255, 30000]), ("f4", [-1, 0, 1, 1e30])):
        colours = {c: (kind, np.array(values)) for c in ("red", "green", "blue")}
        write_columns(path, {**columns, **colours})
        assert ply.read_ply(path)["rgb"][:, 0].tolist() == [0, 0, 1, 1]


# --- meshes ---


def gltf_tree(n=3, view=True, nodes=None, **accessor):
    position = {"componentType": 5126, "count": n, "type": "VEC3", **accessor}
    if view:
        position["bufferView"] = 0
    return {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes or [0])))}],
        "nodes": nodes or [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [position],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": 36}],
    }


TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()

BAD_MESHES = {
    "zeros.glb": glb(gltf_tree(10**9, view=False), TRIANGLE),
    "many.glb": glb(gltf_tree(10**12), TRIANGLE),
    "minus.glb": glb(gltf_tree(-(10**9), view=False), TRIANGLE),
    "words.glb": glb(gltf_tree("many", view=False), TRIANGLE),
    "outside.glb": glb(gltf_tree(3, byteOffset=10**9), TRIANGLE),
    "nan.glb": glb(gltf_tree(), np.full(9, np.nan, "<f4").tobytes()),
    "cut.glb": glb(gltf_tree(), TRIANGLE)[:-40],
    "short.glb": b"glTF",
    "chunk.glb": struct.pack("<4sIIII", b"glTF", 2, 20, 2**32 - 1, 0x4E4F534A),
    "zero.gltf": json.dumps(gltf_tree(10**9, view=False)).encode(),
    "list.gltf": b"[]",
    "deep.gltf": b"[" * 100_000,
    "counts.off": b"OFF\n1000000000000 1 0\n0 0 0\n3 0 0 0\n",
    "minus.off": b"OFF\n-1 -1 0\n0 0 0\n3 0 0 0\n",
    "index.off": b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 99999999999\n",
    "index.obj": b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 999999999999\n",
    "minus.obj": b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -9 -8 -7\n",
    "nan.obj": b"v nan nan nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
    "inf.obj": b"v 1e999 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
    "far.obj": b"v 1e200 0 0\nv 1 0 0\nv 0 1e200 0\nf 1 2 3\n",
    "far32.obj": b"v 1e60 0 0\nv 1 0 0\nv 0 1e60 0\nf 1 2 3\n",
    "words.obj": b"v a b c\nv 1 0 0\nf 1 1 1\n",
    "empty.obj": b"",
    "count.stl": bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(50),
    "short.stl": b"solid",
    "indices.ply": header(BINARY, ("vertex", 3, *XYZ), ("face", 1, *FACES))
    + THREE
    + struct.pack("<B3i", 3, 0, 1, 2**31 - 1),
    "zip.zip": b"PK\x03\x04",
    "x.3mf": b"PK\x03\x04",
    "x": b"v 0 0 0",
}


@pytest.mark.parametrize("name", BAD_MESHES)
def test_meshes_that_are_none(lods, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_MESHES[name])
    with pytest.raises(ValueError, match=f"{name}|initial points are not finite") as caught:
        start_from(path)
    one_line(caught)


def test_instances_are_counted(lods, tmp_path, monkeypatch):
    path = tmp_path / "many.glb"
    path.write_bytes(glb(gltf_tree(nodes=[{"mesh": 0}] * 50), TRIANGLE))
    assert start_from(path).count == 50
    mesh_file = importlib.import_module("lods.gaussians.mesh_file")
    monkeypatch.setattr(mesh_file, "MAX_VALUES", 199)  # 50 times 3 vertices and a triangle
    with pytest.raises(ValueError, match="instances have 200") as caught:
        start_from(path)
    one_line(caught)


@pytest.mark.parametrize("name", ["/dev/zero", "../secret.bin", "/proc/self/environ", "fifo"])
def test_a_mesh_reads_only_files_beside_it(lods, tmp_path, name):
    """A device would be read for ever."""
    folder = tmp_path / "mesh"
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    (tmp_path / "secret.bin").write_bytes(TRIANGLE)
    tree = gltf_tree()
    tree["buffers"][0]["uri"] = name
    path = folder / "a.gltf"
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="cannot be read as a mesh") as caught:
        start_from(path)
    one_line(caught)
    obj = folder / "a.obj"
    obj.write_text(f"mtllib {name}\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl m\nf 1 2 3\n")
    assert start_from(obj).count == 50  # the material is left out
    tree["buffers"][0]["uri"] = "good.bin"
    (folder / "good.bin").write_bytes(TRIANGLE)
    path.write_text(json.dumps(tree))
    assert start_from(path).count == 50


# --- memory ---

READ_ALL = """
import resource, sys
from pathlib import Path
from threestudio.utils.extensions import load_extension
load_extension(Path("custom/threestudio-lods"))
import threestudio

def start(path):
    cfg = {"init_type": "file", "file": {"path": str(path), "n_points": 50}}
    try:
        threestudio.find("lods-gaussians")(cfg)
    except ValueError as error:
        return str(error)

folder = Path(sys.argv[1])
start(folder / "good.obj")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(folder.iterdir()):
    message = start(path)
    if path.name != "good.obj":
        assert message, path
        assert "llocate" not in message and "emory" not in message, message
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
print("grown", grown // 1024, "MiB")
"""


def test_what_is_claimed_is_not_allocated(tmp_path):
    """All of the above in a process with 200 MB to spare: nothing fails for want of memory."""
    for i, content in enumerate(LIARS.values()):
        (tmp_path / f"liar{i}.ply").write_bytes(content)
    for name, content in BAD_MESHES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.split("grown ")[1].split()[0])
    assert grown < 100
