"""Meshes of Gaussians."""

import numpy as np
import pytest
import torch
import trimesh
from lods.gaussians import light, surface
from lods.threestudio.exporter import GaussianExporter
from scipy.stats import norm

from tests.gaussians.clouds import made, soft_gaussians


def test_the_grid_is_the_formula():
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


def test_one_round_gaussian_is_a_ball_at_a_density():
    """The radius at density d is sigma sqrt(2 ln(o / d))."""
    color = [0.8, 0.4, 0.1]
    geometry = made([[0.3, -0.2, 0.5]], [[0.3] * 3], [0.9], [color])
    found = surface.surface(geometry, resolution=64, density=0.5)
    mesh = trimesh.Trimesh(found.vertices.numpy(), found.faces.numpy())
    radius = 0.3 * np.sqrt(2 * np.log(0.9 / 0.5))
    assert mesh.is_watertight and mesh.body_count == 1
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)  # positive: outside
    assert np.allclose(mesh.bounds.mean(0), [0.3, -0.2, 0.5], atol=1e-3)
    assert torch.allclose(found.rgb, torch.tensor(color).expand(len(found.rgb), 3), atol=1e-4)


def test_colours_are_those_of_the_nearest_gaussians():
    """One Gaussian far out on each axis, red, green and blue, and their mirror images in black."""
    means = [*(1.0 * np.eye(3)).tolist(), *(-1.0 * np.eye(3)).tolist()]
    colors = [*np.eye(3).tolist(), *np.zeros((3, 3)).tolist()]
    geometry = made(means, [[0.15] * 3] * 6, [0.9] * 6, colors)
    found = surface.surface(geometry, resolution=96, density=0.5)
    nearest = torch.cdist(found.vertices, torch.tensor(means)).argmin(1)
    assert len(nearest.unique()) == 6
    assert torch.allclose(found.rgb, torch.tensor(colors)[nearest], atol=1e-3)


def test_crumbs_and_faint_gaussians_are_left_out():
    means, scales = [[0.0, 0, 0], [0.9, 0, 0], [5.0, 0, 0]], [[0.3] * 3, [0.025] * 3, [0.3] * 3]
    geometry = made(means, scales, [0.9, 0.9, 0.005], [[0.5] * 3] * 3)
    found = surface.surface(geometry, resolution=160, density=0.5)
    assert found.vertices.amax() < 0.5
    geometry = made(means[1:], scales[1:], [0.9, 0.005], [[0.5] * 3] * 2)
    assert surface.surface(geometry, resolution=16, density=0.5).vertices[:, 0].amin() > 0.8


@pytest.mark.parametrize(
    "opacity, level, message",
    [
        (0.4, {"density": 0.5}, "set system.exporter.mesh_threshold in that range"),
        (0.001, {"density": 0.5}, "opaque enough"),
        (0.001, {}, "opaque enough"),
        (0.2, {}, "set system.exporter.mesh_opacity below"),
    ],
)
def test_no_surface_is_one_clear_line(opacity, level, message):
    geometry = made([[0.0, 0, 0]], [[0.3] * 3], [opacity], [[0.5] * 3])
    with pytest.raises(ValueError, match=message) as caught:
        surface.surface(geometry, resolution=32, **level)
    assert "\n" not in str(caught.value)


# --- where light stops ----------------------------------------------------------------------------


def test_stopped_light_is_the_formula():
    """Against the same written down for every Gaussian and point, along and against a direction.
    What a Gaussian stops up to x is spread over its depth as a normal distribution."""
    rng, resolution, radius = np.random.default_rng(0), 97, 1.6
    means, opacities = rng.uniform(-0.5, 0.5, (9, 3)), rng.uniform(0.05, 0.95, 9)
    half = rng.normal(size=(9, 3, 3)) * 0.15
    covs = half @ half.transpose(0, 2, 1) + 0.02 * np.eye(3)
    points = rng.uniform(-0.7, 0.7, (40, 3))
    along = light.directions(3)
    blobs = (torch.from_numpy(means), torch.from_numpy(covs), torch.from_numpy(opacities))
    arguments = torch.from_numpy(points), along, np.zeros(3), radius, resolution
    cell = 2 * radius / (resolution - 1)
    for d, found in zip(along, light.stopped_light(blobs, *arguments)):
        across = np.linalg.svd(d[None])[2][1:]  # two directions orthogonal to d
        total = np.zeros((2, len(points)))
        for mean, cov, opacity in zip(means, covs, opacities):
            offset = (points - mean) @ across.T
            inverse = np.linalg.inv(across @ cov @ across.T + 0.3 * cell**2 * np.eye(2))
            power = np.einsum("ni,ij,nj->n", offset, inverse, offset)
            tau = -np.log(1 - opacity * np.exp(-power / 2)) * (power < 9)
            slope = d @ cov @ across.T @ inverse
            thick = np.sqrt(d @ cov @ d - slope @ across @ cov @ d)
            share = norm.cdf(((points - mean) @ d - offset @ slope) / thick)
            total += [tau * share, tau * (1 - share)]
        assert np.abs(found.numpy() - (1 - np.exp(-total))).max() < 0.02
        assert found.max() > 0.5


def test_directions_are_spread_over_the_half_sphere():
    d = light.directions(20)
    assert np.allclose(np.linalg.norm(d, axis=1), 1) and (d[:, 2] > 0).all()
    both = np.concatenate([d, -d])
    angles = np.degrees(np.arccos((both @ both.T - 2 * np.eye(40)).max(1).clip(-1, 1)))
    assert angles.min() > 15
    turn = light.frame(d[3])
    assert np.allclose(turn @ turn.T, np.eye(3)) and np.isclose(np.linalg.det(turn), 1)
    assert np.allclose(turn[2], d[3])


def as_trimesh(mesh):
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


@pytest.mark.slow
def test_soft_gaussians_hold_together():
    found = surface.surface(soft_gaussians(), resolution=48)
    mesh = as_trimesh(found)
    assert mesh.is_watertight and mesh.body_count == 1 and mesh.volume > 0
    assert 0.9 < mesh.bounds[1, 0] < 1.05  # the whole arm
    assert np.allclose(mesh.bounds[0], -0.45, atol=0.08)
    color = found.rgb.numpy()
    inner, outer = found.vertices[:, 0] < -0.1, found.vertices[:, 0] > 0.5
    assert np.allclose(color[inner], [0.3, 0.4, 0.7], atol=0.06)
    assert np.allclose(color[outer], [0.8, 0.25, 0.3], atol=0.06)
    # a level of the density that the ball has leaves the arm out, or the ball grows
    level = as_trimesh(surface.surface(soft_gaussians(), resolution=48, density=1.0))
    assert level.body_count > 1 or level.bounds[1, 0] < 0.7 or level.bounds[0, 0] < -0.55


@pytest.mark.slow
def test_a_veil_and_a_floater_do_not_change_the_mesh():
    """A Gaussian of 3.4 around an object of 1 (as trained ones have), and one far away, which
    alone would set the size of the grid."""
    alone = as_trimesh(surface.surface(soft_gaussians(), resolution=48))
    more = ([0.5, 0.5, 0.0], [3.4] * 3, 0.04), ([0.0, 6.0, 0.0], [0.02] * 3, 0.03)
    veiled = as_trimesh(surface.surface(soft_gaussians(*more), resolution=48))
    assert veiled.body_count == 1
    assert np.allclose(veiled.bounds, alone.bounds, atol=0.06)


def test_a_mesh_that_cannot_be_does_not_take_the_other_files_along(monkeypatch):
    said = []
    monkeypatch.setattr("threestudio.warn", said.append)
    geometry = made([[0.0, 0, 0]], [[0.3] * 3], [0.001], [[0.5] * 3])

    def export(*formats):
        kind = GaussianExporter
        return kind({"fmt": list(formats)}, geometry=geometry, material=None, background=None)()

    assert [out.save_name for out in export("ply", "glb", "points")] == [
        "gaussians.ply",
        "gaussians-points.ply",
    ]
    assert len(said) == 1 and "no glb beside the other formats: there are no" in said[0]
    with pytest.raises(ValueError, match="opaque enough"):
        export("glb")


def test_gaussians_that_are_not_finite_are_not_in_the_mesh():
    values = [[0.0, 0, 0], [9.0, 0, 0]], [[0.3] * 3] * 2, [0.99] * 2, [[0.5] * 3] * 2
    geometry = made(*values)
    with torch.no_grad():
        geometry.means[1, 0] = float("nan")
    whole = surface.surface(geometry, resolution=24)
    alone = surface.surface(made(*(v[:1] for v in values)), resolution=24)
    assert torch.isfinite(whole.vertices).all() and len(whole.vertices) == pytest.approx(
        len(alone.vertices), rel=0.2
    )
