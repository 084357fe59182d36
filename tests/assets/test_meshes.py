"""Meshes from files: their materials, textures and vertex colours, and back into their scene."""

import io
import itertools

import numpy as np
import pytest
import torch
import trimesh
from lods import assets
from lods.assets.mesh import sampled
from PIL import Image
from plyfile import PlyData, PlyElement

from tests.assets.things import ball, chart_mesh, psnr
from tests.glb_files import glb, linear
from tests.mesh_render import draw

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "<f4")
CORNERS = np.array([[0, 1, 2], [0, 2, 3]], "<u2")
UV = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], "<f4")  # glTF's: v points down


def picture(colors, side=8):
    """A PNG whose left and right halves have these shown colours 0..255."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, : side // 2], pixels[:, side // 2 :] = colors
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def gltf(path, parts, nodes=None):
    """A glb of squares: ``parts`` of (vertices, uv or None, colours or None, material), each a
    primitive; a material is (factor, picture or None, extras of the texture)."""
    blob, views, accessors = b"", [], []

    def view(data):
        nonlocal blob
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(data)})
        blob += data + bytes(-len(data) % 4)
        return len(views) - 1

    def accessor(array, kind):
        code = {"<f4": 5126, "<u2": 5123, "|u1": 5121}[array.dtype.str]
        accessors.append(
            {"bufferView": view(array.tobytes()), "componentType": code, "count": len(array)}
            | {"type": kind}
        )
        return len(accessors) - 1

    materials, images, textures, primitives = [], [], [], []
    for vertices, uv, colors, (factor, image, extras) in parts:
        pbr = {"baseColorFactor": [*factor, 1]}
        if image is not None:
            images.append({"bufferView": view(image), "mimeType": "image/png"})
            textures.append({"source": len(images) - 1})
            pbr["baseColorTexture"] = {"index": len(textures) - 1, **extras}
        materials.append({"pbrMetallicRoughness": pbr})
        attributes = {"POSITION": accessor(np.asarray(vertices, "<f4"), "VEC3")}
        if uv is not None:
            attributes["TEXCOORD_0"] = accessor(np.asarray(uv, "<f4"), "VEC2")
        if colors is not None:
            attributes["COLOR_0"] = accessor(np.asarray(colors, "<f4"), "VEC3")
        index = accessor(CORNERS.reshape(-1, 1), "SCALAR")
        primitives.append(
            {"attributes": attributes, "indices": index, "material": len(materials) - 1}
        )
    tree = {
        "asset": {"version": "2.0"},
        "nodes": nodes or [{"mesh": 0}],
        "meshes": [{"primitives": primitives}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(blob)}],
        "materials": materials,
        "images": images,
        "textures": textures,
    }
    path.write_bytes(glb(tree, blob))
    return path


def color_at(mesh, point):
    """The shown colour of the mesh at the point of it that is nearest to ``point``."""
    vertices, faces = mesh.vertices.double().numpy(), mesh.faces.numpy()
    plain = trimesh.Trimesh(vertices, faces, process=False)
    _, _, face = trimesh.proximity.closest_point_naive(plain, [point])
    share = trimesh.triangles.points_to_barycentric(plain.triangles[face], [point])
    corner = mesh.faces[int(face[0])]
    share = torch.from_numpy(share[0]).float()[:, None]
    if mesh.texture is None:
        return (mesh.shown_colours()[corner] * share).sum(0).numpy()
    return sampled(mesh.texture, (mesh.uv[corner] * share).sum(0)[None])[0].numpy()


RED_BLUE = picture([(200, 30, 20), (10, 60, 220)])
GREEN_GREY = picture([(20, 180, 40), (128, 128, 128)])
ONE = (1, 1, 1)


def read(path, **options):
    return assets.read(path, half_side=None, **options)


def turned(point):
    """From glTF's axes to ours."""
    x, y, z = point
    return [z, x, y]


def test_a_single_texture_is_kept_bit_for_bit(tmp_path):
    found = read(gltf(tmp_path / "a.glb", [(SQUARE, UV, None, (ONE, RED_BLUE, {}))]))
    pixels = np.asarray(Image.open(io.BytesIO(RED_BLUE)))
    assert torch.equal((255 * found.texture).round().byte(), torch.from_numpy(pixels.copy()))
    torch.testing.assert_close(found.uv, torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]]))
    torch.testing.assert_close(found.vertices, torch.tensor(SQUARE)[:, [2, 0, 1]])
    assert found.colours is None


def test_a_factor_tints_a_texture_as_light(tmp_path):
    """Linear factors: half of the light of 200 is not the shown 100."""
    factor = (0.5, 1.0, 0.25)
    found = read(gltf(tmp_path / "a.glb", [(SQUARE, UV, None, (factor, RED_BLUE, {}))]))
    light = linear(np.array([200, 30, 20]) / 255) * factor
    np.testing.assert_allclose(linear(color_at(found, turned([0.2, 0.5, 0]))), light, atol=1e-3)


def test_materials_without_textures_are_colours_of_vertices(tmp_path):
    above = SQUARE + [0, 0, 1]
    parts = [
        (SQUARE, None, None, ((0.2, 0.4, 0.6), None, {})),
        (above, None, np.full((4, 3), 0.5), ((1, 0.5, 0), None, {})),
    ]
    found = read(gltf(tmp_path / "a.glb", parts))
    assert found.texture is None and len(found.faces) == 4
    np.testing.assert_allclose(linear(found.colours[:4]), [[0.2, 0.4, 0.6]] * 4, atol=1e-5)
    np.testing.assert_allclose(linear(found.colours[4:]), [[0.5, 0.25, 0]] * 4, atol=1e-5)


def test_several_textures_and_plain_materials_come_into_one(tmp_path):
    parts = [
        (SQUARE, UV, None, (ONE, RED_BLUE, {})),
        (SQUARE + [2, 0, 0], UV, None, (ONE, GREEN_GREY, {})),
        (SQUARE + [4, 0, 0], None, None, ((0.1, 0.2, 0.3), None, {})),
    ]
    found = read(gltf(tmp_path / "a.glb", parts))
    assert found.uv.min() >= 0 and found.uv.max() <= 1
    for x, wanted in [(0.2, (200, 30, 20)), (0.8, (10, 60, 220)), (2.2, (20, 180, 40))]:
        seen = color_at(found, turned([x, 0.5, 0]))
        np.testing.assert_allclose(255 * seen, wanted, atol=1)
    seen = linear(color_at(found, turned([4.5, 0.5, 0])))
    np.testing.assert_allclose(seen, [0.1, 0.2, 0.3], atol=1e-4)
    # right up to the border of a tile nothing of its neighbour is mixed in
    for x, y in itertools.product((0.001, 0.4, 2.001, 2.4), (0.001, 0.5, 0.999)):
        wanted = (200, 30, 20) if x < 1 else (20, 180, 40)
        np.testing.assert_allclose(255 * color_at(found, turned([x, y, 0])), wanted, atol=1)


def test_textures_that_repeat_or_lie_under_vertex_colours_are_painted_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("lods.assets.atlas.SIDE", 256)
    tint = np.repeat([[0.5, 0.5, 0.5]], 4, axis=0)
    parts = [
        (SQUARE, 3 * UV, None, (ONE, RED_BLUE, {})),
        (SQUARE + [2, 0, 0], UV, tint, (ONE, GREEN_GREY, {})),
    ]
    found = read(gltf(tmp_path / "a.glb", parts))
    assert found.texture.shape == (256, 256, 3) and len(found.faces) == 4
    for i in range(3):  # repeated three times
        left, right = (turned([(i + share) / 3, 0.5, 0]) for share in (0.25, 0.75))
        np.testing.assert_allclose(255 * color_at(found, left), (200, 30, 20), atol=2)
        np.testing.assert_allclose(255 * color_at(found, right), (10, 60, 220), atol=2)
    half = linear(np.array([20, 180, 40]) / 255) / 2
    np.testing.assert_allclose(linear(color_at(found, turned([2.2, 0.5, 0]))), half, atol=5e-3)


def test_a_mesh_too_fine_to_be_laid_out_has_colours_at_its_vertices(tmp_path, monkeypatch):
    said: list = []
    monkeypatch.setattr("lods.assets.atlas.MOST_FACES", 1)
    monkeypatch.setattr("lods.log.warn", said.append)
    moved = 2 + 0.5 * UV  # beyond the picture, which repeats
    found = read(gltf(tmp_path / "a.glb", [(SQUARE, moved, None, (ONE, RED_BLUE, {}))]))
    assert found.texture is None and len(said) == 1 and "colours at its vertices" in said[0]
    # in the middle between the halves, of which it is the mean, and on the left edge, which
    # repeats: between red and blue
    light = (linear(np.array([200, 30, 20]) / 255) + linear(np.array([10, 60, 220]) / 255)) / 2
    np.testing.assert_allclose(linear(found.colours), [light] * 4, atol=1e-3)


def test_a_mirrored_instance_still_faces_outward(tmp_path):
    """Its triangles would be seen from behind, and its texture at the wrong corners."""
    nodes = [{"mesh": 0, "scale": [-1, 1, 1]}]
    parts = [(SQUARE, UV, None, (ONE, RED_BLUE, {}))]
    found = read(gltf(tmp_path / "a.glb", parts, nodes))
    a, b, c = found.vertices[found.faces[0]]
    assert torch.linalg.cross(b - a, c - a)[0] > 0  # +z of glTF, as before
    np.testing.assert_allclose(255 * color_at(found, turned([-0.2, 0.5, 0])), (200, 30, 20), atol=1)


@pytest.mark.parametrize(("kind", "most"), [("u1", 255), ("u2", 65535), ("f4", 1.0)])
def test_colours_of_a_ply_are_taken_in_their_range(tmp_path, kind, most):
    """Also between the steps of a byte, where the file tells more."""
    made = chart_mesh()
    made.colours = 0.05 + 0.9 * made.colours
    vertex = np.zeros(
        len(made.vertices),
        [(axis, "f4") for axis in "xyz"] + [(c, kind) for c in ("red", "green", "blue")],
    )
    for i, axis in enumerate("xyz"):
        vertex[axis] = made.vertices[:, i]
    for i, c in enumerate(("red", "green", "blue")):
        values = most * made.colours[:, i].double().numpy()
        vertex[c] = values if kind == "f4" else values.round()
    face = np.zeros(len(made.faces), [("vertex_indices", "i4", (3,))])
    face["vertex_indices"] = made.faces
    elements = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]
    PlyData(elements).write(str(tmp_path / "a.ply"))
    found, step = read(tmp_path / "a.ply").colours, 1e-5 if kind == "f4" else 0.5 / most + 1e-6
    torch.testing.assert_close(found, made.colours, atol=step, rtol=0)


# --- round trips ----------------------------------------------------------------------------------


def drawn(mesh):
    """A picture (H, W, 3) of a mesh, with the colours of its texture at many points."""
    if mesh.uv is not None:
        for _ in range(3):  # finer, for colours between vertices are linear in the drawing
            fine, faces = mesh.vertices.numpy(), mesh.faces.numpy()
            both = np.concatenate([fine, mesh.uv.numpy()], axis=1)
            both, faces = trimesh.remesh.subdivide(both, faces)
            both = torch.from_numpy(both).float()
            mesh = assets.Mesh(
                both[:, :3], torch.from_numpy(faces), both[:, 3:], texture=mesh.texture
            )
    arrays = mesh.vertices.numpy(), mesh.faces.numpy(), mesh.shown_colours().numpy()
    image, _ = draw(*arrays, (2.0, 1.5, 2.0), 40.0, 128)
    return torch.from_numpy(image)


@pytest.mark.parametrize("ending", ["glb", "obj"])
def test_a_textured_mesh_is_drawn_the_same_after_a_round_trip(tmp_path, ending):
    made = ball()
    assets.write(tmp_path / f"a.{ending}", made)
    found = read(tmp_path / f"a.{ending}")
    assert found.texture is not None and len(found.faces) == len(made.faces)
    assert float((found.texture - made.texture).abs().max()) <= 0.5 / 255 + 1e-6
    assert psnr(drawn(found), drawn(made)) > 45


@pytest.mark.parametrize("ending", ["glb", "obj", "ply"])
def test_a_mesh_with_colours_is_drawn_the_same_after_a_round_trip(tmp_path, ending):
    made = ball()
    made = assets.Mesh(made.vertices, made.faces, colours=made.shown_colours())
    assets.write(tmp_path / f"a.{ending}", made)
    found = read(tmp_path / f"a.{ending}")
    assert found.texture is None and psnr(drawn(found), drawn(made)) > 45


def test_an_stl_keeps_the_shape(tmp_path):
    made = ball()
    assets.write(tmp_path / "a.stl", made)
    found = read(tmp_path / "a.stl")
    assert len(found.faces) == len(made.faces)
    torch.testing.assert_close(found.vertices.amax(0), made.vertices.amax(0))


# --- where it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [None, "y-up", ("-y", "+z"), ("+x", "-z")])
def test_what_is_read_is_centred_and_as_large_as_what_is_trained(tmp_path, axes):
    made = ball()
    made.vertices = made.vertices * torch.tensor([1.0, 2, 3]) + torch.tensor([5.0, -7, 2])
    trimesh.Trimesh(made.vertices, made.faces, process=False).export(tmp_path / "a.obj")
    found = assets.read(tmp_path / "a.obj", axes=axes)
    low, high = found.vertices.amin(0), found.vertices.amax(0)
    torch.testing.assert_close(low, -high, atol=1e-5, rtol=0)
    assert float(high.max()) == pytest.approx(assets.HALF_SIDE, abs=1e-5)
    # back in its scene
    back = found.placement.undo(found)
    torch.testing.assert_close(back.vertices.amax(0), made.vertices.amax(0), atol=1e-4, rtol=0)
    again = found.placement.apply(back)
    torch.testing.assert_close(again.vertices, found.vertices, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ending", ["glb", "obj"])
def test_a_result_goes_back_into_the_scene_that_it_came_from(tmp_path, ending):
    made = ball()
    made.vertices = 40 * made.vertices + torch.tensor([5.0, -7, 2])
    assets.write(tmp_path / f"a.{ending}", made)
    found = assets.read(tmp_path / f"a.{ending}")
    assert found.vertices.abs().max() < 0.8701
    assets.write(tmp_path / f"b.{ending}", found, placement=found.placement)
    old, new = (trimesh.load(tmp_path / f"{n}.{ending}", force="mesh") for n in "ab")
    np.testing.assert_allclose(new.bounds, old.bounds, atol=1e-3)


def test_gaussians_go_back_into_their_scene_whatever_its_axes(tmp_path):
    from tests.assets.things import shell

    made = shell(80, degree=2)
    for name, axes in (("a.ply", "y-down"), ("b.ply", None), ("c.spz", None)):
        assets.write(tmp_path / name, made, axes=axes)
        found = assets.read(tmp_path / name)
        assert found.means.abs().max() < 0.9
        assets.write(tmp_path / f"back-{name}", found, placement=found.placement)
        again = assets.read(tmp_path / f"back-{name}", half_side=None)
        once = assets.read(tmp_path / name, half_side=None)
        tolerance = {"c.spz": 0.1}.get(name, 1e-4)
        for key, value in once.export().items():
            if key != "quats":
                torch.testing.assert_close(again.export()[key], value, atol=tolerance, rtol=0)


def test_strays_and_faint_gaussians_do_not_make_the_object_small(tmp_path):
    from tests.assets.things import shell

    made = shell(2000)
    made.means.data[0], made.opacities.data[0] = 500.0, 2.0
    made.means.data[1], made.opacities.data[1] = -300.0, -9.0
    assets.write(tmp_path / "a.ply", made)
    found = assets.read(tmp_path / "a.ply")
    means = found.means.detach()[2:]
    side = means.amax(0) - means.amin(0)
    assert 1.7 < float(side.max()) < 1.85


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("none.glb", {}, "there is no file"),
        ("a.fbx", {}, "of no known format: .obj, .ply, .glb"),
        ("a.obj", {"axes": "up"}, "axes='up': give z-up, y-down, y-up"),
        ("a.obj", {"axes": ("+x", "-x")}, "are the same axis"),
        ("point.obj", {}, "it has no size"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, options, text):
    (tmp_path / "a.fbx").write_bytes(b"Kaydara FBX")
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (tmp_path / "point.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    with pytest.raises(ValueError, match=text) as caught:
        assets.read(tmp_path / name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("a.fbx", {}, "a mesh is written as .glb"),
        ("a.splat", {}, "a mesh is written as .glb"),
        ("a.glb", {"axes": "z-up"}, "a glb is y-up always"),
        ("a.ply", {"axes": "up"}, "axes='up'"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, name, options, text):
    with pytest.raises(ValueError, match=text):
        assets.write(tmp_path / name, chart_mesh(), **options)
    assert not list(tmp_path.iterdir())


def test_importing_it_loads_nothing_heavy():
    import subprocess
    import sys

    from tests.runs import ROOT

    code = "import sys, lods.assets; print({'torch', 'trimesh', 'numba'} & set(sys.modules))"
    folder = ROOT / "custom" / "threestudio-lods"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_public_name_is_found_where_it_is_said_to_be():
    assert assets.__all__ == sorted(assets.__all__) and set(assets.__all__) == {
        n for names in assets._MODULES.values() for n in names
    }
    for name in assets.__all__:
        assert getattr(assets, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        assets.load  # noqa: B018
