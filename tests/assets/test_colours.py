"""A chart of known colours, written as every kind of glb and read by the libraries of others."""

import io

import numpy as np
import pytest
import torch
import trimesh
from lods import assets
from lods.assets.baking import bake, spread, texels_of
from lods.assets.mesh import sampled
from lods.gaussians import Gaussians
from lods.gaussians.surface import shape
from PIL import Image

from tests.assets.things import (
    FIELDS,
    SIDE,
    ball,
    chart_color_at,
    chart_colors,
    chart_mesh,
    chart_places,
    on_surface,
)
from tests.glb_files import material_of, read_glb, shown

LEVELS = 2.0  # of 255, the mean difference


def textured_chart(size=192):
    plain = chart_mesh()
    plain.colours = None
    return bake(plain, lambda points, normals: chart_color_at(points), size)


def seen_by_trimesh(path):
    """The shown colours 0..255 at the middles of the chart's fields, as trimesh reads the file."""
    mesh = trimesh.load(path, force="mesh", process=False)
    middle = chart_places()[:, [1, 2, 0]]  # y up
    _, _, face = trimesh.proximity.closest_point_naive(mesh, middle)
    corners = mesh.triangles[face]
    weights = trimesh.triangles.points_to_barycentric(corners, middle)
    uv = (mesh.visual.uv[mesh.faces[face]] * weights[..., None]).sum(1)
    image = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB"))
    row = ((1 - uv[:, 1]) * image.shape[0]).astype(int)
    return image[row, (uv[:, 0] * image.shape[1]).astype(int)]


def test_a_baked_texture_has_the_colours_of_the_chart(tmp_path):
    assets.write(tmp_path / "a.glb", textured_chart())
    assert np.abs(seen_by_trimesh(tmp_path / "a.glb") - chart_colors()).mean() < LEVELS


def test_a_textured_glb_is_what_gltf_prescribes(tmp_path):
    """A PNG with shown colours at coordinates whose v points down, normals, neither metal nor
    gloss, one mesh with y up; nothing tints the texture."""
    made = textured_chart()
    assets.write(tmp_path / "a.glb", made)
    tree, attributes, faces = read_glb(tmp_path / "a.glb")
    assert set(attributes) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    assert np.array_equal(faces, made.faces)
    np.testing.assert_allclose(attributes["POSITION"], made.vertices[:, [1, 2, 0]], atol=1e-6)
    np.testing.assert_allclose(attributes["NORMAL"], [[0, 0, 1]] * len(made.vertices), atol=1e-6)
    np.testing.assert_allclose(
        attributes["TEXCOORD_0"], made.uv.numpy() * [1, -1] + [0, 1], atol=1e-6
    )
    material = material_of(tree)
    pbr = material["pbrMetallicRoughness"]
    assert (pbr["metallicFactor"], pbr["roughnessFactor"]) == (0, 1)
    assert pbr.get("baseColorFactor", [1, 1, 1, 1]) == [1, 1, 1, 1]
    assert material["extensions"]["KHR_materials_specular"] == {"specularFactor": 0}
    [texture], [sampler] = tree["textures"], tree["samplers"]
    assert texture["sampler"] == 0 and sampler["wrapS"] == sampler["wrapT"] == 33071
    view = tree["bufferViews"][tree["images"][texture["source"]]["bufferView"]]
    data = (tmp_path / "a.glb").read_bytes()
    start = data.index(b"BIN\0") + 4 + view.get("byteOffset", 0)
    image = Image.open(io.BytesIO(data[start : start + view["byteLength"]]))
    assert image.format == "PNG" and image.size == (192, 192)
    assert np.abs(np.asarray(image) / 255 - made.texture.numpy()).max() <= 0.5 / 255 + 1e-6


def test_vertex_colours_of_a_glb_are_linear_light(tmp_path):
    """To take shown ones for light is what makes colours wash out: 139 would be shown as 195."""
    made = chart_mesh()
    assets.write(tmp_path / "a.glb", made)
    _, attributes, _ = read_glb(tmp_path / "a.glb")
    color = attributes["COLOR_0"][:, :3]
    np.testing.assert_allclose(shown(color), made.colours, atol=1e-5)
    assert color[8 * 4] == pytest.approx([0.2582] * 3, abs=1e-3)  # 139


def test_gaussians_become_a_textured_glb_of_their_colours(tmp_path):
    """A chart of opaque Gaussians, meshed, baked, written and read by trimesh. What light passes is
    not flat at the edges of fields, so the middles are compared."""
    fine = 5  # by field, along each side
    at = (np.arange(FIELDS * fine) + 0.5) / (FIELDS * fine) * SIDE - SIDE / 2
    y, z = (axis.reshape(-1) for axis in np.meshgrid(at, at))
    points = torch.from_numpy(np.stack([0 * y, y, z], axis=1)).float()
    step = SIDE / FIELDS / fine
    colors = chart_color_at(points)
    made = Gaussians(
        {
            "means": points,
            "scales": torch.full((len(points), 3), 0.6 * step).log(),
            "quats": torch.tensor([[1.0, 0, 0, 0]]).repeat(len(points), 1),
            "opacities": torch.full((len(points),), 5.0),
            "sh0": ((colors - 0.5) / 0.28209479177387814)[:, None],
        }
    )
    found, colours_at = shape(made, 40, pixels=160)
    vertices, faces = assets.simplified(found.vertices, found.faces, 2000)
    asset = bake(assets.Mesh(vertices, faces), colours_at, 192)
    assets.write(tmp_path / "a.glb", asset)
    assert np.abs(seen_by_trimesh(tmp_path / "a.glb") - chart_colors()).mean() < LEVELS


def test_pages_of_runs_draw_a_textured_glb_in_its_colours(tmp_path):
    from threestudio.run.drawing.objects import read_object

    made = ball()
    assets.write(tmp_path / "a.glb", made)
    drawn = read_object(tmp_path / "a.glb")
    np.testing.assert_allclose(drawn.points, made.vertices, atol=1e-6)
    wanted = 0.5 + 0.45 * np.sin(6 * drawn.points)
    assert np.abs(drawn.rgb - wanted).mean() < 0.02
    broken = bytearray((tmp_path / "a.glb").read_bytes())
    at = broken.index(b"\x89PNG")
    broken[at : at + 40] = bytes(40)
    (tmp_path / "b.glb").write_bytes(broken)
    with pytest.raises(ValueError, match="is not a glb as runs export it"):
        read_object(tmp_path / "b.glb")


@pytest.mark.parametrize("ending", ["obj", "ply", "stl"])
def test_other_files_of_meshes_have_shown_colours(tmp_path, ending):
    made = chart_mesh()
    assets.write(tmp_path / f"a.{ending}", made)
    loaded = trimesh.load(tmp_path / f"a.{ending}", force="mesh", process=False)
    assert len(loaded.faces) == len(made.faces)
    np.testing.assert_allclose(loaded.bounds[1], made.vertices.amax(0), atol=1e-6)
    if ending != "stl":  # which has no colours
        color = np.asarray(loaded.visual.vertex_colors)[:, :3]
        assert np.abs(color / 255 - made.colours.numpy()).max() <= 0.51 / 255


# --- the texture ----------------------------------------------------------------------------------


def test_a_texture_shows_the_colour_of_each_point_also_at_seams():
    size = 256
    made = ball(size=size)
    assert made.texture.shape == (size, size, 3)
    assert made.uv.min() >= 0 and made.uv.max() <= 1
    points, uv = on_surface(made)
    error = (sampled(made.texture, uv) - (0.5 + 0.45 * torch.sin(6 * points))).abs()
    corners, flat = made.vertices[made.faces], made.uv[made.faces]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    a, b = flat[:, 1] - flat[:, 0], flat[:, 2] - flat[:, 0]
    used = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).abs().sum()
    texel = float((area.norm(dim=1).sum() / used).sqrt()) / size  # in world units
    slope = 0.45 * 6 * texel  # of the colour, from texel to texel, at most
    assert error.max() < 2.5 * slope and error.mean() < 0.1 * slope


def test_no_texel_is_left_without_a_colour_of_the_surface():
    """Filters and smaller copies of a texture mix what is beside a chart."""
    made = ball(color=lambda points: torch.full_like(points, 0.75), size=64)
    assert float((made.texture - 0.75).abs().max()) < 1e-6


def test_texels_show_the_points_at_their_centres():
    size = 8
    uv = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    faces = torch.tensor([[0, 1, 2], [1, 2, 3]])  # the second is wound the other way
    face, weights = texels_of(uv, faces, size, size)
    corners = uv.numpy()[faces.numpy()[face]]
    where = (corners * weights[..., None]).sum(2)
    row, column = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    np.testing.assert_allclose(where[..., 0], (column + 0.5) / size, atol=1e-9)
    np.testing.assert_allclose(where[..., 1], 1 - (row + 0.5) / size, atol=1e-9)
    # the diagonal goes from the lower right to the upper left
    assert (face[row > column] == 0).all() and (face[row < column] == 1).all()


def test_a_triangle_between_the_centres_of_texels_is_not_lost():
    uv = torch.tensor([[0.26, 0.51], [0.28, 0.51], [0.26, 0.53], [0.9, 0.9]])
    face, weights = texels_of(uv, torch.tensor([[0, 1, 2], [3, 3, 3]]), 4, 4)
    # u = 1/4.. and v = 1/2..: column 1, row 1 from the top
    assert face[1, 1] == 0 and face[0, 3] == 1
    assert np.allclose(weights[face >= 0].sum(1), 1) and (weights >= 0).all()


def test_empty_texels_take_the_nearest_value():
    image = np.zeros((4, 4, 1))
    image[0, 0], image[3, 3] = 1, 2
    known = image[..., 0] > 0
    filled = spread(image, known)
    assert filled[0, 1] == filled[1, 1] == 1 and filled[3, 2] == filled[2, 2] == 2


def test_a_surface_with_fewer_triangles_is_the_same_surface():
    sphere = trimesh.creation.icosphere(4, 0.8)
    vertices = torch.from_numpy(sphere.vertices).float()
    less, faces = assets.simplified(vertices, torch.from_numpy(sphere.faces), 800)
    assert 400 < len(faces) <= 820
    assert float((less.norm(dim=1) - 0.8).abs().max()) < 0.01
    assert trimesh.Trimesh(less.numpy(), faces.numpy(), process=False).is_watertight
    same, _ = assets.simplified(vertices, torch.from_numpy(sphere.faces), 0)
    assert same is vertices
