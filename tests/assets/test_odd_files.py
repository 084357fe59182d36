"""What is no attack and goes wrong all the same: names, disks, memory, what cannot be written."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from lods import assets
from lods.assets import Mesh
from lods.gaussians import Gaussians, mesh_file, mesh_parts
from PIL import Image

from tests.assets.test_hostile import refused_or_whole
from tests.assets.test_meshes import CORNERS, GREEN_GREY, ONE, RED_BLUE, SQUARE, UV, gltf
from tests.assets.things import shell

MESHES = (".glb", ".obj", ".ply", ".stl")
GAUSSIANS = (".ply", ".compressed.ply", ".splat", ".spz")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EndProlog\nshowpage\n"


def square(textured=True):
    points, faces = torch.from_numpy(SQUARE.copy()), torch.from_numpy(CORNERS.astype(np.int64))
    if not textured:
        return Mesh(points, faces)
    return Mesh(points, faces, torch.from_numpy(UV.copy()), torch.rand(8, 8, 3))


def stored(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 300 + ".glb", "~nobody-of-this-name.glb"])
def test_a_name_that_no_file_can_have_is_no_file(name):
    with pytest.raises(ValueError, match="there is no file '"):
        assets.read(name)


def test_a_name_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assets.write("~square.glb", square())
    assert len(assets.read("~square.glb").faces) == 2


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("a.splat", PermissionError(13, "Permission denied", "a.splat"), "a.splat: Permission den"),
        ("a.spz", OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        ("a.ply", MemoryError(), "takes more memory than there is"),
        ("a.glb", MemoryError(), "takes more memory than there is"),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, name, error, text):
    def fail(*args, **kwargs):
        raise error

    where = "read_gaussians" if name != "a.glb" else "read_mesh"
    monkeypatch.setattr(f"lods.assets.reading.{where}", fail)
    (tmp_path / name).write_bytes(bytes(64))
    assert text in refused_or_whole(tmp_path / name)


def test_a_file_that_many_buffers_name_is_read_once(tmp_path, monkeypatch):
    names, real = [], mesh_file._file_beside
    monkeypatch.setattr(
        mesh_file, "_file_beside", lambda path, name: names.append(name) or real(path, name)
    )
    count = 50
    tree = {
        "asset": {"version": "2.0"},
        "nodes": [{"mesh": 0}],
        "buffers": [{"byteLength": 36, "uri": "big.bin"}] * count,
        "bufferViews": [{"buffer": i, "byteLength": 36} for i in range(count)],
        "accessors": [
            {"bufferView": i, "componentType": 5126, "count": 3, "type": "VEC3"}
            for i in range(count)
        ],
        "meshes": [{"primitives": [{"attributes": {"POSITION": i}} for i in range(count)]}],
    }
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    (tmp_path / "big.bin").write_bytes(SQUARE[:3].tobytes())
    assert len(assets.read(tmp_path / "a.gltf").faces) == count
    assert names == ["big.bin"]


@pytest.mark.parametrize("sparse", [False, True])
def test_accessors_without_data_claim_no_more_together_than_the_file_has_bytes(tmp_path, sparse):
    rows = {"count": 1, "indices": {"bufferView": 0, "componentType": 5121}}
    rows["values"] = {"bufferView": 0}
    accessor = {"componentType": 5126, "count": 5000, "type": "VEC3"}
    accessor |= {"sparse": rows} if sparse else {}
    tree = {
        "asset": {"version": "2.0"},
        "nodes": [{"mesh": 0}],
        "buffers": [{"byteLength": 12, "uri": "data:;base64," + "A" * 16}],
        "bufferViews": [{"buffer": 0, "byteLength": 12}],
        "accessors": [accessor] * 40,
        "extras": "x" * 5000,
        "meshes": [{"primitives": [{"attributes": {"POSITION": i}} for i in range(40)]}],
    }
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    assert 5000 < (tmp_path / "a.gltf").stat().st_size < 40 * 5000  # enough for one of them
    assert "claims 5000 items without any data" in refused_or_whole(tmp_path / "a.gltf")


def test_no_program_is_run_for_a_picture(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript."""

    def run(*args, **kwargs):
        raise AssertionError("a file shall not run programs")

    monkeypatch.setattr("subprocess.check_call", run)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    gltf(tmp_path / "a.glb", [(SQUARE, UV, None, (ONE, EPS, {}))])
    assert "of no known format" in refused_or_whole(tmp_path / "a.glb")


def test_one_large_picture_is_not_copied_again_and_again(tmp_path):
    """Beside the texture in floats there are the decoded bytes, twice at most."""
    pixels = np.zeros((1024, 1024, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "t.png")
    gltf(tmp_path / "a.glb", [(SQUARE, UV, None, (ONE, (tmp_path / "t.png").read_bytes(), {}))])
    assets.read(tmp_path / "a.glb")  # with what it imports
    tracemalloc.start()
    try:
        texture = assets.read(tmp_path / "a.glb").texture
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = texture.numpy().nbytes
    assert size == 12 * 1024 * 1024 and peak < 1.8 * size


def test_a_surface_is_painted_piece_by_piece(tmp_path, monkeypatch):
    """With the same colours; the memory is that of the texture and of what lays it out."""
    monkeypatch.setattr("lods.assets.atlas.SIDE", 256)
    part = (SQUARE, 3 * UV, None, (ONE, RED_BLUE, {}))  # a picture that repeats
    gltf(tmp_path / "a.glb", [part])
    sizes, real = [], mesh_parts.Part.colors
    monkeypatch.setattr(mesh_parts.Part, "colors", lambda *a: sizes.append(len(a[1])) or real(*a))
    whole = assets.read(tmp_path / "a.glb").texture
    assert len(sizes) == 1 and sizes[0] > 40_000
    monkeypatch.setattr("lods.assets.atlas.BATCH", 1000)
    pieces = assets.read(tmp_path / "a.glb").texture
    assert max(sizes[1:]) <= 1000 and sum(sizes[1:]) == sizes[0]
    assert torch.equal(whole, pieces)


def test_around_a_tile_is_its_own_border(tmp_path):
    """So that filters mix in no colour of a neighbour."""
    parts = [(SQUARE, UV, None, (ONE, RED_BLUE, {})), (SQUARE + 2, UV, None, (ONE, GREEN_GREY, {}))]
    found = assets.read(gltf(tmp_path / "a.glb", parts))
    texture = (255 * found.texture).round().to(torch.uint8).numpy()
    corner = found.uv.reshape(2, 4, 2).amin(1).numpy()  # the lower left one of each tile
    height, width = texture.shape[:2]
    for (u, v), left in zip(corner, ((200, 30, 20), (20, 180, 40))):
        column, below = round(float(u) * width), round(float(1 - v) * height)
        assert (texture[below - 4 : below + 4, column - 4 : column + 4] == left).all()


TRIANGLE = """ply
format ascii 1.0
comment TextureFile {}
element vertex 3
property float x
property float y
property float z
element face {}
property list uchar int vertex_indices
end_header
0 0 0
1 0 0
0 1 0
"""


def test_what_the_libraries_say_does_not_come_between(tmp_path, capfd, recwarn, monkeypatch):
    """trimesh logs a traceback for a picture, and numpy warns where there is nothing."""
    said: list = []
    monkeypatch.setattr("lods.log.warn", said.append)
    (tmp_path / "a.ply").write_text(TRIANGLE.format("none.png", 1) + "3 0 1 2\n")
    assert len(assets.read(tmp_path / "a.ply").faces) == 1
    (tmp_path / "b.ply").write_text(TRIANGLE.format("none.png", 2) + "0\n0\n")
    assert refused_or_whole(tmp_path / "b.ply")
    huge = [{"children": [i + 1], "scale": [1e30] * 3} for i in range(30)] + [{"mesh": 0}]
    gltf(tmp_path / "d.glb", [(SQUARE, None, None, (ONE, None, {}))], huge)
    assert refused_or_whole(tmp_path / "d.glb")
    far = shell(5).export()
    far["means"] = far["means"].sign() * 3e38
    assets.write(tmp_path / "c.compressed.ply", Gaussians(far))
    assert not recwarn.list and capfd.readouterr() == ("", "")
    [line] = said
    assert "is read without some of its colours" in line and "'none.png'" in line


def test_a_header_of_very_many_lines_is_refused(tmp_path):
    rows = "".join(f"element a{i} 0\n" for i in range(20_000))
    (tmp_path / "a.ply").write_text(f"ply\nformat ascii 1.0\n{rows}end_header\n")
    assert "its header has 20002 lines, of which 10000 are read" in refused_or_whole(
        tmp_path / "a.ply"
    )


@pytest.mark.parametrize("end", [".obj", ".glb"])
def test_a_mesh_far_from_its_origin_keeps_its_shape(tmp_path, end):
    """As surveyors have them: in metres, thousands of kilometres away."""
    away = np.array([500_000.0, 4_649_776.0, 30.0])
    if end == ".obj":
        rows = "".join("v {} {} {}\n".format(*(0.01 * point + away)) for point in SQUARE)
        (tmp_path / "a.obj").write_text(f"{rows}f 1 2 3\nf 1 3 4\n")
    else:
        node = {"mesh": 0, "translation": away.tolist(), "scale": [0.01] * 3}
        gltf(tmp_path / "a.glb", [(SQUARE, None, None, (ONE, None, {}))], [node])
    found = assets.read(tmp_path / f"a{end}")
    assert found.vertices.dtype == torch.float32
    axes = [0, 1, 2] if end == ".obj" else [2, 0, 1]
    wanted = 0.87 * (2 * SQUARE - 1)[:, axes] * (SQUARE.max(0) > 0)[axes]
    np.testing.assert_allclose(found.vertices, wanted, atol=1e-5)


def test_gaussians_that_grow_beyond_floats_with_their_scene_are_left_out(tmp_path, monkeypatch):
    said: list = []
    monkeypatch.setattr("lods.log.warn", said.append)
    tiny = shell(20).export()
    tiny["means"] = tiny["means"] * 1e-30
    tiny["scales"][:] = -72.0
    tiny["scales"][:3] = 60.0
    assets.write(tmp_path / "a.ply", Gaussians(tiny))
    found = assets.read(tmp_path / "a.ply")
    assert found.count == 17 and found.scales.exp().isfinite().all()
    assert "3 Gaussians are too large and left out" in said[0]
    tiny["scales"][:] = 60.0
    assets.write(tmp_path / "b.ply", Gaussians(tiny))
    assert "too large for where they are" in refused_or_whole(tmp_path / "b.ply")


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "end"), [*(("mesh", end) for end in MESHES), *(("cloud", end) for end in GAUSSIANS)]
)
def test_nothing_is_not_written(tmp_path, kind, end):
    if kind == "mesh":
        whole = square(False)
        empty = [Mesh(whole.vertices, whole.faces[:0]), Mesh(whole.vertices * np.nan, whole.faces)]
    else:
        values = shell(5).export()
        empty = [
            Gaussians({name: value[:0] for name, value in values.items()}),
            Gaussians({name: value * np.nan for name, value in values.items()}),
        ]
    for each in empty:
        with pytest.raises(ValueError, match=r"nothing to write|no triangles to write") as caught:
            assets.write(tmp_path / f"a{end}", each)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", MESHES)
def test_triangles_that_are_not_finite_are_not_written(tmp_path, monkeypatch, end):
    said: list = []
    monkeypatch.setattr("lods.log.warn", said.append)
    mesh = square()
    mesh.vertices[3, 0] = np.nan
    assets.write(tmp_path / f"a{end}", mesh)
    assert "1 triangles are not finite and left out" in said[0]
    found = assets.read(tmp_path / f"a{end}", half_side=None)
    assert len(said) == 1 and len(found.faces) == 1 and len(found.vertices) == 3


def test_an_obj_is_replaced_with_its_texture_or_not_at_all(tmp_path, monkeypatch):
    assets.write(tmp_path / "a.obj", square())
    before = stored(tmp_path)
    assert before.keys() == {"a.obj", "a.mtl", "a.png"}
    rows = "lods.assets.writing._rows"  # of the last of the files

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rows, full)
        with pytest.raises(OSError, match=r"No space left on device: '.*a\.obj'"):
            assets.write(tmp_path / "a.obj", square())
    assert stored(tmp_path) == before
    assets.write(tmp_path / "a.obj", square())  # over its own
    after = stored(tmp_path)
    assert after.keys() == before.keys() and after["a.png"] != before["a.png"]


def test_an_obj_does_not_go_over_the_picture_of_somebody(tmp_path):
    (tmp_path / "armchair.png").write_bytes(RED_BLUE)
    with pytest.raises(ValueError, match=r"would go over '.*armchair\.png', which is"):
        assets.write(tmp_path / "armchair.obj", square())
    assert stored(tmp_path) == {"armchair.png": RED_BLUE}
    assets.write(tmp_path / "armchair.obj", square(False))  # which has no texture
    assert stored(tmp_path).keys() == {"armchair.png", "armchair.obj"}


@pytest.mark.parametrize("end", [".glb", ".obj", ".splat"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, end):
    (tmp_path / "elsewhere").write_text("mine")
    path = tmp_path / f"a{end}"
    path.symlink_to(tmp_path / "elsewhere")
    assets.write(path, shell(5) if end == ".splat" else square())
    assert (tmp_path / "elsewhere").read_text() == "mine" and not path.is_symlink()
    assets.write(path, assets.read(path))  # over what was read


def test_a_disk_that_can_only_be_read_is_named_by_the_file(tmp_path, monkeypatch):
    """Which cannot be removed there either."""

    def read_only(path, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("lods.files.os.open", read_only)
    monkeypatch.setattr("pathlib.Path.unlink", read_only)
    with pytest.raises(OSError) as caught:
        assets.write(tmp_path / "a.ply", shell(5))
    assert caught.value.filename == str(tmp_path / "a.ply")


def test_a_name_that_an_obj_cannot_refer_to_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a\\nb.obj' cannot be named in an obj"):
        assets.write(tmp_path / "a\nb.obj", square())
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_disk_names_the_file(tmp_path):
    from lods.files import told, whole_file

    for error in (OSError(28, "No space left on device"), OSError("20 requested and 7 written")):
        with pytest.raises(OSError) as caught, whole_file(tmp_path / "new"):
            raise error
        assert told(caught.value).startswith(f"{tmp_path / 'new'}: ")
    with pytest.raises(OSError, match="No space left") as caught, whole_file(tmp_path / "new"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # safetensors'
    assert told(caught.value) == f"{tmp_path / 'new'}: No space left on device"
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "new") as partial:
        raise OSError(28, "No space left on device", "source", None, partial)  # shutil.copyfile's
    assert told(caught.value) == f"{tmp_path / 'new'}: No space left on device"
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "new"):
        (tmp_path / "none").read_bytes()
    assert told(caught.value) == f"{tmp_path / 'none'}: No such file or directory"
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
