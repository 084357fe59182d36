"""Mesh files, read back by trimesh, and textures against the function that painted them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import threestudio
from tests.glb_files import material_of, read_glb, shown
from threestudio.models.exporters.texture import fill_image, surface_points
from threestudio.models.geometry.base import BaseGeometry, BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.renderers.base import Rasterizer
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.errors import UserError


@threestudio.register("test-shape")
class Shape(BaseImplicitGeometry):
    """A ball or a cube off the origin; its features are the position."""

    norm = 2.0

    def forward_field(self, points):
        offset = points - torch.tensor([0.1, -0.2, 0.3])
        return -offset.norm(dim=-1, p=self.norm, keepdim=True), None

    def forward_level(self, field, threshold):
        return threshold - field

    def export(self, points, **kwargs):
        return {"features": points}


def albedo(points):
    """A colour that tells where the point is."""
    return 0.5 + 0.45 * points


@threestudio.register("test-material")
class Material(BaseMaterial):
    def export(self, features, points, **kwargs):
        assert torch.equal(features, points)
        return {
            "albedo": albedo(points),
            "roughness": albedo(points)[:, :1],
            "metallic": albedo(points)[:, 2:],
            "bump": albedo(-points),
            "unknown": points,
        }


@threestudio.register("test-renderer")
class Renderer(Rasterizer):
    pass


@pytest.fixture
def system(tmp_path):
    """``system(norm, **exporter options) -> (the folder of the export, the mesh)``"""

    def export(norm=2.0, material="test-material", save=True, geometry=None, **exporter):
        made = BaseLift3DSystem(
            {
                "geometry_type": "test-shape",
                "geometry": {
                    "isosurface_resolution": 16,
                    "isosurface_threshold": -0.5,
                    "isosurface_method": "mc-cpu",
                    **(geometry or {}),
                },
                "material_type": material,
                "background_type": "solid-color-background",
                "renderer_type": "test-renderer",
                "exporter": exporter,
            }
        ).cpu()
        made.geometry.norm = norm
        made.set_save_dir(str(tmp_path))
        made.on_predict_start()
        made.on_predict_epoch_end()
        return tmp_path / "it0-export", made.geometry.isosurface()

    return export


def load(path):
    """As it stands in the file; where a texture has seams, vertices are split there."""
    textured = "vt " in path.read_text() if path.suffix == ".obj" else False
    loaded = trimesh.load(path, process=False, maintain_order=not textured)
    return loaded if isinstance(loaded, trimesh.Trimesh) else next(iter(loaded.geometry.values()))


def sample(image, uv):
    """Bilinear lookup as renderers do it: v up, centres of texels at halves."""
    height, width = image.shape[:2]
    x = uv[:, 0] * width - 0.5
    y = (1 - uv[:, 1]) * height - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    total = 0
    for dx in (0, 1):
        for dy in (0, 1):
            weight = (1 - abs(x - x0 - dx)) * (1 - abs(y - y0 - dy))
            texel = image[(y0 + dy).clip(0, height - 1), (x0 + dx).clip(0, width - 1)]
            total = total + weight[:, None] * texel
    return total


def on_surface(loaded, n=4000):
    """Points of a loaded mesh with their texture coordinates: in triangles, on edges, at corners
    (where charts end)."""
    rng = np.random.default_rng(0)
    face = rng.integers(0, len(loaded.faces), n)
    weights = rng.dirichlet((1, 1, 1), n)
    weights[n // 4 : n // 2, 0] = 0
    weights[: n // 4, 1:] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    corner = loaded.faces[face]
    points = (weights[:, :, None] * loaded.vertices[corner]).sum(axis=1)
    return points, (weights[:, :, None] * loaded.visual.uv[corner]).sum(axis=1)


# --- vertex colours -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["obj", "ply"])
def test_vertex_coloured_files_are_the_mesh(system, fmt):
    folder, mesh = system(fmt=fmt, save_uv=False)
    assert [p.name for p in folder.iterdir()] == [f"model.{fmt}"]
    loaded = load(folder / f"model.{fmt}")
    assert np.allclose(loaded.vertices, mesh.v_pos, atol=1e-6)
    assert np.array_equal(loaded.faces, mesh.t_pos_idx)
    colors = loaded.visual.vertex_colors[:, :3].astype(float)
    assert np.abs(colors - 255 * albedo(mesh.v_pos).numpy()).max() <= 1


def test_a_glb_is_what_gltf_prescribes(system):
    """y up and the front, +x in threestudio, on +z; colours in linear light, normals, and a
    material, because that of a file without one is metal."""
    folder, mesh = system(fmt="glb", glb_colors="vertices")
    assert [p.name for p in folder.iterdir()] == ["model.glb"]
    tree, attributes, faces = read_glb(folder / "model.glb")
    turn = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert np.isclose(np.linalg.det(turn), 1)
    assert np.allclose(attributes["POSITION"], mesh.v_pos.numpy() @ turn, atol=1e-6)
    assert np.allclose(attributes["NORMAL"], mesh.v_nrm.numpy() @ turn, atol=1e-6)
    assert np.array_equal(faces, mesh.t_pos_idx)
    assert np.allclose(shown(attributes["COLOR_0"][:, :3]), albedo(mesh.v_pos), atol=1e-5)
    pbr = material_of(tree)["pbrMetallicRoughness"]
    assert (pbr["metallicFactor"], pbr["roughnessFactor"]) == (0, 1)
    assert pbr.get("baseColorFactor", [1, 1, 1, 1]) == [1, 1, 1, 1]


def test_a_glb_has_a_texture_of_what_the_material_exports(system):
    """In one file, on a surface of fewer triangles, with y up, as a PNG of shown colours."""
    size = 128
    folder, mesh = system(fmt="glb", texture_size=size, texture_faces=700)
    assert [p.name for p in folder.iterdir()] == ["model.glb"]
    tree, attributes, faces = read_glb(folder / "model.glb")
    assert set(attributes) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    assert 300 < len(faces) <= 720 < len(mesh.t_pos_idx)
    pbr = material_of(tree)["pbrMetallicRoughness"]
    assert (pbr["metallicFactor"], pbr["roughnessFactor"]) == (0, 1)
    assert tree["images"][0]["mimeType"] == "image/png"
    assert tree["samplers"][0]["wrapS"] == 33071  # nothing of the other edge is mixed in
    loaded = load_glb(folder / "model.glb")
    image = np.asarray(loaded.visual.material.baseColorTexture.convert("RGB")) / 255
    assert image.shape == (size, size, 3)
    points, uv = on_surface(loaded)
    texel = 0.45 * texel_length(loaded, size)
    error = np.abs(sample(image, uv) - albedo(points[:, [2, 0, 1]]))
    assert error.max() < 2 * texel + 1 / 255 and error.mean() < 0.1 * texel + 0.5 / 255
    outward = attributes["POSITION"] - [-0.2, 0.3, 0.1]
    assert (attributes["NORMAL"] * outward).sum(1).min() > 0.4


def load_glb(path):
    return trimesh.load(path, force="mesh", process=False)


@pytest.mark.parametrize("fmt", ["obj", "ply", "obj-mtl"])
def test_other_formats_can_be_y_up(system, fmt):
    options = {"fmt": fmt, "axes": "y-up", "save_normal": True, "texture_size": 16}
    folder, mesh = system(**options)
    loaded = load(next(p for p in folder.iterdir() if p.suffix in (".obj", ".ply")))
    assert loaded.volume > 0
    y_up = np.stack([mesh.v_pos[:, 1], mesh.v_pos[:, 2], mesh.v_pos[:, 0]], axis=1)
    assert np.allclose(loaded.bounds, [y_up.min(0), y_up.max(0)], atol=1e-6)
    outward = loaded.vertices - [-0.2, 0.3, 0.1]
    assert ((loaded.vertex_normals * outward).sum(1) > 0.4).all()


@pytest.mark.parametrize("fmt", ["obj", "ply", "glb", "obj-mtl"])
def test_normals_are_written_when_asked_for(system, fmt):
    folder, mesh = system(fmt=fmt, save_normal=True, save_uv=False, save_texture=False)
    loaded = load(next(p for p in folder.iterdir() if p.suffix != ".mtl"))
    expected = mesh.v_nrm.numpy()[:, [1, 2, 0]] if fmt == "glb" else mesh.v_nrm.numpy()
    computed = trimesh.Trimesh(loaded.vertices, loaded.faces, process=False).vertex_normals
    assert not np.allclose(computed, expected, atol=1e-3)  # trimesh weights by angle
    assert np.allclose(loaded.vertex_normals, expected, atol=1e-5)
    assert len(loaded.faces) == len(mesh.t_pos_idx)


def test_an_obj_can_have_colours_and_texture_coordinates(system):
    folder, mesh = system(fmt="obj")
    lines = (folder / "model.obj").read_text().splitlines()
    uv = np.array([line.split()[1:] for line in lines if line.startswith("vt ")], dtype=float)
    assert uv.min() >= 0 and uv.max() <= 1
    assert len(next(x for x in lines if x.startswith("v ")).split()) == 7
    assert sum(x.startswith("f ") for x in lines) == len(mesh.t_pos_idx)


# --- textures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [2.0, float("inf")], ids=["ball", "cube"])
def test_a_texture_shows_the_colour_of_each_point_also_at_seams(system, norm):
    size = 128
    folder, mesh = system(norm, texture_size=size, texture_format="png")
    loaded = load(folder / "model.obj")
    assert len(loaded.faces) == len(mesh.t_pos_idx)
    assert np.allclose(loaded.bounds, [mesh.v_pos.amin(0).numpy(), mesh.v_pos.amax(0).numpy()])
    assert loaded.visual.uv.min() >= 0 and loaded.visual.uv.max() <= 1
    image = np.asarray(loaded.visual.material.image.convert("RGB")) / 255
    assert image.shape == (size, size, 3)
    points, uv = on_surface(loaded)
    error = np.abs(sample(image, uv) - albedo(points))
    texel = 0.45 * texel_length(loaded, size)  # change of the colour from texel to texel
    assert error.max() < 2 * texel + 1 / 255
    assert error.mean() < 0.1 * texel + 0.5 / 255


def texel_length(loaded, size):
    """World units per texel."""
    uv = loaded.visual.uv[loaded.faces]
    a, b = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    area = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / 2
    return np.sqrt(loaded.area / area) / size


def test_all_maps_of_a_material_are_written(system):
    folder, _ = system(texture_size=64)
    names = {"map_Kd": "kd", "map_Pm": "metallic", "map_Pr": "roughness", "map_Bump": "nrm"}
    mtl = (folder / "model.mtl").read_text()
    images = {}
    for key, name in names.items():
        assert f"{key} texture_{name}.jpg" in mtl
        images[key] = Image.open(folder / f"texture_{name}.jpg")
    assert len(list(folder.iterdir())) == 6
    kd, pm, pr, bump = (np.asarray(images[k]).astype(float) for k in names)
    for map_, expected in ((pm, kd[..., 2:]), (pr, kd[..., :1]), (bump, 255 - kd)):
        assert np.abs(map_ - expected).mean() < 4  # jpg


def test_small_textures_of_fine_meshes_miss_no_triangle(system):
    folder, _ = system(texture_size=24, texture_format="png")
    loaded = load(folder / "model.obj")
    image = np.asarray(loaded.visual.material.image.convert("RGB")) / 255
    points, uv = on_surface(loaded)
    assert np.abs(sample(image, uv) - albedo(points)).mean() < 0.03


def test_without_colours_the_mesh_is_written_all_the_same(system, monkeypatch):
    class Plain(BaseMaterial):
        pass

    monkeypatch.setitem(threestudio.__modules__, "test-plain", Plain)
    warnings = []
    monkeypatch.setattr(threestudio, "warn", warnings.append)
    for fmt in ("obj-mtl", "ply"):
        folder, mesh = system(material="test-plain", fmt=fmt, texture_size=16)
    assert len(warnings) == 2 and all("export no albedo" in w for w in warnings)
    assert "map_Kd" not in (folder / "model.mtl").read_text()
    assert np.array_equal(load(folder / "model.ply").faces, mesh.t_pos_idx)
    monkeypatch.setattr(Shape, "export", BaseGeometry.export)  # no features for the material
    system(fmt="obj", save_uv=False)


# --- the texture's parts ------------------------------------------------------------------------


def test_texels_show_the_points_at_their_centres():
    size = 8
    v_tex = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    v_pos = np.array([[5.0, 1, 0], [7, 1, 0], [5, 4, 0], [7, 4, 0]])  # x = 5 + 2 u, y = 1 + 3 v
    faces = np.array([[0, 1, 2], [1, 2, 3]])  # the second is wound the other way
    texels, points = surface_points(v_pos, faces, v_tex, faces, size)
    assert np.array_equal(texels, np.arange(size * size))
    row, column = np.divmod(texels, size)
    u, v = (column + 0.5) / size, (row + 0.5) / size
    np.testing.assert_allclose(points, np.stack([5 + 2 * u, 1 + 3 * v, 0 * u], axis=1), atol=1e-9)
    texels, _ = surface_points(v_pos, faces[:1], v_tex, faces[:1], size)
    on_or_below = {y * size + x for y in range(size) for x in range(size - y)}
    assert set(texels) == on_or_below | {size - 1, size * (size - 1)}


def test_batches_do_not_change_the_texture(monkeypatch):
    from threestudio.models.exporters import texture

    rng = np.random.default_rng(0)
    corners, positions = rng.random((30, 2)), rng.random((30, 3))
    faces = np.arange(30).reshape(10, 3)
    one = surface_points(positions, faces, corners, faces, 32)
    monkeypatch.setattr(texture, "_BATCH", 50)
    for a, b in zip(one, surface_points(positions, faces, corners, faces, 32)):
        np.testing.assert_array_equal(a, b)


def test_a_triangle_between_the_centres_is_shown_by_the_texel_it_lies_in():
    v_tex = np.array([[0.26, 0.51], [0.28, 0.51], [0.26, 0.53], [0.9, 0.9]])
    faces = np.array([[0, 1, 2], [3, 3, 3]])  # and one without area
    v_pos = np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5, 6]])
    texels, points = surface_points(v_pos, faces, v_tex, faces, 4)
    assert texels.tolist() == [2 * 4 + 1, 3 * 4 + 3]
    np.testing.assert_array_equal(points, [[1, 2, 3], [4, 5, 6]])


def test_empty_texels_take_the_nearest_value():
    image = fill_image(np.array([[1.0], [2.0]]), np.array([0, 15]), 4)
    assert image.shape == (4, 4, 1)
    assert image[0, 1] == image[1, 1] == 1 and image[3, 2] == image[2, 2] == 2


# --- options ------------------------------------------------------------------------------------


def test_wrong_options_are_refused_before_anything_is_computed():
    def make(**cfg):
        parts = [BaseGeometry({}), BaseMaterial({}), None]
        return threestudio.find("mesh-exporter")(cfg, *parts)

    assert make(context_type="cuda").cfg.fmt == "obj-mtl"
    with pytest.raises(UserError, match="obj-mtl, obj, glb, ply, not 'objs': did you mean 'obj'"):
        make(fmt="objs")
    with pytest.raises(UserError, match="save_texture needs save_uv"):
        make(save_uv=False)
    make(save_uv=False, fmt="obj"), make(save_uv=False, save_texture=False)
    with pytest.raises(UserError, match="texture_format='jgp'"):
        make(texture_format="jgp")
    with pytest.raises(UserError, match="axes"):
        make(axes="y_up")
    with pytest.raises(UserError, match=r"texture_size must be .* from 1 to 16384, not 0"):
        make(texture_size=0)
    with pytest.raises(UserError, match="cannot mesh a BaseGeometry"):
        make()()


def test_an_empty_surface_is_a_sentence(system, tmp_path):
    with pytest.raises(UserError, match=r"lower system\.geometry\.isosurface_threshold"):
        system(geometry={"isosurface_threshold": 25})
    assert not list(Path(tmp_path).iterdir())
