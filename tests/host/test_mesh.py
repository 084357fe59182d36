"""Isosurfaces and meshes, against balls, boxes and trimesh."""

import numpy as np
import pytest
import torch
import trimesh

import threestudio
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.isosurface import marching_cubes, sample_grid
from threestudio.models.mesh import Mesh
from threestudio.utils.errors import UserError

CENTRE = torch.tensor([0.3, -0.2, 0.1])
RADIUS = 0.4


class Balls(BaseImplicitGeometry):
    """field = 1 - (distance to the nearest ball's surface): 1 on the balls, more inside."""

    balls = [(CENTRE, RADIUS)]
    seen = 0

    def forward_field(self, points):
        self.seen = max(self.seen, len(points))
        return self.distance(points), None

    def distance(self, points):
        inside = [r - (points - c).norm(dim=-1, keepdim=True) for c, r in self.balls]
        return 1 + torch.stack(inside).amax(dim=0)

    def forward_level(self, field, threshold):
        return threshold - field


def ball(**cfg):
    return Balls({"isosurface_resolution": 24, "isosurface_threshold": 1.0, **cfg}).cpu()


def to_trimesh(mesh):
    return trimesh.Trimesh(mesh.v_pos.numpy(), mesh.t_pos_idx.numpy(), process=False)


@pytest.fixture
def messages(monkeypatch):
    """What is logged about options of the isosurface."""
    logged = []
    monkeypatch.setattr(threestudio, "info", logged.append)
    monkeypatch.setattr(threestudio, "warn", logged.append)
    return lambda: [message for message in logged if "isosurface" in message]


# --- isosurface ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mt", "mc-cpu"])
def test_a_ball_is_round_closed_and_outside_out(method, messages):
    mesh = ball(isosurface_method=method, isosurface_coarse_to_fine=False).isosurface()
    away = mesh.v_pos - CENTRE  # off centre: exchanged axes would show
    voxel = 2 / 23
    assert (away.norm(dim=1) - RADIUS).abs().max() < 0.15 * voxel
    solid = to_trimesh(mesh)
    assert solid.is_watertight and solid.euler_number == 2
    assert solid.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.04)  # > 0: outside out
    assert ((away / RADIUS * mesh.v_nrm).sum(dim=1) > 0.97).all()
    assert torch.equal(mesh.extras["bbox"], torch.tensor([[-1.0] * 3, [1.0] * 3]))
    assert len(messages()) == (method == "mt")  # says that it is marching cubes


def test_the_second_pass_spends_its_points_in_the_surface_s_own_box():
    one = ball(isosurface_coarse_to_fine=False).isosurface()
    two = ball().isosurface()
    low, high = one.v_pos.amin(dim=0), one.v_pos.amax(dim=0)
    box = torch.stack([low - 0.1 * (high - low), high + 0.1 * (high - low)])
    torch.testing.assert_close(two.extras["bbox"], box)
    assert (two.v_pos.amin(dim=0) - low).abs().max() < 2 / 23
    assert (two.v_pos.amax(dim=0) - high).abs().max() < 2 / 23
    error = [((m.v_pos - CENTRE).norm(dim=1) - RADIUS).abs().max() for m in (one, two)]
    assert error[1] < 0.5 * error[0] and len(two.v_pos) > 3 * len(one.v_pos)


def test_the_box_of_the_second_pass_stays_in_the_cube():
    geometry = ball()
    geometry.balls = [(torch.zeros(3), 0.95)]
    assert geometry.isosurface().extras["bbox"].abs().max() == 1


def test_a_surface_that_passes_exactly_through_grid_points_is_closed():
    axis = torch.arange(-4, 5)
    level = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).abs().sum(dim=0) - 3
    mesh = marching_cubes(level.float(), torch.tensor([[-4.0] * 3, [4.0] * 3]))
    assert torch.allclose(mesh.v_pos.abs().sum(dim=1), torch.tensor(3.0), atol=1e-5)
    solid = to_trimesh(mesh)
    assert solid.is_watertight and solid.volume == pytest.approx(36, rel=1e-4)  # octahedron
    assert mesh.v_nrm.norm(dim=1).allclose(torch.tensor(1.0))


def test_the_grid_is_the_box_whatever_the_chunk():
    bbox = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 3.0, 2.5]])
    grid = sample_grid(lambda p: p @ torch.tensor([[1.0], [10.0], [100.0]]), 4, bbox)
    assert grid[0, 0, 0] == 199 and grid[3, 0, 0] == 201 and grid[0, 3, 0] == 229
    assert grid[0, 0, 3] == 249 and grid[1, 2, 3] == pytest.approx(-1 / 3 + 20 + 250)
    geometry = ball(isosurface_chunk=1000)
    mesh = geometry.isosurface()
    assert geometry.seen == 1000
    torch.testing.assert_close(mesh.v_pos, ball().isosurface().v_pos)


def test_an_automatic_threshold_is_one_mean_for_both_passes(messages):
    geometry = ball(isosurface_threshold="auto")
    field = sample_grid(geometry.distance, 24, geometry.bbox).numpy()
    threshold = field[field > 1e-5].mean()
    mesh = geometry.isosurface()
    assert abs(geometry.distance(mesh.v_pos) - threshold).max() < 0.01
    assert any(f"{threshold:.4g}" in message for message in messages())


def test_an_int_is_a_threshold():
    torch.testing.assert_close(
        ball(isosurface_threshold=1).isosurface().v_pos, ball().isosurface().v_pos
    )


def test_no_surface_is_one_sentence_with_a_remedy():
    with pytest.raises(UserError, match=r"=25: the field lies between .* and 1\.\d+; lower"):
        ball(isosurface_threshold=25).isosurface()
    with pytest.raises(UserError, match=r"raise system\.geometry\.isosurface_threshold"):
        ball(isosurface_threshold=-9.0).isosurface()
    with pytest.raises(ValueError, match="isosurface is false"):
        ball(isosurface=False).isosurface()
    geometry = ball(isosurface_threshold="auto")
    geometry.distance = lambda points: points[:, :1] * 0 - 1
    with pytest.raises(UserError, match=r"auto is the mean .* between -1 and -1"):
        geometry.isosurface()
    geometry.distance = lambda points: points[:, :1].log()
    with pytest.raises(UserError, match="NaN"):
        geometry.isosurface()


def test_an_infinite_density_is_inside():
    geometry = ball()
    geometry.distance = lambda points: (1e3 * (0.5 - points.norm(dim=1, keepdim=True))).exp()
    mesh = geometry.isosurface()
    assert mesh.v_pos.isfinite().all()
    assert to_trimesh(mesh).is_watertight and mesh.v_pos.norm(dim=1).min() > 0.4


def test_wrong_options_are_refused_when_the_geometry_is_made():
    for wrong in (
        {"isosurface_method": "mc-gpu"},
        {"isosurface_threshold": "automatic"},
        {"isosurface_resolution": 1},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ball(**wrong)


def test_a_deformable_grid_is_warned_about(messages):
    ball(isosurface_method="mc-cpu", isosurface_deformable_grid=True).isosurface()
    assert "isosurface_deformable_grid has no effect" in messages()[0]


# --- outliers -----------------------------------------------------------------------------------


def two_balls(**cfg):
    geometry = ball(isosurface_coarse_to_fine=False, **cfg)
    geometry.balls = [(CENTRE, RADIUS), (torch.tensor([-0.7, 0.7, -0.7]), 0.1)]
    return geometry.isosurface()


def test_small_parts_are_removed():
    both = two_balls(isosurface_remove_outliers=False)
    alone = ball(isosurface_coarse_to_fine=False).isosurface()
    n_small = len(both.t_pos_idx) - len(alone.t_pos_idx)
    assert n_small > 10
    fraction = n_small / len(alone.t_pos_idx)
    for threshold in (n_small, 0.9 * fraction):
        kept = two_balls(isosurface_outlier_n_faces_threshold=threshold)
        assert torch.equal(kept.t_pos_idx, both.t_pos_idx)
    for threshold in (n_small + 1, 1.1 * fraction, len(alone.t_pos_idx)):
        kept = two_balls(isosurface_outlier_n_faces_threshold=threshold)
        assert torch.equal(kept.v_pos, alone.v_pos)
        assert torch.equal(kept.t_pos_idx, alone.t_pos_idx)
    with pytest.raises(UserError, match=r"outlier_n_faces_threshold=9999 .* lower it"):
        two_balls(isosurface_outlier_n_faces_threshold=9999)


def test_what_a_mesh_keeps_without_its_outliers():
    both = two_balls(isosurface_remove_outliers=False)
    both.set_vertex_color(both.v_pos.abs())
    kept = both.remove_outlier(0.9)
    assert len(kept.v_pos) < len(both.v_pos) and "bbox" in kept.extras
    assert torch.equal(kept.v_rgb, kept.v_pos.abs())
    both.v_pos.requires_grad_(True)
    assert both.requires_grad and both.remove_outlier(0.9) is both


# --- mesh ---------------------------------------------------------------------------------------


@pytest.fixture
def box():
    made = trimesh.creation.box((0.6, 0.8, 1.0))
    return Mesh(
        torch.tensor(made.vertices, dtype=torch.float32), torch.tensor(made.faces), kind="box"
    )


def grid_mesh():
    """A 3 x 3 square in the plane y = 0, facing -y, with u along z and v along x."""
    x, z = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    v_pos = torch.stack([x, torch.zeros_like(x), z], dim=-1).reshape(-1, 3)
    corner = torch.tensor([0, 1, 3, 4])[:, None]
    a, b, c, d = (torch.tensor([0, 3, 1, 4]) + corner).T
    faces = torch.cat([torch.stack([a, b, c], dim=1), torch.stack([c, b, d], dim=1)])
    mesh = Mesh(v_pos, faces)
    mesh._v_tex, mesh._t_tex_idx = v_pos[:, [2, 0]] / 2, mesh.t_pos_idx
    return mesh


def test_normals_are_weighted_by_area(box):
    triangles = box.v_pos[box.t_pos_idx].double().numpy()
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    total = np.zeros((8, 3))
    for face, normal in zip(box.t_pos_idx.numpy(), cross):
        total[face] += normal
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(box.v_nrm.numpy(), total, atol=1e-6)
    flat = Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]]))
    assert torch.equal(flat.v_nrm, torch.tensor([0.0, 0.0, 1.0]).expand(3, 3))


def test_tangents_go_along_u():
    mesh = grid_mesh()
    torch.testing.assert_close(mesh.v_nrm, torch.tensor([0.0, -1.0, 0.0]).expand(9, 3))
    torch.testing.assert_close(mesh.v_tng, torch.tensor([0.0, 0.0, 1.0]).expand(9, 3))
    mesh = grid_mesh()
    mesh._v_tex = mesh._v_tex * torch.tensor([-1.0, 1.0])  # a mirrored chart
    torch.testing.assert_close(mesh.v_tng, torch.tensor([0.0, 0.0, -1.0]).expand(9, 3))


def test_edges_and_regularisers(box):
    solid = to_trimesh(box)
    assert {tuple(e) for e in box.edges.tolist()} == {tuple(e) for e in solid.edges_unique}
    assert len(box.edges) == 18
    adjacency = np.zeros((8, 8))
    adjacency[tuple(box.edges.T)] = 1
    adjacency += adjacency.T
    laplacian = np.diag(adjacency.sum(axis=1)) - adjacency
    expected = np.linalg.norm(laplacian @ box.v_pos.numpy(), axis=1).mean()
    assert float(box.laplacian()) == pytest.approx(expected, rel=1e-5)
    a, b = box.v_nrm[box.edges[:, 0]], box.v_nrm[box.edges[:, 1]]
    assert float(box.normal_consistency()) == pytest.approx(float(1 - (a * b).sum(1).mean()))
    assert float(grid_mesh().normal_consistency()) == pytest.approx(0, abs=1e-6)


def test_gradients_reach_the_vertices(box):
    mesh = Mesh(box.v_pos.clone().requires_grad_(True), box.t_pos_idx)
    (mesh.laplacian() + mesh.normal_consistency() + mesh.v_nrm[0, 0]).backward()
    assert mesh.v_pos.grad.isfinite().all() and mesh.v_pos.grad.abs().sum() > 0


def test_colours_and_extras(box):
    assert box.v_rgb is None and box.extras == {"kind": "box"}
    box.add_extra("n", 3)
    assert box.extras["n"] == 3
    box.set_vertex_color(torch.ones(8, 3))
    assert torch.equal(box.v_rgb, torch.ones(8, 3))
    with pytest.raises(ValueError, match=r"must be \(8, 3\)"):
        box.set_vertex_color(torch.ones(7, 3))


def side_lengths(corners):
    return (corners - corners.roll(1, dims=1)).norm(dim=-1)


def test_unwrapped_charts_lie_in_the_image_and_keep_the_order_of_the_triangles(box):
    box.unwrap_uv({}, {"resolution": 64, "padding": 2})
    assert box.v_tex.dtype == torch.float32 and box.t_tex_idx.shape == box.t_pos_idx.shape
    assert box.v_tex.min() >= 0 and box.v_tex.max() <= 1
    uv = box.v_tex[box.t_tex_idx] * torch.tensor([1.0, aspect(box)])
    scale = side_lengths(uv) / side_lengths(box.v_pos[box.t_pos_idx])
    torch.testing.assert_close(scale, scale[0, 0].expand_as(scale), rtol=0.05, atol=0)
    # a point in the image belongs to one triangle at most
    u, v = torch.meshgrid(torch.linspace(0, 1, 41), torch.linspace(0, 1, 41), indexing="ij")
    assert (inside(box.v_tex[box.t_tex_idx], torch.stack([u, v], dim=-1)).sum(dim=-1) <= 1).all()


def aspect(mesh):
    """Height over width of the atlas, from the longest edge of a chart of flat faces."""
    uv, xyz = mesh.v_tex[mesh.t_tex_idx], mesh.v_pos[mesh.t_pos_idx]
    d = (uv - uv.roll(1, dims=1)).reshape(-1, 2).square()
    length = (xyz - xyz.roll(1, dims=1)).reshape(-1, 3).square().sum(dim=1)
    ratio = torch.linalg.lstsq(d, length[:, None]).solution[:, 0]
    return float((ratio[1] / ratio[0]).sqrt())


def inside(triangles, points):
    """Whether each point (..., 2) is inside each triangle (F, 3, 2), edges left out."""
    a, b = triangles, triangles.roll(-1, dims=1)
    side = b - a
    to = points[..., None, None, :] - a
    turn = side[..., 0] * to[..., 1] - side[..., 1] * to[..., 0]
    return (turn > 1e-6).all(dim=-1) | (turn < -1e-6).all(dim=-1)


def test_texture_coordinates_come_when_read(box):
    assert box.v_tex.shape[1] == 2 and box.t_tex_idx.max() == len(box.v_tex) - 1
    assert (box.v_tng * box.v_nrm).sum(dim=1).abs().max() < 1e-5
    assert box.v_tng.norm(dim=1).allclose(torch.tensor(1.0))


def test_wrong_options_of_xatlas_are_refused(box):
    with pytest.raises(UserError, match="did you mean 'padding'"):
        box.unwrap_uv({}, {"pading": 2})
    with pytest.raises(UserError, match=r"xatlas_chart_options\.max_cost"):
        box.unwrap_uv({"max_cost": "low"})
    with pytest.raises(UserError, match="lower texels_per_unit"):
        box.unwrap_uv({}, {"resolution": 16, "texels_per_unit": 14.0})
