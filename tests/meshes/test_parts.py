"""What surrounds the rasteriser: neighbours, seams, the terms for free vertices, files, states."""

import math

import numpy as np
import pytest
import torch
import trimesh
from lods.assets import Mesh, write
from lods.gaussians.cameras import orbit
from lods.meshes import regularize, topology
from lods.meshes.initialize import MeshFileInit, MeshRunInit, exported_glb, textured
from lods.meshes.parameters import TexturedMesh

from tests.meshes.scenes import sphere


def hinge(angle):
    """Two triangles that share the edge 0-1, with this angle between their normals (degrees)."""
    turn = math.radians(angle)
    tip = (-math.cos(turn), 0.0, math.sin(turn))
    vertices = torch.tensor([(0.0, 1, 0), (0, 0, 0), (1, 0, 0), tip], dtype=torch.float64)
    return vertices, torch.tensor([[0, 1, 2], [1, 0, 3]])


def test_neighbours_are_across_the_edges():
    _, faces = hinge(0)
    assert topology.neighbours(faces).tolist() == [[-1, -1, 1], [-1, -1, 0]]
    # three triangles at an edge: nobody's neighbour; nor is a triangle its own
    fan = torch.tensor([[0, 1, 2], [1, 0, 3], [0, 1, 4]])
    assert (topology.neighbours(fan) == -1).all()
    assert (topology.neighbours(torch.tensor([[0, 1, 1]])) == -1).all()
    _, faces = sphere(2)
    found = topology.neighbours(faces)
    for corner in range(3):  # of a closed mesh each has three, and they agree
        other = found[:, corner]
        shared = (faces[other][:, :, None] == faces[:, None]).any(-1).sum(1)
        assert (other >= 0).all() and (shared == 2).all()
        assert (found[other] == torch.arange(len(faces))[:, None]).any(1).all()


def test_vertices_of_a_seam_become_one_and_come_apart_again():
    places = torch.tensor([(0.0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)])
    unique, index = topology.weld(places)
    assert unique.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert torch.equal(unique[index], places)
    uv = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    mesh = Mesh(places, torch.tensor([[0, 1, 2], [3, 5, 4]]), uv, torch.rand(4, 5, 3))
    module = TexturedMesh(mesh)
    assert len(module.vertices) == 4 and module.faces.tolist() == [[0, 1, 2], [1, 3, 2]]
    back = module.mesh()
    assert len(back.vertices) == 6
    assert torch.equal(back.vertices[back.faces], places[mesh.faces])
    assert torch.equal(back.uv[back.faces], uv[mesh.faces])
    assert torch.equal(back.texture, mesh.texture)


@pytest.mark.parametrize("angle", [0.0, 35.0, 90.0, 180.0])
def test_normal_consistency_of_two_triangles_is_one_less_the_cosine(angle):
    vertices, faces = hinge(angle)
    value = regularize.normal_consistency(vertices, faces, topology.neighbours(faces))
    assert value.item() == pytest.approx(1 - math.cos(math.radians(angle)), abs=1e-9)


def test_the_laplacian_is_its_formula_and_nothing_for_a_shift():
    start, faces = sphere(0)  # twelve vertices of five neighbours each, all edges alike
    edge = trimesh.creation.icosphere(subdivisions=0).edges_unique_length[0]
    moved = start.clone()
    moved[3] += torch.tensor([0.3, -0.1, 0.2])
    # the vertex itself is off by all of it, its five neighbours by a fifth
    expected = 0.14 * (1 + 5 / 25) / 12 / edge**2
    value = regularize.laplacian(moved, start, faces)
    assert value.item() == pytest.approx(expected)
    assert regularize.laplacian(10 * moved, 10 * start, faces).item() == pytest.approx(expected)
    assert regularize.laplacian(start + 5, start, faces).item() == pytest.approx(0, abs=1e-20)


def test_a_smoothed_gradient_keeps_its_sum_and_leads_the_same_way():
    """A point becomes a bell of the given width, over borders that repeat; and g . smoothed(g) is
    above 0 for every g, however noisy."""
    point = torch.zeros(32, 48, 1)
    point[0, 5] = 1
    bell = regularize.smoothed(point, 2.0)[..., 0]
    assert bell.sum().item() == pytest.approx(1, abs=1e-5)
    rows = (torch.arange(32) + 16) % 32 - 16.0
    variance = (bell.sum(1) * rows.square()).sum()
    assert variance.item() == pytest.approx(4, rel=1e-3)
    assert torch.allclose(bell[1:], bell.flip(0)[:-1], atol=1e-7)
    noise = torch.randn(32, 48, 3, generator=torch.Generator().manual_seed(0))
    assert (noise * regularize.smoothed(noise, 2.0)).sum() > 0
    plain, smooth = TexturedMesh(checkered()), TexturedMesh(checkered())
    smooth.smooth_gradient(1.5)
    for mesh in (plain, smooth):
        mesh.render(orbit(1, 3.0), 16, 16)[0].square().sum().backward()
    expected = plain.charts.smoothed(plain.texture.grad, 1.5)
    assert torch.equal(smooth.texture.grad, expected)


# -- files -----------------------------------------------------------------------------------------


def checkered(size=64):
    """A ball with a texture of large squares, 8 bits exactly."""
    mesh = textured(_ball(), size)
    squares = torch.arange(size) // 16
    grey = ((squares[:, None] + squares) % 2).float()
    mesh.texture = torch.stack([grey, 0.2 + 0.6 * grey.T, 1 - grey], dim=-1)
    mesh.texture = (mesh.texture * 255).round() / 255
    return mesh


def _ball(subdivisions=2):
    vertices, faces = sphere(subdivisions)
    return Mesh(vertices.float(), faces)


@pytest.mark.parametrize("name", ["ball.glb", "ball.obj"])
def test_a_file_is_the_mesh_again(tmp_path, name):
    mesh = TexturedMesh(checkered())
    mesh.write(tmp_path / name)
    again = TexturedMesh.file(tmp_path / name)
    assert len(again.vertices) == len(mesh.vertices)
    views = orbit(3, 3.0)
    one, other = (each.render(views, 48, 48)[0] for each in (mesh, again))
    assert torch.allclose(one, other, atol=1e-5)


def test_a_mesh_goes_back_to_where_it_was(tmp_path):
    """Read from y up, far from the origin and large, and written in place: the same file."""
    start = checkered()
    start.vertices = 40 * start.vertices + torch.tensor([100.0, -30.0, 7.0])
    write(tmp_path / "there.obj", start, "y-up")
    options = {"front": "+z", "up": "+y", "half_side": 0.8}
    found = MeshFileInit(str(tmp_path / "there.obj"), **options).load()
    mesh = TexturedMesh(found)
    assert mesh.vertices.abs().max().item() == pytest.approx(0.8, abs=1e-6)
    other = TexturedMesh(textured(_ball(1), 32))
    other.load_state_dict(mesh.state_dict())  # which has the placement too
    other.write(tmp_path / "again.obj", in_place=True)
    one, two = (trimesh.load(tmp_path / f"{n}.obj", process=False) for n in ("there", "again"))
    assert np.allclose(np.sort(one.vertices, 0), np.sort(two.vertices, 0), atol=1e-4)


def test_colours_of_vertices_become_a_texture(tmp_path):
    """Charts of xatlas, painted with what lies between the vertices: the same picture."""
    mesh = _ball(3)
    mesh.colours = (mesh.vertices + 1) / 2
    trimesh.Trimesh(
        mesh.vertices.numpy(),
        mesh.faces.numpy(),
        vertex_colors=(mesh.colours * 255).round().byte().numpy(),
        process=False,
    ).export(tmp_path / "ball.ply")
    found = TexturedMesh.file(tmp_path / "ball.ply", texture_size=256)
    assert found.texture.shape == (256, 256, 3) and len(found.vertices) == len(mesh.vertices)
    image, alpha, info = found.render(orbit(4, 3.0), 64, 64)
    points = (info["weights"][..., None] * found.vertices[found.faces[info["face"].long()]]).sum(-2)
    inside = (alpha[..., 0] == 1) & (info["face"] >= 0)
    error = (image - (points + 1) / 2)[inside].abs()
    assert error.mean() < 1 / 255 and error.quantile(0.999) < 6 / 255
    assert error.max() < 0.1  # beside a seam of the charts


def test_new_charts_keep_the_picture():
    mesh = checkered(256)
    views = orbit(3, 3.0)
    kept, anew = TexturedMesh(mesh), TexturedMesh(textured(mesh, 512, unwrap=True))
    assert not torch.equal(kept.uv[kept.uv_faces], anew.uv[anew.uv_faces])
    one, other = (each.render(views, 128, 128)[0] for each in (kept, anew))
    assert (one - other).abs().mean() < 0.01


def test_a_file_is_centred_and_scaled(tmp_path):
    trimesh.creation.box((2.0, 1, 1)).apply_translation((5, 0, 0)).export(tmp_path / "box.stl")
    mesh = MeshFileInit(str(tmp_path / "box.stl"), half_side=0.9).load()
    low, high = mesh.vertices.aminmax(dim=0)
    assert torch.allclose(high, torch.tensor([0.9, 0.45, 0.45]), atol=1e-6)
    assert torch.allclose(low, -high, atol=1e-6)
    kept = MeshFileInit(str(tmp_path / "box.stl"), front="-y").load()  # x right, then
    assert torch.allclose(kept.vertices.mean(0), torch.tensor([0.0, 5, 0]), atol=1e-5)


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "there is no file"),
        ("v 0 0 0\n", "no triangles"),
        ("f 1 2 9\nv 0 0 0\n", "cannot be"),
    ],
)
def test_a_file_that_is_no_mesh_is_one_line(tmp_path, content, said):
    path = tmp_path / "bad.obj"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        MeshFileInit(str(path)).load()
    assert "\n" not in str(caught.value)


def test_the_surface_of_a_run_is_where_it_is_in_the_run(tmp_path):
    """The glb of the latest step, whatever its name; neither moved nor scaled."""
    mesh = TexturedMesh(checkered())
    with torch.no_grad():
        mesh.vertices.mul_(0.4).add_(torch.tensor([0.1, 0.2, 0.3]))
    for step, name in ((5, "b.glb"), (40, "a.glb"), (9, "c.glb")):
        folder = tmp_path / "run" / "save" / f"it{step}-export"
        folder.mkdir(parents=True)
        mesh.write(folder / name)
        with torch.no_grad():
            mesh.vertices[0, 0] += 0.01
    found = MeshRunInit(str(tmp_path / "run")).load()
    low, high = found.vertices.aminmax(dim=0)
    assert torch.allclose((low + high) / 2, torch.tensor([0.1, 0.2, 0.3]), atol=0.02)
    assert exported_glb(tmp_path / "run") == tmp_path / "run/save/it40-export/a.glb"
    views = orbit(2, 3.0)
    one = TexturedMesh.file(tmp_path / "run/save/it40-export/a.glb").render(views, 32, 32)[0]
    assert torch.equal(TexturedMesh(found).render(views, 32, 32)[0], one)


@pytest.mark.parametrize(
    "path, said",
    [("", "needs system.geometry.run.path"), ("none", "there is no folder"), (".", "no exported")],
)
def test_a_run_without_a_surface_is_one_line(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        MeshRunInit(path).load()
    assert "\n" not in str(caught.value)


# -- states ----------------------------------------------------------------------------------------


def test_a_state_brings_its_own_mesh():
    stored, other = TexturedMesh(checkered()), TexturedMesh(textured(_ball(1), 32))
    with torch.no_grad():
        stored.vertices.add_(0.1)
    other.load_state_dict(stored.state_dict())
    views = orbit(2, 3.0)
    assert torch.equal(stored.render(views, 32, 32)[0], other.render(views, 32, 32)[0])
    assert torch.equal(stored.laplacian(), other.laplacian())


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("faces", torch.full((320, 3), 999), "point beyond its 162 vertices"),
        ("faces", torch.zeros(320, 3), "no part of a mesh"),
        ("vertices", torch.full((162, 3), math.nan), "not finite"),
        ("uv_faces", torch.zeros(7, 3).long(), "do not agree in number"),
        ("start", torch.zeros(7, 3), "do not agree in number"),
        ("texture", torch.zeros(0, 4, 3), "texture is empty"),
        ("texture", torch.zeros(1, 1, 3).expand(10**6, 10**6, 3), "claims more values"),
        ("texture", torch.zeros(4, 4, 4), "no part of a mesh"),
        ("placement", torch.zeros(12), "no part of a mesh"),
    ],
)
def test_a_state_that_is_no_mesh_is_refused(name, value, said):
    mesh = TexturedMesh(checkered())
    state = mesh.state_dict() | {name: value}
    with pytest.raises(ValueError, match=said):
        mesh.load_state_dict(state)


def test_colours_stay_within_their_range():
    mesh = TexturedMesh(checkered())
    with torch.no_grad():
        mesh.texture.mul_(3).sub_(1)
    mesh.limit_colours()
    assert mesh.texture.min() == 0 and mesh.texture.max() == 1


def test_only_free_vertices_are_trained():
    fixed, free = TexturedMesh(checkered()), TexturedMesh(checkered(), free_vertices=True)
    assert [group["name"] for group in fixed.groups()] == ["texture"]
    assert [group["name"] for group in free.groups()] == ["texture", "vertices"]
    fixed.render(orbit(1, 3.0), 16, 16)[0].sum().backward()
    assert fixed.vertices.grad is None and fixed.texture.grad.any()
    free.render(orbit(1, 3.0), 16, 16)[0].sum().backward()
    assert free.vertices.grad.any()
