"""Gaussians without a host: made, drawn, trained, written and meshed; and what that imports."""

import numpy as np
import pytest
import torch
import trimesh
from lods import gaussians as gs

from tests import libraries
from tests.gaussians.clouds import random_gaussians, soft_gaussians

HEAVY = ("torch", "numba", "gsplat", "scipy", "trimesh", "threestudio")


def test_importing_them_loads_nothing_heavy():
    """Nor does it load the host, also where all modules are looked at."""
    assert libraries.loads("gaussians", HEAVY, ("numba", "gsplat", "threestudio")) == ["[]", "[]"]


def test_every_public_name_is_found_where_it_is_said_to_be():
    libraries.check_names(gs)


def test_no_module_of_them_names_the_host():
    libraries.check_no_host("gaussians")


def test_an_orbit_looks_at_the_origin_from_around_it():
    c2w = gs.orbit(8, distance=2.5, elevation=30.0, azimuth=10.0)
    assert torch.allclose(c2w[:, :3, 3].norm(dim=1), torch.tensor(2.5))
    assert torch.allclose(c2w[:, 2, 3], torch.tensor(1.25))
    angles = torch.rad2deg(torch.atan2(c2w[:, 1, 3], c2w[:, 0, 3])) % 360
    assert torch.allclose(angles, 10.0 + 45 * torch.arange(8), atol=1e-3)
    rotation = c2w[:, :3, :3]
    assert torch.allclose(rotation.mT @ rotation, torch.eye(3).expand(8, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(8))
    # the origin is in the middle, in front; z is up in the picture
    seen = gs.world_to_camera(c2w) @ torch.tensor([0.0, 0, 0, 1])
    assert torch.allclose(seen, torch.tensor([0.0, 0, 2.5, 1]).expand(8, 4), atol=1e-5)
    above = gs.world_to_camera(c2w) @ torch.tensor([0.0, 0, 0.5, 1])
    assert (above[:, 1] < -0.4).all() and torch.allclose(above[:, 0], torch.zeros(8), atol=1e-6)


def test_a_few_lines_train_them():
    """A red ball becomes a blue one, while their number grows; the optimizer keeps up."""
    rng = np.random.default_rng(0)
    xyz = 0.3 * rng.normal(size=(60, 3))
    gaussians = gs.Gaussians.points(xyz, np.tile([0.9, 0.1, 0.1], (60, 1)), opacity=0.5)
    cameras, blue = gs.orbit(2, distance=2.5), torch.tensor([0.1, 0.1, 0.9])
    optimizer = torch.optim.Adam(gaussians.groups(sh0=0.2), eps=1e-15)
    densifier = gs.Densifier(
        "default", {"refine_start_iter": 2, "refine_every": 4, "grow_grad2d": 1e-9}
    )
    for step in range(30):
        images, alphas, info = gaussians.render(cameras, 24, 20)
        densifier.before_backward(info)
        (images - alphas * blue).abs().mean().backward()
        optimizer.step()
        densifier.after_step(gaussians, optimizer, step, info)
        optimizer.zero_grad()
    assert gaussians.count > 60
    assert images.shape == (2, 20, 24, 3) and alphas.shape == (2, 20, 24, 1)
    assert torch.allclose(gaussians.base_colors().mean(0), blue, atol=0.15)


@pytest.mark.parametrize("degree", [0, 2])
def test_a_ply_brings_them_back(tmp_path, degree):
    gaussians = gs.Gaussians(random_gaussians(k=(degree + 1) ** 2 - 1))
    assert gaussians.sh_degree == degree
    assert gaussians.write_ply(tmp_path / "a.ply") == gaussians.count == 17
    again = gs.Gaussians.file(tmp_path / "a.ply")
    for name, value in gaussians.gaussians().items():
        assert torch.equal(value, again.gaussians()[name])
    other = gs.Gaussians.ball(5, sh_degree=degree)
    other.load_state_dict(gaussians.state_dict())
    assert other.count == 17 and torch.equal(other.means, gaussians.means)


def test_their_mesh_is_a_file_with_y_up(tmp_path):
    mesh = soft_gaussians().mesh(resolution=24, density=1.0)
    assert mesh.vertices[:, 0].max() > 0.7  # the arm along +x, which is the front
    mesh.write(tmp_path / "a.glb")
    read = trimesh.load(tmp_path / "a.glb", force="mesh")
    assert len(read.faces) == len(mesh.faces)
    assert np.isclose(read.vertices[:, 2].max(), mesh.vertices[:, 0].max().item(), atol=1e-5)
    assert np.isclose(read.vertices[:, 1].max(), mesh.vertices[:, 2].max().item(), atol=1e-5)


def test_what_is_missing_or_does_not_fit_is_named():
    some = random_gaussians()
    with pytest.raises(ValueError, match="without quats"):
        gs.Gaussians({k: v for k, v in some.items() if k != "quats"})
    with pytest.raises(ValueError, match="do not agree in number"):
        gs.Gaussians({**some, "quats": some["quats"][:3]})
    with pytest.raises(ValueError, match="have no size"):
        gs.Gaussians(some).groups(size=0.1)


def test_a_mesh_is_written_as_glb_only(tmp_path):
    mesh = gs.Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]]), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"end the name in \.glb"):
        mesh.write(tmp_path / "a.stl")
    assert not list(tmp_path.iterdir())
