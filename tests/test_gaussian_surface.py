"""Meshes of Gaussians."""

import importlib

import numpy as np
import pytest
import torch
import trimesh

import threestudio


@pytest.fixture
def surface():
    return importlib.import_module("threestudio-lods.gaussian.surface")


@pytest.fixture
def gaussians(lods):
    """``gaussians(means, scales, opacities, colors)`` with random rotations; plain numbers."""
    model = importlib.import_module("threestudio-lods.gaussian.model")

    def make(means, scales, opacities, colors):
        geometry = model.Gaussians({"init_type": "none"})
        values = {
            "means": torch.tensor(means),
            "scales": torch.tensor(scales).log(),
            "quats": torch.randn(len(means), 4),
            "opacities": torch.tensor(opacities).logit(),
            "sh0": ((torch.tensor(colors) - 0.5) / model.SH_C0)[:, None],
        }
        geometry.set_gaussians({k: torch.nn.Parameter(v.float()) for k, v in values.items()})
        return geometry

    return make


def test_the_grid_is_the_formula(surface):
    torch.manual_seed(0)
    n, size = 12, 17
    means, scales = 0.5 * torch.randn(n, 3), (0.1 + 0.3 * torch.rand(n, 3)).log()
    quats, opacities, colors = torch.randn(n, 4), torch.rand(n), torch.rand(n, 3)
    bbox = torch.tensor([[-1.0, -1.2, -0.8], [1.1, 1.0, 1.3]])
    grid = surface.density_grid(means, scales, quats, opacities, colors, bbox, size)
    axes = [torch.linspace(bbox[0, a], bbox[1, a], size) for a in range(3)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).double()
    rotation = trimesh_rotation(quats)
    local = torch.einsum("nba,xyznb->xyzna", rotation, points[..., None, :] - means)
    power = (local / scales.exp()).square().sum(-1)
    w = torch.where(power < surface.REACH**2, opacities * (-power / 2).exp(), 0.0)
    expected = torch.cat([w.sum(-1, keepdim=True), w @ colors.double()], -1)
    assert expected[..., 0].max() > 1
    assert torch.allclose(grid.double(), expected, atol=1e-5)


def trimesh_rotation(quats):
    matrices = [trimesh.transformations.quaternion_matrix(q.numpy())[:3, :3] for q in quats]
    return torch.tensor(np.array(matrices))


def test_one_round_gaussian_is_a_ball(surface, gaussians):
    """The radius at density d is sigma sqrt(2 ln(o / d))."""
    color = [0.8, 0.4, 0.1]
    geometry = gaussians([[0.3, -0.2, 0.5]], [[0.3] * 3], [0.9], [color])
    found = surface.surface(geometry, resolution=64, threshold=0.5)
    mesh = trimesh.Trimesh(found.v_pos.numpy(), found.t_pos_idx.numpy())
    radius = 0.3 * np.sqrt(2 * np.log(0.9 / 0.5))
    assert mesh.is_watertight and mesh.body_count == 1
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)  # positive: outside
    assert np.allclose(mesh.bounds.mean(0), [0.3, -0.2, 0.5], atol=1e-3)
    assert torch.allclose(found.v_rgb, torch.tensor(color).expand(len(found.v_rgb), 3), atol=1e-4)


def test_colours_are_those_of_the_nearest_gaussians(surface, gaussians):
    """One Gaussian far out on each axis, red, green and blue, and their mirror images in black."""
    means = [*(1.0 * np.eye(3)).tolist(), *(-1.0 * np.eye(3)).tolist()]
    colors = [*np.eye(3).tolist(), *np.zeros((3, 3)).tolist()]
    geometry = gaussians(means, [[0.15] * 3] * 6, [0.9] * 6, colors)
    found = surface.surface(geometry, resolution=96, threshold=0.5)
    nearest = torch.cdist(found.v_pos, torch.tensor(means)).argmin(1)
    assert len(nearest.unique()) == 6
    assert torch.allclose(found.v_rgb, torch.tensor(colors)[nearest], atol=1e-3)


def test_crumbs_and_faint_gaussians_are_left_out(surface, gaussians):
    means, scales = [[0.0, 0, 0], [0.9, 0, 0], [5.0, 0, 0]], [[0.3] * 3, [0.025] * 3, [0.3] * 3]
    geometry = gaussians(means, scales, [0.9, 0.9, 0.005], [[0.5] * 3] * 3)
    found = surface.surface(geometry, resolution=160, threshold=0.5)
    assert found.v_pos.amax() < 0.5
    geometry = gaussians(means[1:], scales[1:], [0.9, 0.005], [[0.5] * 3] * 2)
    assert surface.surface(geometry, resolution=16, threshold=0.5).v_pos[:, 0].amin() > 0.8


@pytest.mark.parametrize("opacity, message", [(0.4, "mesh_threshold"), (0.001, "opaque enough")])
def test_no_surface_is_one_clear_line(surface, gaussians, opacity, message):
    geometry = gaussians([[0.0, 0, 0]], [[0.3] * 3], [opacity], [[0.5] * 3])
    with pytest.raises(ValueError, match=message):
        surface.surface(geometry, resolution=32, threshold=0.5)


def test_a_mesh_that_cannot_be_does_not_take_the_other_files_along(gaussians, monkeypatch):
    said = []
    monkeypatch.setattr("threestudio.warn", said.append)
    geometry = gaussians([[0.0, 0, 0]], [[0.3] * 3], [0.001], [[0.5] * 3])

    def export(*formats):
        kind = threestudio.find("lods-gaussian-exporter")
        return kind({"fmt": list(formats)}, geometry=geometry, material=None, background=None)()

    assert [out.save_name for out in export("ply", "glb", "points")] == [
        "gaussians.ply",
        "gaussians-points.ply",
    ]
    assert len(said) == 1 and "no glb beside the other formats: there are no" in said[0]
    with pytest.raises(ValueError, match="opaque enough"):
        export("glb")


def test_gaussians_that_are_not_finite_are_not_in_the_mesh(surface, gaussians):
    values = [[0.0, 0, 0], [9.0, 0, 0]], [[0.3] * 3] * 2, [0.99] * 2, [[0.5] * 3] * 2
    geometry = gaussians(*values)
    with torch.no_grad():
        geometry.means[1, 0] = float("nan")
    whole = surface.surface(geometry, resolution=24, threshold=0.5)
    alone = surface.surface(gaussians(*(v[:1] for v in values)), resolution=24, threshold=0.5)
    assert torch.isfinite(whole.v_pos).all() and len(whole.v_pos) == pytest.approx(
        len(alone.v_pos), rel=0.2
    )
