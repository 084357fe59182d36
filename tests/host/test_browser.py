"""What a browser shows of glb files: three.js and model-viewer in Chromium, drawing in software."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lods import assets
from lods.gaussians import mesh_file

import threestudio
from tests.browser import chromium
from tests.gaussians.clouds import soft_gaussians
from tests.glb_files import linear, read_glb, shown
from tests.mesh_render import draw
from tests.viewer_table import note
from threestudio.data.cameras import camera_batch
from threestudio.models.exporters.mesh_exporter import file_arrays
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.mesh import Mesh
from threestudio.utils.saving import SaverMixin

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing()),
]
SIZE, FOVY, DISTANCE = 256, 40.0, 3.6


def seen(path, cameras=((0.0, 0.0),), light="flat", page="three.html"):
    """Pictures (SIZE, SIZE, 3), 0..255, of a glb from (azimuth, elevation) of threestudio's
    cameras, in front of white."""
    views = [position(*camera).tolist() for camera in cameras]
    job = {"size": SIZE, "background": 0xFFFFFF, "light": light, "fovy": FOVY, "views": views}
    sent = chromium.show(page, path.read_bytes(), **job)
    name = f"{path.stem}-{page.split('.')[0]}-{light}"
    return [chromium.seen(sent[f"{i}.png"], f"{name}-{i}") for i in range(len(views))]


def position(azimuth, elevation):
    """Where threestudio's camera is, in glTF's axes."""
    a, e = math.radians(azimuth), math.radians(elevation)
    x, y, z = math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)
    return DISTANCE * np.array([y, z, x])


def ours(path, camera):
    """``(picture, mask)``: the same file, drawn the plain way; the mask leaves out the outline."""
    _, attributes, faces = read_glb(path)
    arrays = attributes["POSITION"], faces, attributes["COLOR_0"][:, :3]
    image, mask = draw(*arrays, position(*camera), FOVY, SIZE)
    inside = mask.copy()
    for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        inside &= np.roll(mask, shift, (0, 1))
    return 255 * shown(image), inside


def chart():
    """36 fields with colours from black to white, towards the front: (v_pos, faces, colours)."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (36, 3))
    colors[:12] = np.array([0, 2, 5, 9, 13, 20, 40, 80, 139, 195, 230, 255])[:, None]
    corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) / 3
    fields = np.stack(np.divmod(np.arange(36), 6), axis=1) / 3 - 1
    plane = (fields[:, None] + corner).reshape(-1, 2)
    v_pos = np.c_[np.zeros(len(plane)), plane]  # y to the right, z up, seen from +x
    faces = (np.array([[0, 1, 2], [0, 2, 3]]) + 4 * np.arange(36)[:, None, None]).reshape(-1, 3)
    return v_pos, faces, np.repeat(colors, 4, axis=0) / 255, colors, fields + 1 / 6


def written(writer, path):
    """The chart as a glb: with colours at its vertices, or with a texture."""
    v_pos, faces, rgb, colors, _ = chart()
    mesh = Mesh(*(torch.from_numpy(a) for a in (v_pos, faces)))
    mesh.set_vertex_color(torch.from_numpy(rgb))
    if writer == "host":
        saver = SaverMixin()
        saver.set_save_dir(str(path.parent))
        saver.save_mesh(path.name, **file_arrays(mesh, "glb"))
    elif writer == "extension":
        y_up = mesh.v_pos[:, [1, 2, 0]], mesh.t_pos_idx, mesh.v_rgb, mesh.v_nrm[:, [1, 2, 0]]
        mesh_file.write_mesh(path, *y_up)
    else:

        def color_at(points, normals):
            row, column = (((points[:, 1:] + 1) * 3).long().clamp(0, 5)).T
            return torch.from_numpy(colors / 255).float()[6 * row + column]

        plain = assets.Mesh(mesh.v_pos.float(), mesh.t_pos_idx)
        assets.write(path, assets.bake(plain, color_at, 256))


@pytest.mark.parametrize("page", ["three.html", "model-viewer.html"])
@pytest.mark.parametrize("writer", ["host", "extension", "texture"])
def test_a_colour_chart_is_shown_as_it_is(tmp_path, writer, page):
    *_, colors, middles = chart()
    path = tmp_path / f"chart-{writer}.glb"
    written(writer, path)
    [picture] = seen(path, page=page)
    scale = SIZE / 2 / math.tan(math.radians(FOVY / 2)) / DISTANCE
    columns, rows = (SIZE / 2 + scale * middles * [1, -1]).astype(int).T
    error = np.abs(picture[rows, columns] - colors)
    note(page.removesuffix(".html"), path.name, error)
    assert error.mean() < 1 and error.max() <= (1 if page == "three.html" else 3)


CAMERAS = ((0.0, 15.0), (70.0, 0.0), (180.0, 30.0))


def compare(pictures, path, renderer):
    """Each picture with the plain drawing of the same mesh, and with the render that the mesh is
    of: ``(median, mean)`` difference of the last two, where the render lets nothing through."""
    errors = []
    for picture, (azimuth, elevation) in zip(pictures, CAMERAS):
        expected, inside = ours(path, (azimuth, elevation))
        assert inside.mean() > 0.02
        difference = np.abs(picture - expected)[inside]
        # at creases another of two triangles may be in front
        assert difference.mean() < 0.5 and (difference.max(axis=1) > 2).mean() < 0.01
        numbers = (elevation, azimuth, DISTANCE, math.radians(FOVY))
        camera = camera_batch(*(torch.tensor([float(n)]) for n in numbers), SIZE, SIZE)
        with torch.no_grad():
            out = renderer(**camera)
        solid = inside & (out["opacity"][0, ..., 0].numpy() > 0.97)
        assert solid.sum() > 500
        render = 255 * out["comp_rgb"][0].numpy().clip(0, 1)
        errors.append(np.abs(picture - render)[solid])
    note("three", path.name, np.concatenate(errors))
    return [(np.median(error), error.mean()) for error in errors]


def test_a_gaussian_object_is_shown_in_the_colours_of_its_renders(lods, tmp_path):
    geometry = soft_gaussians()
    surface = importlib.import_module("lods.gaussians.surface").surface
    mesh = surface(geometry, resolution=64)
    path = tmp_path / "gaussians.glb"
    mesh.write(path)
    scene = {"geometry": geometry, "material": None}
    scene["background"] = threestudio.find("solid-color-background")({})
    renderer = threestudio.find("lods-gaussian-rasterizer")({}, **scene)
    # soft Gaussians have no surface: where the two colours meet, it shows one or the other
    for median, mean in compare(seen(path, CAMERAS), path, renderer):
        assert median < 8 and mean < 14


def solid_difference(path, renderer, size=SIZE):
    """The mean differences, of 255, of what three.js shows and the renders that a file is of, where
    the render lets nothing through and away from the outline."""
    found = []
    for picture, (azimuth, elevation) in zip(seen(path, CAMERAS), CAMERAS):
        numbers = (elevation, azimuth, DISTANCE, math.radians(FOVY))
        camera = camera_batch(*(torch.tensor([float(n)]) for n in numbers), size, size)
        with torch.no_grad():
            out = renderer(**camera)
        solid = out["opacity"][0, ..., 0].numpy() > 0.97
        for shift in ((0, 2), (0, -2), (2, 0), (-2, 0)):
            solid &= np.roll(solid, shift, (0, 1))
        assert solid.sum() > 200
        render = 255 * out["comp_rgb"][0].numpy().clip(0, 1)
        found.append(np.abs(picture - render)[solid])
    note("three", path.name, np.concatenate(found))
    return [apart.mean() for apart in found]


def test_a_textured_gaussian_object_is_shown_in_the_colours_of_its_renders(tmp_path):
    from lods.gaussians.surface import shape

    geometry = soft_gaussians()
    found, colours_at = shape(geometry, 64, pixels=512)
    vertices, faces = assets.simplified(found.vertices, found.faces, 8000)
    path = tmp_path / "gaussians-textured.glb"
    assets.write(path, assets.bake(assets.Mesh(vertices, faces), colours_at, 512))
    scene = {"geometry": geometry, "material": None}
    scene["background"] = threestudio.find("solid-color-background")({})
    renderer = threestudio.find("lods-gaussian-rasterizer")({}, **scene)
    assert max(solid_difference(path, renderer)) < 14


class Ball(BaseImplicitGeometry):
    """A radiance field: a ball of radius 0.6 with a sharp edge, whose colour is the place's."""

    def forward(self, points, output_normal=False):
        density = 400 * torch.sigmoid(400 * (0.6 - points.norm(dim=-1, keepdim=True)))
        return {"density": density, "features": torch.logit(0.5 + 0.6 * points.clamp(-0.8, 0.8))}

    def forward_density(self, points):
        return self.forward(points)["density"]

    def forward_field(self, points):
        return 0.6 - points.norm(dim=-1, keepdim=True), None

    def forward_level(self, field, threshold):
        return threshold - field

    def export(self, points, **kwargs):
        return {"features": self.forward(points)["features"]}


@pytest.mark.parametrize("colors", ["vertices", "texture"])
def test_a_radiance_field_is_shown_in_the_colours_of_its_renders(tmp_path, colors):
    geometry = Ball({"isosurface_resolution": 96, "isosurface_method": "mc-cpu"})
    material = threestudio.find("no-material")({"n_output_dims": 3, "color_activation": "sigmoid"})
    background = threestudio.find("solid-color-background")({})
    parts = {"geometry": geometry, "material": material, "background": background}
    options = {"fmt": "glb", "glb_colors": colors, "save_name": f"field-{colors}"}
    exporter = threestudio.find("mesh-exporter")(options, **parts)
    saver = SaverMixin()
    saver.set_save_dir(str(tmp_path))
    [output] = exporter()
    path = Path(saver.save_mesh(output.save_name, **output.params))
    options = {"num_samples_per_ray": 512, "grid_prune": False, "prune_alpha_threshold": False}
    renderer = threestudio.find("nerf-volume-renderer")(options, **parts).eval()
    if colors == "texture":
        assert max(solid_difference(path, renderer)) < 2
        return
    for median, mean in compare(seen(path, CAMERAS), path, renderer):
        assert median < 2 and mean < 2


def test_model_viewer_shows_a_matt_grey_ball(lods, tmp_path):
    """In the light that it brings: neither metal, which is dark or bright as what it mirrors, nor
    washed out, as a colour that is taken for light (139 as 195)."""
    import trimesh

    ball = trimesh.creation.icosphere(4)
    write = importlib.import_module("lods.gaussians.mesh_file").write_mesh
    path = tmp_path / "ball.glb"
    v_pos, faces = torch.from_numpy(ball.vertices).float(), torch.from_numpy(ball.faces)
    write(path, v_pos, faces, torch.full_like(v_pos, 139 / 255))
    [picture] = seen(path, light="its own", page="model-viewer.html")
    middle = picture[SIZE // 2 - 30 : SIZE // 2 + 30, SIZE // 2 - 30 : SIZE // 2 + 30]
    assert np.ptp(middle, axis=2).max() < 8  # grey
    assert 100 < middle.mean() < 170
    assert middle.std() < 25
    assert linear(middle.mean() / 255) == pytest.approx(linear(139 / 255), abs=0.15)
