"""Colours and axes of mesh and ply files: what is written, and what is made of others' files."""

import base64
import importlib
import io
import json
import math

import numpy as np
import pytest
import torch
from lods.gaussians import mesh_file, mesh_parts, ply
from lods.threestudio.geometry import Gaussians
from PIL import Image
from plyfile import PlyData, PlyElement

from tests.glb_files import glb, linear, material_of, read_glb, shown

QUAD = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "<f4")
UV = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], "<f4")  # glTF's v points down the picture
TWO = np.array([0, 1, 2, 0, 2, 3], "<u2")


@pytest.fixture
def start():
    """``start(path, **settings of the file) -> (means, colours)`` of Gaussians that start there."""

    def make(path, n_points=400, **file):
        cfg = {"init_type": "file", "file": {"path": str(path), "n_points": n_points, **file}}
        geometry = Gaussians(cfg)
        return geometry.means.detach().numpy(), geometry.base_colors().detach().numpy()

    return make


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr("lods.log.warn", messages.append)
    return messages


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "png")
    return file.getvalue()


def scene(material=None, colors=None, picture=None, nodes=None, uv=UV, indices=TWO, **more):
    """A glb of the quad in z = 0: ``colors`` (4, C) as COLOR_0, ``picture`` as texture 0."""
    blob, views, accessors, attributes = b"", [], [], {}

    def add(array):
        nonlocal blob
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(array)})
        blob += array + bytes(-len(array) % 4)
        return len(views) - 1

    def accessor(array):
        kinds = {"<f4": 5126, "|u1": 5121, "<u2": 5123, "<u4": 5125}
        item = {"bufferView": add(array.tobytes()), "count": len(array)}
        item["componentType"] = kinds[array.dtype.str]
        width = array.shape[1] if array.ndim == 2 else 1
        item["type"] = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}[width]
        if array.dtype.kind == "u" and width > 1:
            item["normalized"] = True
        accessors.append(item)
        return len(accessors) - 1

    attributes["POSITION"] = accessor(QUAD)
    attributes["TEXCOORD_0"] = accessor(uv)
    if colors is not None:
        attributes["COLOR_0"] = accessor(np.ascontiguousarray(colors))
    primitive = {"attributes": attributes, "indices": accessor(indices)}
    tree = {"asset": {"version": "2.0"}, "scenes": [{"nodes": [0]}], "scene": 0}
    tree |= {"nodes": nodes or [{"mesh": 0}], "meshes": [{"primitives": [primitive]}]}
    if material is not None:
        primitive["material"] = 0
        tree["materials"] = [material]
    if picture is not None:
        tree["images"] = [{"bufferView": add(picture), "mimeType": "image/png"}]
        tree["textures"] = [{"source": 0}]
    tree |= {"accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": len(blob)}]}
    return glb({**tree, **more}, blob)


def pbr(**settings):
    return {"pbrMetallicRoughness": settings}


# --- glb, written -------------------------------------------------------------------------------


def test_a_mesh_of_gaussians_is_a_glb_that_viewers_show_as_it_is(tmp_path):
    mesh = importlib.import_module("threestudio.models.mesh").Mesh
    tetrahedron = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    made = mesh(tetrahedron, faces)
    colors = torch.tensor([[0.0, 0.5, 1.0], [139 / 255, 0.001, 0.03], [0.9, 0.2, 0.04], [2, -1, 0]])
    made.set_vertex_color(colors)
    path = tmp_path / "m.glb"
    mesh_file.write_mesh(path, tetrahedron, faces, colors, made.v_nrm)
    tree, attributes, indices = read_glb(path)
    assert np.array_equal(attributes["POSITION"], tetrahedron)
    assert np.array_equal(indices, faces)
    assert np.allclose(attributes["NORMAL"], made.v_nrm, atol=1e-6)
    written = attributes["COLOR_0"][:, :3]
    assert np.abs(shown(written) - colors.clamp(0, 1).numpy()).max() < 0.1 / 255
    assert written[1, 0] == pytest.approx(0.2582, abs=1e-4)  # 139 of 255
    pbr = material_of(tree)["pbrMetallicRoughness"]
    assert (pbr["metallicFactor"], pbr["roughnessFactor"]) == (0, 1)
    # the host has a writer of its own, because upstream does not: they are to agree
    save = importlib.import_module("threestudio.utils.saving_mesh").write
    arrays = (tetrahedron, faces, made.v_nrm, colors)
    save(tmp_path / "host.glb", *(array.numpy() for array in arrays))
    assert (tmp_path / "host.glb").read_bytes() == path.read_bytes()


# --- glTF, read ---------------------------------------------------------------------------------

LIGHT = np.array([[0.2, 0.0, 0.9], [0.2, 0.0, 0.9], [0.2, 0.0, 0.9], [0.2, 0.0, 0.9]])
COLOURED = {
    "floats": LIGHT.astype("<f4"),
    "floats with alpha": np.c_[LIGHT, np.ones(4)].astype("<f4"),
    "16 bits": np.c_[LIGHT * 65535, np.full(4, 65535)].round().astype("<u2"),
    "bytes": np.c_[LIGHT * 255, np.full(4, 255)].round().astype("|u1"),
}


@pytest.mark.parametrize("material", [None, {}, pbr(metallicFactor=0.0)])
@pytest.mark.parametrize("colors", COLOURED.values(), ids=COLOURED)
def test_vertex_colours_of_gltf_are_linear_and_stand_beside_a_material(
    start, tmp_path, colors, material
):
    (tmp_path / "a.glb").write_bytes(scene(material, colors))
    assert np.allclose(start(tmp_path / "a.glb")[1], shown(LIGHT[0]), atol=2e-3)


def test_factor_picture_and_vertex_colours_of_gltf_are_multiplied_as_light(start, tmp_path):
    picture = png(np.full((2, 2, 3), [100, 200, 255]))
    material = pbr(baseColorFactor=[0.5, 0.8, 0.1, 1], baseColorTexture={"index": 0})
    (tmp_path / "a.glb").write_bytes(scene(material, LIGHT.astype("<f4"), picture))
    light = linear(np.array([100, 200, 255]) / 255) * [0.5, 0.8, 0.1] * LIGHT[0]
    assert np.allclose(start(tmp_path / "a.glb")[1], shown(light), atol=1e-3)


@pytest.mark.parametrize("factor, seen", [(0.2, 0.4845), (0.0, 0.0), (0.0078, 0.0848), (None, 1.0)])
def test_a_factor_of_gltf_is_linear(start, tmp_path, factor, seen):
    """0.2 is shown as 0.484 (IEC 61966-2-1), and no factor as white."""
    factor = {} if factor is None else {"baseColorFactor": [factor] * 3 + [1]}
    (tmp_path / "a.glb").write_bytes(scene(pbr(**factor)))
    assert np.allclose(start(tmp_path / "a.glb")[1], seen, atol=1e-3)


def test_a_mesh_without_colours_is_grey(start, tmp_path):
    (tmp_path / "a.glb").write_bytes(scene())
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    for name in ("a.glb", "a.obj"):
        assert np.allclose(start(tmp_path / name)[1], 0.5, atol=1e-5)


FOUR = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]])


def quarters(means, axes=(1, 2)):
    """Index of FOUR for points of the quad away from the middle; x to the right, y down."""
    x, y = means[:, axes[0]], means[:, axes[1]]
    middle = np.maximum(abs(x - 0.5), abs(y - 0.5)), np.minimum(abs(x - 0.5), abs(y - 0.5))
    return (middle[0] < 0.46) & (middle[1] > 0.04), (y > 0.5) * 1, (x > 0.5) * 1


@pytest.mark.parametrize("kind", ["gltf", "obj"])
def test_a_picture_is_seen_where_it_is_not_at_the_vertices_only(start, tmp_path, kind):
    """A quad has four vertices, and at all of them another quarter of the picture is seen."""
    big = np.repeat(np.repeat(FOUR, 8, 0), 8, 1)
    if kind == "gltf":
        path = tmp_path / "a.glb"
        path.write_bytes(scene(pbr(baseColorTexture={"index": 0}), picture=png(big)))
    else:
        path = tmp_path / "a.obj"
        (tmp_path / "t.png").write_bytes(png(big))
        (tmp_path / "a.mtl").write_text("newmtl m\nKd 0.3 0.3 0.3\nmap_Kd t.png\n")
        rows = "".join(f"v {x} {y} 0\nvt {u} {1 - v}\n" for (x, y, _), (u, v) in zip(QUAD, UV))
        path.write_text(f"mtllib a.mtl\n{rows}usemtl m\nf 1/1 2/2 3/3 4/4\n")
    means, colors = start(path, n_points=2000, front="+x", up="+z")
    clear, row, column = quarters(means, (0, 1))
    assert clear.sum() > 300
    assert np.allclose(colors[clear], FOUR[row, column][clear] / 255, atol=0.02)


@pytest.mark.parametrize(
    "wrap, column", [(10497, [0, 1, 0, 1]), (33071, [0, 1, 1, 1]), (33648, [0, 1, 1, 0])]
)
def test_pictures_go_on_as_the_sampler_says(start, tmp_path, wrap, column):
    big = np.repeat(np.repeat(FOUR[:1], 8, 0), 8, 1)
    tree = {"samplers": [{"wrapS": wrap}], "textures": [{"source": 0, "sampler": 0}]}
    material = pbr(baseColorTexture={"index": 0})
    content = scene(material, picture=png(big), uv=(UV * [2, 1]).astype("<f4"), **tree)
    (tmp_path / "a.glb").write_bytes(content)
    means, colors = start(tmp_path / "a.glb", n_points=1000, front="+x", up="+z")
    quarter = (means[:, 0] * 4).clip(0, 3.999)
    clear = abs(quarter % 1 - 0.5) < 0.3
    expected = FOUR[0, np.array(column)[quarter.astype(int)]] / 255
    assert np.allclose(colors[clear], expected[clear], atol=0.02)


def test_a_picture_can_be_moved(start, tmp_path):
    """KHR_texture_transform: scaled, turned counter-clockwise by a right angle, and moved, so that
    the quad shows the upper left quarter turned: u' = v / 2, v' = 1/2 - u / 2."""
    big = np.repeat(np.repeat(FOUR, 8, 0), 8, 1)
    transform = {"offset": [0, 0.5], "rotation": math.pi / 2, "scale": [0.5, 0.5]}
    texture = {"index": 0, "extensions": {"KHR_texture_transform": transform}}
    (tmp_path / "a.glb").write_bytes(scene(pbr(baseColorTexture=texture), picture=png(big)))
    means, colors = start(tmp_path / "a.glb", front="+x", up="+z")
    inner = (abs(means[:, :2] - 0.5) < 0.4).all(1)
    assert np.allclose(colors[inner], FOUR[0, 0] / 255, atol=0.02)


def test_nodes_are_placed_by_their_parents(start, tmp_path):
    half = math.sqrt(0.5)
    nodes = [
        {"children": [1, 2], "translation": [10, 0, 0], "scale": [2, 2, 2]},
        {"mesh": 0, "rotation": [0, 0, half, half]},  # a quarter turn about z: x to y
        {"mesh": 0, "matrix": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 5, 1]},
    ]
    (tmp_path / "a.glb").write_bytes(scene(nodes=nodes))
    means, _ = start(tmp_path / "a.glb", front="+x", up="+z", n_points=2000)
    low, high = means[means[:, 2] < 5], means[means[:, 2] >= 5]
    assert np.allclose([low.min(0), low.max(0)], [[8, 0, 0], [10, 2, 0]], atol=0.05)
    assert np.allclose([high.min(0), high.max(0)], [[10, 0, 10], [12, 2, 10]], atol=0.05)


@pytest.mark.parametrize(
    "mode, indices", [(5, [0, 1, 3, 2]), (6, [0, 1, 2, 3]), (4, [0, 1, 2, 0, 2, 3])]
)
def test_strips_and_fans_are_triangles(tmp_path, mode, indices):
    content = scene(indices=np.array(indices, "|u1"))
    path = tmp_path / "a.glb"
    path.write_bytes(content.replace(b'"attributes"', b'"mode": %d, "attributes"' % mode))
    size = len(path.read_bytes()) - len(content)
    data = bytearray(path.read_bytes())
    text = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little") + size])
    blob = bytes(data[-text["buffers"][0]["byteLength"] :])
    path.write_bytes(glb(text, blob))
    [made] = mesh_file.read_mesh(path)
    assert made.areas().tolist() == [0.5, 0.5]


def test_gltf_is_y_up_unless_said_otherwise(start, tmp_path):
    """A box 1 wide, 3 high and 5 deep; and a file of ours is where it was."""
    tree = scene(nodes=[{"mesh": 0, "scale": [2, 6, 1]}])
    (tmp_path / "a.glb").write_bytes(tree)
    means, _ = start(tmp_path / "a.glb")
    assert np.allclose(np.ptp(means, axis=0), [0, 2, 6], atol=0.1)  # it faces the front, +x
    means, _ = start(tmp_path / "a.glb", front="+x", up="+z")
    assert np.allclose(np.ptp(means, axis=0), [2, 6, 0], atol=0.1)
    xyz = torch.tensor([[0.5, 0, 0], [0, 0.3, 0], [0, 0, 0.9], [0.1, 0.1, 0.1]])
    faces = torch.tensor([[0, 1, 2], [1, 2, 3]])
    color = torch.tensor([[0.2, 0.5, 0.7]]).expand(4, 3)
    mesh_file.write_mesh(tmp_path / "b.glb", xyz[:, [1, 2, 0]], faces, color)
    means, colors = start(tmp_path / "b.glb", n_points=4000)
    assert np.allclose([means.min(0), means.max(0)], [[0, 0, 0], [0.5, 0.3, 0.9]], atol=0.05)
    assert np.allclose(colors, color[0], atol=1e-4)


# --- obj and ply, read --------------------------------------------------------------------------

TRIANGLE = [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
TEXTURED = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nusemtl m\nf 1/1 2/1 3/1\n"


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize(
    "mtl, seen",
    [
        (None, [0.2, 0.4, 0.6]),
        ("newmtl m\nKs 0 0 0\n", [0.2, 0.4, 0.6]),
        ("newmtl m\nKd 1 1 1\n", [0.2, 0.4, 0.6]),
        ("newmtl m\nKd 1 0.5 0\n", [0.2, float(shown(linear(0.4) * linear(128 / 255))), 0]),
    ],
)
def test_vertex_colours_of_obj_stand_beside_a_material(start, tmp_path, mtl, seen, scale):
    rgb = " ".join(str(scale * value) for value in (0.2, 0.4, 0.6))
    head = "" if mtl is None else "mtllib a.mtl\nusemtl m\n"
    (tmp_path / "a.mtl").write_text(mtl or "")
    rows = "".join(f"v {x} {y} {z} {rgb}\n" for x, y, z in TRIANGLE)
    (tmp_path / "a.obj").write_text(f"{rows}{head}f 1 2 3\n")
    assert np.allclose(start(tmp_path / "a.obj")[1], seen, atol=3e-3)


def write_ply(path, values, kinds, faces=False):
    data = np.empty(len(values), dtype=list(zip(["x", "y", "z", "red", "green", "blue"], kinds)))
    for name, column in zip(data.dtype.names, np.array(values, float).T):
        data[name] = column
    elements = [PlyElement.describe(data, "vertex")]
    if faces:
        corners = np.array([([0, 1, 2],)], dtype=[("vertex_indices", "i4", (3,))])
        elements.append(PlyElement.describe(corners, "face"))
    PlyData(elements).write(str(path))


@pytest.mark.parametrize("faces", [False, True])
@pytest.mark.parametrize("kind, scale", [("u1", 255), ("f4", 255), ("f4", 1), ("u2", 65535)])
def test_colours_of_a_ply_have_any_range(start, tmp_path, kind, scale, faces):
    rgb = np.array([0.2, 0.6, 1.0])
    rows = [[*point, *(rgb * scale)] for point in [*TRIANGLE, [1, 1, 0]]]
    write_ply(tmp_path / "a.ply", rows, ["f4"] * 3 + [kind] * 3, faces)
    _, colors = start(tmp_path / "a.ply")
    assert len(colors) == (400 if faces else 4)
    assert np.allclose(colors, rgb, atol=3e-3)


def test_rows_of_a_ply_that_are_not_finite_are_left_out_and_counted(start, tmp_path, said):
    rows = [[*point, 9, 9, 9] for point in [*TRIANGLE, [1, 1, 0], [math.nan, 0, 0]]]
    write_ply(tmp_path / "a.ply", rows, ["f4"] * 3 + ["u1"] * 3)
    assert len(start(tmp_path / "a.ply")[0]) == 4
    assert len(said) == 1 and "1 of 5 points are not finite in float32, and are left" in said[0]
    # a mesh: the triangle that has it
    corners = np.array([([0, 1, 2],), ([1, 2, 4],)], dtype=[("vertex_indices", "i4", (3,))])
    vertex = PlyData.read(str(tmp_path / "a.ply"))["vertex"]
    PlyData([vertex, PlyElement.describe(corners, "face")]).write(str(tmp_path / "b.ply"))
    means, _ = start(tmp_path / "b.ply")
    assert np.isfinite(means).all() and (means[:, :2].sum(1) <= 1 + 1e-6).all()
    assert len(said) == 2 and "1 of 2 triangles are not finite" in said[1]
    # Gaussians
    data = np.ones(5, dtype=[(name, "f8") for name in ply.gaussian_properties(0)])
    data["opacity"][0], data["y"][1], data["scale_2"][2] = math.nan, math.inf, 300
    for i in range(4):
        data[f"rot_{i}"][3] = 0
    data["x"] = range(5)
    PlyData([PlyElement.describe(data, "vertex")]).write(str(tmp_path / "c.ply"))
    assert start(tmp_path / "c.ply")[0][:, 0].tolist() == [4]
    assert ["2 of 5" in said[2], "length 0" in said[3], "beyond float32" in said[4]] == [True] * 3


def test_a_compressed_ply_whose_chunks_do_not_fit_is_named(tmp_path):
    names = ["packed_position", "packed_rotation", "packed_scale", "packed_color"]
    vertex = np.zeros(257, dtype=[(name, "u4") for name in names])
    chunk = np.zeros(1, dtype=[(f"{end}_{axis}", "f4") for end in ("min", "max") for axis in "xyz"])
    elements = [PlyElement.describe(chunk, "chunk"), PlyElement.describe(vertex, "vertex")]
    for count, said in ((257, "it has 1 chunks for 257 Gaussians"), (256, "min_scale_x")):
        elements[1].data = vertex[:count]
        PlyData(elements).write(str(tmp_path / "a.ply"))
        with pytest.raises(ValueError, match=f"not a readable compressed ply: .*{said}") as caught:
            ply.read_ply(tmp_path / "a.ply")
        assert "\n" not in str(caught.value)


# --- files that ask for too much ----------------------------------------------------------------


def refused(start, path, message):
    with pytest.raises(ValueError, match=message) as caught:
        start(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert len(str(caught.value).replace(str(path), "")) < 250


def test_indices_out_of_range_are_named(start, tmp_path):
    path = tmp_path / "a.glb"
    for indices, message in (
        (np.array([0, 1, 4], "<u2"), "a triangle of vertex 4, and 4 vertices"),
        (np.array([0, 1, 2**32 - 1], "<u4"), "a triangle of vertex 4294967295"),
    ):
        path.write_bytes(scene(indices=indices))
        refused(start, path, message)


WRONG = {
    "a node twice": {"nodes": [{"children": [1, 1]}, {"mesh": 0}]},
    "a node in itself": {"nodes": [{"children": [0], "mesh": 0}]},
    "no such mesh": {"nodes": [{"mesh": 7}]},
    "minus one": {"nodes": [{"mesh": -1}]},
    "no such node": {"scenes": [{"nodes": [3]}]},
    "no such scene": {"scene": 3},
    "no such material": {"material": {}, "materials": []},
    "no such texture": {"material": pbr(baseColorTexture={"index": 5})},
    "no such image": {"material": pbr(baseColorTexture={"index": 0}), "textures": [{"source": 9}]},
    "not a picture": {"material": pbr(baseColorTexture={"index": 0}), "picture": b"no picture"},
    "a short factor": {"material": pbr(baseColorFactor=[1])},
    "words as a factor": {"material": pbr(baseColorFactor=["red", 1, 1, 1])},
    "no such view": {"bufferViews": []},
    "no such buffer": {"buffers": []},
    "a view too long": {"buffers": [{"byteLength": 8}], "bufferViews": [{"byteLength": 10**9}]},
    "nothing": {"accessors": []},
    "version 1": {"asset": {"version": "1.0"}},
    "few colours": {"colors": LIGHT[:3].astype("<f4")},
    "a matrix of 3": {"nodes": [{"mesh": 0, "matrix": [1, 2, 3]}]},
    "words as a place": {"nodes": [{"mesh": 0, "translation": ["here", 0, 0]}]},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_gltf_that_contradicts_itself_is_one_line(start, tmp_path, wrong):
    path = tmp_path / "a.glb"
    path.write_bytes(scene(**wrong))
    refused(start, path, r"cannot be read as a mesh: .")


@pytest.mark.parametrize("kind", ["gltf", "obj"])
@pytest.mark.parametrize("side", [9000, 13000])
def test_pictures_that_are_too_large_are_not_decoded(start, tmp_path, kind, side, monkeypatch):
    def decode(*args):
        raise AssertionError("decoded")

    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "png")
    monkeypatch.setattr(Image.Image, "convert", decode)
    if kind == "gltf":
        path = tmp_path / "a.glb"
        path.write_bytes(scene(pbr(baseColorTexture={"index": 0}), picture=file.getvalue()))
    else:
        path = tmp_path / "a.obj"
        (tmp_path / "t.png").write_bytes(file.getvalue())
        (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd t.png\n")
        path.write_text(
            "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nusemtl m\nf 1/1 2/1 3/1\n"
        )
    refused(start, path, f"picture has {side} x {side} pixels")


def test_many_large_pictures_are_counted_together():
    parts = mesh_parts
    image = Image.new("L", (8192, 8192))
    made = [parts.Part(QUAD, TWO.reshape(2, 3), picture=parts.Picture(image)) for _ in range(5)]
    parts.check_pictures(made[:4])
    with pytest.raises(ValueError, match="its 5 pictures have 335544320 pixels"):
        parts.check_pictures(made)
    for one in made:  # the same for all is one
        one.picture = made[0].picture
    parts.check_pictures(made)


def test_many_primitives_take_no_time(start, tmp_path):
    """20,000 of them on one set of vertices, each with a material of its own."""
    import time

    data = scene(pbr(baseColorFactor=[1, 0, 0, 1]))
    size = int.from_bytes(data[12:16], "little")
    tree, blob = json.loads(data[20 : 20 + size]), data[28 + size :]
    [primitive] = tree["meshes"][0]["primitives"]
    n = 20_000
    tree["meshes"][0]["primitives"] = [{**primitive, "material": i} for i in range(n)]
    tree["materials"] = tree["materials"] * n
    (tmp_path / "a.glb").write_bytes(glb(tree, blob))
    before = time.process_time()
    means, colors = start(tmp_path / "a.glb", n_points=1000)
    assert time.process_time() - before < 6
    assert np.allclose(colors, [1, 0, 0], atol=1e-6) and len(means) == 1000


def test_an_obj_of_very_many_materials_is_refused(start, tmp_path):
    rows = "v 0 0 0\n" * 70_000 + "".join(f"usemtl m{i}\nf 1 2 3\n" for i in range(70_000))
    (tmp_path / "a.obj").write_text(rows)
    refused(start, tmp_path / "a.obj", "has 70000 materials and 70000 vertices")


def test_compressed_meshes_are_named(start, tmp_path):
    data = scene()
    size = int.from_bytes(data[12:16], "little")
    tree, blob = json.loads(data[20 : 20 + size]), data[28 + size :]
    [primitive] = tree["meshes"][0]["primitives"]
    primitive["extensions"] = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {}}}
    (tmp_path / "a.glb").write_bytes(glb(tree, blob))
    refused(start, tmp_path / "a.glb", "compressed by KHR_draco_mesh_compression: save it without")


@pytest.mark.parametrize(
    "name", ["../t.png", "{folder}/t.png", "file://{folder}/t.png", "link.png"]
)
def test_pictures_elsewhere_are_not_followed(start, tmp_path, said, name):
    inside = tmp_path / "mesh"
    inside.mkdir()
    (tmp_path / "t.png").write_bytes(png(np.full((2, 2, 3), 200)))
    (inside / "link.png").symlink_to(tmp_path / "t.png")
    name = name.format(folder=tmp_path)
    (inside / "a.mtl").write_text(f"newmtl m\nKd 0 1 0\nmap_Kd {name}\n")
    (inside / "a.obj").write_text(TEXTURED)
    assert np.allclose(start(inside / "a.obj")[1], [0, 1, 0], atol=1e-6)
    assert len(said) == 1 and "which is not a file in its folder" in said[0]
    (inside / "a.glb").write_bytes(
        scene(pbr(baseColorTexture={"index": 0}), textures=[{"source": 0}], images=[{"uri": name}])
    )
    refused(start, inside / "a.glb", "which is not a file in its folder")


def test_pictures_in_the_text_and_beside_are_read(start, tmp_path):
    picture = png(np.full((2, 2, 3), [0, 0, 255]))
    (tmp_path / "a b.png").write_bytes(picture)
    for uri in ("a%20b.png", "data:image/png;base64," + base64.b64encode(picture).decode()):
        content = scene(
            pbr(baseColorTexture={"index": 0}), textures=[{"source": 0}], images=[{"uri": uri}]
        )
        (tmp_path / "a.glb").write_bytes(content)
        assert np.allclose(start(tmp_path / "a.glb")[1], [0, 0, 1], atol=1e-6)
