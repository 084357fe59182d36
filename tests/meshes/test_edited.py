"""Textures that are edited: what is locked stays, the source is drawn as it was, anchors hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lods import assets
from lods.assets import Mesh
from lods.assets.baking import shared_texels
from lods.edits.trace import traced
from lods.meshes.initialize import textured
from lods.threestudio.mesh import MeshRasterizer
from PIL import Image

import threestudio
from tests.gaussians.clouds import cameras
from tests.meshes.scenes import sphere
from tests.runs import ROOT, fit, launch, small_run, two_and_two

BOX = [-1.0, -1.0, 0.0, 1.0, 1.0, 1.0]  # the upper half
SIZE = 48


@pytest.fixture(scope="module")
def glb(tmp_path_factory):
    """A ball with a texture of random bytes, also beside its charts."""
    path = tmp_path_factory.mktemp("mesh") / "ball.glb"
    vertices, faces = sphere(2)
    mesh = textured(Mesh(0.8 * vertices.float(), faces), SIZE)
    random = torch.Generator().manual_seed(0)
    mesh.texture = torch.randint(0, 256, (SIZE, SIZE, 3), generator=random) / 255
    assets.write(path, mesh)
    return path


def geometry_of(path, **fields):
    config = {"init_type": "file", "file": {"path": str(path)}, **fields}
    return threestudio.find("lods-edited-mesh")(config)


def renderer_of(geometry):
    background = threestudio.find("solid-color-background")({"color": [1.0, 1.0, 1.0]})
    material = threestudio.find("no-material")({"n_output_dims": 0})
    return MeshRasterizer({}, geometry=geometry, material=material, background=background)


def train(geometry, n=4):
    """Steps of Adam towards a random picture, held by the anchor."""
    optimizer = torch.optim.Adam([geometry.texture], lr=0.05, eps=1e-15)
    renderer, batch = renderer_of(geometry), cameras([0, 100])
    target = torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(n):
        error = (renderer(**batch)["comp_rgb"] - target).square().sum()
        optimizer.zero_grad()
        (error + geometry.anchor_losses()["color"]).backward()
        optimizer.step()
        geometry.limit_colours()


def going(geometry, inside):
    """These texels and those beside the charts that go with them."""
    found, charts = inside.flatten().clone(), geometry.charts
    found[charts.beside] = found[charts.border]
    return found.view(inside.shape)


# --- locked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
def test_what_is_outside_of_the_box_keeps_every_bit(glb, tmp_path, smoothing):
    """In the texture, in the file that is written, and of it the bytes of the picture."""
    geometry = geometry_of(glb, box=BOX, texture_smoothing=smoothing)
    start, charts = geometry.texture.detach().clone(), geometry.charts
    above = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    above[charts.own] = geometry.points()[:, 2] >= 0
    assert torch.equal(geometry.inside, above) and 0 < above.sum() < charts.own.sum()
    train(geometry)
    changed = (geometry.texture != start).any(-1)
    assert not changed[~above].any() and changed[above].float().mean() > 0.3
    assets.write(tmp_path / "after.glb", geometry.mesh())
    before, after = (assets.read(path).texture for path in (glb, tmp_path / "after.glb"))
    differ = (before != after).any(-1)
    assert not differ[~going(geometry, above)].any() and differ.any()
    assert torch.equal(geometry.vertices, geometry.start)


def test_an_optimizer_that_moves_what_has_no_gradient_cannot_touch_what_is_locked(glb):
    geometry = geometry_of(glb, box=BOX)
    start = geometry.texture.detach().clone()
    optimizer = torch.optim.AdamW([geometry.texture], lr=0.1, weight_decay=1.0)
    renderer_of(geometry)(**cameras([0]))["comp_rgb"].sum().backward()
    optimizer.step()
    geometry.limit_colours()
    outside = ~geometry.inside
    assert torch.equal(geometry.texture[outside], start[outside])


def test_a_mask_frees_what_lies_before_its_light_pixels(glb, tmp_path):
    """From the front, +y to the right: the right half."""
    pixels = np.zeros((40, 40), np.uint8)
    pixels[:, 20:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    geometry = geometry_of(glb, mask=str(tmp_path / "mask.png"))
    side, found = geometry.points()[:, 1], geometry.inside[geometry.charts.own]
    sure = side.abs() > 1e-4  # nothing lies between two pixels
    assert torch.equal(found[sure], side[sure] > 0) and sure.sum() > 500
    both = geometry_of(glb, mask=str(tmp_path / "mask.png"), box=BOX)
    assert torch.equal(both.inside, geometry.inside & geometry_of(glb, box=BOX).inside)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"box": [5.0, 5, 5, 6, 6, 6]}, "box holds none of the .* texels of the surface, whose"),
        ({"box": [0.0, 1, 2]}, "six numbers"),
        ({"mask": "none.png"}, "there is no picture"),
        ({"free_vertices": True}, "changes the texture, and the shape stays"),
    ],
)
def test_a_region_that_is_none_is_one_line(glb, fields, said):
    with pytest.raises(ValueError, match=said) as caught:
        geometry_of(glb, **fields)
    assert "\n" not in str(caught.value)


def test_texels_that_several_parts_share_are_in_no_region(tmp_path):
    """Two squares, one above the other, with the same texels; charts of their own tell them
    apart."""
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    lower = torch.nn.functional.pad(0.5 * square, (1, 0))
    vertices = torch.cat([lower, lower + torch.tensor([0.0, 0, 0.7])])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    texture = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))
    uv = square.repeat(2, 1)
    assets.write(tmp_path / "two.glb", Mesh(vertices, torch.cat([faces, faces + 4]), uv, texture))
    assert geometry_of(tmp_path / "two.glb").count == 256
    box = [-1.0, -1.0, 0.6, 1.0, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"share texels, .* system\.geometry\.unwrap=true"):
        geometry_of(tmp_path / "two.glb", box=box)
    apart = geometry_of(tmp_path / "two.glb", box=box, unwrap=True, texture_size=64)
    height = torch.full((64, 64), -1.0)
    height[apart.charts.own] = apart.points()[:, 2]
    assert torch.equal(apart.inside, height >= 0.6) and apart.inside.any()
    assert shared_texels(uv, faces, 16, 16) == 0
    assert shared_texels(uv, torch.cat([faces, faces + 4]), 16, 16) > 200


# --- the source, anchors, words -------------------------------------------------------------------


def test_the_source_is_drawn_as_it_was(glb):
    geometry, batch = geometry_of(glb, box=BOX), cameras([0, 100])
    renderer = renderer_of(geometry)
    before = renderer(**batch)
    train(geometry)
    now = renderer(**batch)
    seen = renderer.before(geometry.source, before["comp_rgb_bg"], **batch)
    assert torch.equal(seen, before["comp_rgb"].detach())
    assert (now["comp_rgb"] - seen).abs().max() > 0.01


def test_the_anchor_loss_is_the_mean_square_of_what_has_changed(glb):
    geometry = geometry_of(glb, box=BOX)
    assert geometry.anchor_losses()["color"] == 0
    with torch.no_grad():
        geometry.texture[geometry.inside] += torch.tensor([0.1, 0.0, -0.2])
    assert geometry.anchor_losses()["color"].item() == pytest.approx(0.05, rel=1e-4)


def test_a_map_is_traced_to_the_texels_that_its_pixels_show(glb):
    """The weights of a texel are what a picture shows where it alone has a colour."""
    geometry = geometry_of(glb)
    renderer, batch = renderer_of(geometry), cameras([0, 100])
    views = [{k: batch[k][i : i + 1] for k in ("c2w", "fovy")} for i in range(2)]
    maps = torch.rand(2, 24, 32, generator=torch.Generator().manual_seed(3))

    def draw(colors, view):
        return renderer.draw(geometry.source, colors, **view, height=24, width=32)[0][0]

    found = traced(draw, SIZE * SIZE, maps, views)
    assert not found[geometry.charts.beside].any()
    goes_with = torch.arange(SIZE * SIZE)
    goes_with[geometry.charts.beside] = geometry.charts.border
    for i in found.argsort()[[-1, -200, -400]].tolist():
        colors = (goes_with == i).float()[:, None].expand(-1, 3)
        texture = colors.view(SIZE, SIZE, 3)
        weights = []
        for view in views:
            image, _, _ = renderer._draw(geometry, **view, height=24, width=32, texture=texture)
            weights.append(image[0, ..., 0])
        total = torch.stack(weights)
        want = (total * maps).sum() / total.sum()
        assert found[i].item() == pytest.approx(want.item(), rel=1e-3)


def test_a_state_brings_its_region():
    one = threestudio.find("lods-edited-mesh")({"init_type": "none"})
    other = threestudio.find("lods-edited-mesh")({"init_type": "ball", "texture_size": 32})
    other.restrict(torch.arange(32 * 32) % 3 == 0)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.inside, other.inside) and one.count == other.count > 0
    for wrong in (torch.ones(3, 3, dtype=torch.bool), torch.ones(32, 32)):
        with pytest.raises(ValueError, match="inside is not of its texture"):
            one.load_state_dict(other.state_dict() | {"inside": wrong})


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_sd, glb, tmp_path, monkeypatch):
    """``run(*overrides) -> (files, overrides)`` of an edit of seconds, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def make(*more):
        files = [str(ROOT / "configs" / f"{n}.yaml") for n in ("lods-mesh-embedding", "edit-mesh")]
        return files, [
            *small_run(tiny_sd()),
            f"system.geometry.file.path={glb}",
            "system.prompt_processor.source_prompt=a blue car",
            f"system.geometry.box={BOX}",
            *more,
        ]

    return make


def test_four_steps_of_an_edit_are_two_and_two(run):
    keys = ("state_dict", "optimizer_states", "rng_state", "global_step")
    start, whole = two_and_two(run(), keys)
    now, then = (each["state_dict"]["geometry.texture"] for each in (start, whole))
    inside = whole["state_dict"]["geometry.inside"]
    assert not torch.equal(now, then) and torch.equal(now[~inside], then[~inside])


@pytest.mark.slow
def test_nothing_moves_for_one_text(run):
    same_text = "system.prompt_processor.source_prompt=a red car"
    system, _ = fit(*run(same_text, "system.prompt_processor.prompt=a red car"), max_steps=1)
    assert torch.equal(system.geometry.texture, system.geometry.start_texture)


@pytest.mark.slow
def test_a_run_may_change_the_texels_that_the_model_sees_some_words_in(run):
    system, _ = fit(*run("system.where=a blue car", "system.where_level=0.5"), max_steps=1)
    geometry = system.geometry
    assert 0 < geometry.count < geometry_of(Path(geometry.cfg.file.path), box=BOX).count
    outside = ~geometry.inside
    assert torch.equal(geometry.texture[outside], geometry.start_texture[outside])
    with pytest.raises(ValueError, match="'a blue car' is seen in no texel above system"):
        fit(*run("system.where=a blue car", "system.where_level=1"), max_steps=1)


@pytest.mark.slow
def test_a_run_of_an_edit_leaves_a_glb_where_the_mesh_was(run, glb):
    assert launch(*run("name=edit", "system.exporter.fmt=glb")) == 0
    [made] = Path("outputs/edit/t").glob("save/it2-export/mesh.glb")
    before, after = (assets.read(path, half_side=None) for path in (glb, made))
    for one, other in zip(before.vertices.aminmax(dim=0), after.vertices.aminmax(dim=0)):
        assert torch.allclose(one, other, atol=1e-5)
    with Image.open("outputs/edit/t/save/it2-test-sheet.png") as sheet:  # before and after
        assert sheet.size == (4 * 48, 2 * 24)
