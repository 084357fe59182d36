"""The charts of a texture: what is trained, what filters read beside it, what no view reaches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lods.assets import Mesh, read
from lods.assets.mesh import sampled
from lods.gaussians.cameras import intrinsics, orbit, world_to_camera
from lods.meshes import charts as ch
from lods.meshes import regularize
from lods.meshes.initialize import textured
from lods.meshes.parameters import TexturedMesh
from lods.meshes.rasterize import rasterization

from tests.meshes.scenes import sphere

COLOUR = torch.tensor([0.8, 0.2, 0.4])


def grey_ball(size=64):
    vertices, faces = sphere(2)
    return TexturedMesh(textured(Mesh(vertices.float(), faces), size))


def square(size=64, uv=None):
    """A square of side 2 in the plane x = 0, seen from azimuth 0, that fills its texture."""
    corners = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    places = F.pad(2 * corners - 1, (1, 0))
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    random = torch.Generator().manual_seed(0)
    texture = torch.rand(size, size, 3, generator=random)
    return TexturedMesh(Mesh(places, faces, corners if uv is None else uv, texture))


def painted(mesh, views, pixels=48, smoothing=0.0):
    """Each texel that gets any gradient from these views has the colour, as an optimizer leaves it
    that reaches its aim; the others are as they were."""
    mesh.smooth_gradient(smoothing)
    mesh.render(views, pixels, pixels)[0].sum().backward()
    touched = (mesh.texture.grad != 0).any(-1)
    with torch.no_grad():
        mesh.texture[touched] = COLOUR
    return touched


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
@pytest.mark.parametrize("pixels", [24, 96])
def test_an_object_of_one_colour_has_it_at_every_magnification(tmp_path, smoothing, pixels):
    """Trained only where some views from the front see it: no filter of any renderer, nor any
    smaller copy of the texture, finds another colour in the file."""
    mesh = grey_ball(128)
    touched = painted(mesh, orbit(2, 3.0, 10), pixels, smoothing)
    assert 0.05 < touched.float().mean() < 0.95
    mesh.write(tmp_path / "ball.glb")
    texture = read(tmp_path / "ball.glb").texture
    expected = (255 * COLOUR).round() / 255
    level = texture.permute(2, 0, 1)[None]
    while level.shape[-1] > 1:
        assert torch.allclose(level[0], expected[:, None, None].expand_as(level[0]), atol=1e-6)
        level = F.avg_pool2d(level, 2)
    places = torch.rand(5000, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sampled(texture, places), expected, atol=1e-6)


def test_what_is_drawn_is_what_is_written():
    """Also before what is unseen is filled: beside the charts the drawn texture has their colours,
    from the first step, and the gradient of a texel there is its border's."""
    mesh = grey_ball()
    charts = mesh.charts
    with torch.no_grad():
        mesh.texture[charts.own] = COLOUR
    assert torch.equal(mesh.shown_texture(), COLOUR.expand(64, 64, 3))
    weights = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    (mesh.shown_texture() * weights).sum().backward()
    assert not mesh.texture.grad[~charts.own].any()
    assert torch.allclose(mesh.texture.grad.sum((0, 1)), weights.sum((0, 1)), rtol=1e-4)
    flat = weights.reshape(-1, 3)
    expected = flat.clone().index_fill_(0, charts.beside, 0)
    expected.index_add_(0, charts.border, flat[charts.beside])
    assert torch.allclose(mesh.texture.grad.reshape(-1, 3), expected, atol=1e-5)


def test_a_texture_stays_as_it_is_beside_what_has_not_changed():
    """To the last bit; what goes with a texel that has changed follows it."""
    mesh = grey_ball()
    random = torch.Generator().manual_seed(0)
    mesh = TexturedMesh(mesh.mesh())
    start = torch.rand(64, 64, 3, generator=random)
    with torch.no_grad():
        mesh.texture.copy_(start)
        mesh.start_texture.copy_(start)
    assert torch.equal(mesh.mesh().texture, start)
    charts = mesh.charts
    one = charts.number == charts.number[charts.own][0]
    with torch.no_grad():
        mesh.texture[one] = COLOUR
    goes = one.flatten().clone()
    goes[charts.beside] = one.flatten()[charts.border]
    expected = torch.where(goes.view(64, 64, 1), COLOUR, start)
    assert goes.sum() > one.sum() and torch.equal(mesh.mesh().texture, expected)


def test_each_point_of_a_chart_lies_in_a_texel_of_its_own():
    """However thin or small the triangle is."""
    random = np.random.default_rng(0)
    ends = random.uniform(0.05, 0.95, (40, 1, 2))
    corners = ends + random.normal(size=(40, 3, 2)) * 10 ** random.uniform(-4, -1.5, (40, 1, 1))
    corners[::3, 2] = corners[::3, 1] * (1 - 1e-6) + corners[::3, 0] * 1e-6  # hardly any area
    uv = torch.from_numpy(corners.clip(0, 1).reshape(-1, 2)).float()
    faces = torch.arange(120).view(-1, 3)
    found = ch.charts_of(F.pad(uv, (0, 1)), faces, uv, faces, 64, 48)
    shares = torch.from_numpy(random.dirichlet([0.5] * 3, (40, 50))).float()
    points = torch.einsum("fpk,fkd->fpd", shares, uv[faces]).reshape(-1, 2)
    column, row = (points[:, 0] * 48).long(), ((1 - points[:, 1]) * 64).long()
    assert (found.number[row.clamp(0, 63), column.clamp(0, 47)] >= 0).all()


def test_texels_without_a_gradient_stay_to_the_last_bit():
    """Adam steps as far for a gradient of rounding errors as for any other."""
    mesh = square(128)
    mesh.smooth_gradient(2.0)
    start = mesh.texture.detach().clone()
    optimizer = torch.optim.Adam(mesh.groups(texture=0.05), eps=1e-15)
    for _ in range(3):
        image = mesh.render(orbit(1, 3.0), 100, 100)[0]
        image[0, 40:60, 40:60].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = (mesh.texture != start).any(-1)
    assert changed[54:74, 54:74].all()
    assert not changed[:24].any() and not changed[:, :24].any()
    assert not changed[104:].any() and not changed[:, 104:].any()


def test_no_gradient_goes_from_one_chart_to_another():
    random = torch.Generator().manual_seed(0)
    charts = torch.randint(-1, 3, (6, 7), generator=random)
    charts = charts.repeat_interleave(5, 0).repeat_interleave(5, 1)
    a, b = torch.randn(2, 30, 35, 3, generator=random, dtype=torch.float64).float()
    one, other = (regularize.smoothed(each, 1.7, charts) for each in (a, b))
    assert torch.allclose((a * other).sum(), (one * b).sum(), atol=1e-3)  # symmetric
    assert (a * one).sum() > 0 and not one[charts < 0].any()
    only = regularize.smoothed(a * (charts == 1)[..., None], 1.7, charts)
    assert torch.allclose(only, one * (charts == 1)[..., None], atol=1e-6)


def test_a_smoothed_gradient_goes_over_seams():
    """What is constant over the surface stays so, a point keeps its sum and reaches the chart
    across the seam, and the operator is symmetric and never negative."""
    mesh = grey_ball()
    charts = mesh.charts
    own = charts.own[..., None]
    plain = charts.smoothed(torch.ones(64, 64, 1), 2.0)
    assert torch.allclose(plain, own.float(), atol=1e-5)
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 64, 1, generator=random) * own
    assert torch.allclose(
        (a * charts.smoothed(b, 2.0)).sum(), (charts.smoothed(a, 2.0) * b).sum(), atol=1e-3
    )
    assert (a * charts.smoothed(a, 2.0)).sum() > 0
    across = 0
    for number in charts.number.unique()[1:]:
        one = (charts.number == number).float()[..., None]
        found = charts.smoothed(one, 2.0)
        assert found.sum().item() == pytest.approx(one.sum().item(), rel=1e-4)
        across += int((found[charts.number != number] > 0.3).sum())
    assert across > 50


@pytest.mark.parametrize("pixels, level", [(7, 4), (15, 3), (60, 1), (200, 0)])
def test_every_texel_within_the_pixels_is_trained(pixels, level):
    """Of a texture finer than the pixels a copy of their size is drawn."""
    mesh, fovy = square(128), 2 * np.degrees(np.arctan(0.2))  # the square fills the picture
    views = orbit(1, 5.0, 0.0)
    image, alpha, _ = mesh.render(views, pixels, pixels, fovy=fovy)
    assert alpha.mean() > 0.8
    image.sum().backward()
    assert (mesh.texture.grad > 0).all()
    shown = ch.smaller(mesh.texture.detach(), level) if level else mesh.texture.detach()
    assert shown.shape[0] == 128 >> level
    K = intrinsics(torch.deg2rad(views.new_full((1,), fovy)), pixels, pixels)
    parts = mesh.vertices, mesh.faces, world_to_camera(views), K, pixels, pixels
    places = {"uv": mesh.uv, "uv_faces": mesh.uv_faces}
    assert torch.equal(rasterization(*parts, texture=shown, **places)[0], image)


def test_a_smaller_copy_of_one_colour_is_of_that_colour():
    texture = COLOUR.expand(100, 60, 3)
    for level in range(8):
        found = ch.smaller(texture, level)
        assert found.shape[:2] == (max(1, 100 >> level), max(1, 60 >> level))
        assert torch.allclose(found, COLOUR, atol=1e-6)


def test_a_smaller_copy_lies_where_the_texture_does():
    """What is linear over the texture stays so; its middle, and its mean, stay too."""
    column = (torch.arange(64) + 0.5) / 64
    texture = torch.stack([column.expand(32, 64), column[:32, None].expand(32, 64)], dim=-1)
    found = ch.smaller(texture, 2)
    assert torch.allclose(found[2:-2, 2:-2, 0], ((torch.arange(16) + 0.5) / 16)[2:-2].expand(4, 12))
    assert torch.allclose(found.mean((0, 1)), texture.mean((0, 1)), atol=1e-3)


def test_a_chart_is_what_hangs_together_in_the_texture():
    """Also where a file has corners of its own for each triangle."""
    mesh = square(16)
    uv = mesh.uv[mesh.uv_faces].reshape(-1, 2)
    apart = ch.charts_of(mesh.vertices, mesh.faces, uv, torch.arange(6).view(2, 3), 16, 16)
    assert torch.equal(apart.number, mesh.charts.number) and (apart.number == 0).all()
    ball = grey_ball()
    assert len(ball.charts.number.unique()) > 2


def test_a_texture_that_repeats_is_drawn_as_it_is():
    corners = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    mesh = square(16, 3 * corners)
    assert mesh.charts is None and mesh.shown_texture() is mesh.texture
    mesh.smooth_gradient(1.0)
    mesh.render(orbit(1, 3.0), 32, 32)[0].sum().backward()
    assert torch.equal(mesh.mesh().texture, mesh.texture)


def test_a_state_without_the_texture_of_the_start_is_of_a_trained_mesh():
    mesh, other = grey_ball(), square(16)
    state = mesh.state_dict()
    del state["start_texture"]
    other.load_state_dict(state)
    assert (other.start_texture == 0.5).all() and other.charts.number.shape == (64, 64)
    with pytest.raises(ValueError, match="texture and start_texture do not agree in size"):
        other.load_state_dict(state | {"start_texture": torch.zeros(3, 3, 3)})
