"""Gaussians that are turned: means, quaternions and harmonics together."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lods.gaussians import axes, harmonics, ply, reference
from lods.threestudio.exporter import GaussianExporter
from lods.threestudio.geometry import Gaussians
from plyfile import PlyData
from scipy.spatial.transform import Rotation

from tests.gaussians.clouds import random_gaussians


@pytest.fixture
def made(tmp_path):
    """``made(path, **settings)``: the Gaussians that a file starts."""

    def make(path, sh_degree=0, **file):
        cfg = {"init_type": "file", "sh_degree": sh_degree, "file": {"path": str(path), **file}}
        return Gaussians(cfg).export()

    return make


def covariances(gaussians):
    return reference.covariances(gaussians["quats"], gaussians["scales"].exp())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_camera_that_turns_along_sees_what_it_saw(degree, seed):
    """Positions, covariances and the colour in every direction; the quaternions keep their
    length."""
    rotation = Rotation.random(random_state=seed).as_matrix()
    before = {k: v.double() for k, v in random_gaussians(k=(degree + 1) ** 2 - 1).items()}
    after = axes.rotate_gaussians(before, rotation)
    R = torch.from_numpy(rotation)
    torch.testing.assert_close(after["means"], before["means"] @ R.T)
    expected = R @ covariances(before) @ R.T
    torch.testing.assert_close(covariances(after), expected)
    torch.testing.assert_close(after["quats"].norm(dim=1), before["quats"].norm(dim=1))
    for name in ("scales", "opacities", "sh0"):
        assert after[name] is before[name]
    assert ("shN" in after) == (degree > 0)
    if degree:
        d = F.normalize(torch.randn(50, 3, dtype=torch.float64), dim=1)
        basis = harmonics.spherical_harmonics
        seen = torch.einsum("dk,nkc->dnc", basis(d, degree), before["shN"])
        turned = torch.einsum("dk,nkc->dnc", basis(d @ R.T, degree), after["shN"])
        torch.testing.assert_close(turned, seen)
        assert (after["shN"] - before["shN"]).abs().max() > 0.1  # they had to change


def test_gaussians_of_another_device_or_type_stay_there():
    before = random_gaussians(k=3)
    after = axes.rotate_gaussians(before, Rotation.random(random_state=0).as_matrix())
    assert all(value.dtype == torch.float32 for value in after.values())
    same = axes.rotate_gaussians(before, np.eye(3))
    assert all(same[name] is before[name] for name in before)


def export(gaussians, path, **cfg):
    """Through the exporter and the system's methods, as a run does."""
    geometry = Gaussians({"init_type": "none", "sh_degree": 1})
    geometry.set_gaussians({k: torch.nn.Parameter(v) for k, v in gaussians.items()})
    kind = GaussianExporter
    exporter = kind(cfg, geometry=geometry, material=None, background=None)
    write = {"gaussian_ply": ply.write_ply, "point_ply": ply.write_points}
    for output in exporter():
        write[output.save_type](path / output.save_name, **output.params)


def test_a_ply_for_viewers_has_y_down_and_the_front_to_the_camera(made, tmp_path):
    """3DGS looks along +z with y down: up, +z here, is -y there; the front, +x here, is -z there;
    and what is at the right seen from the front, +y here, is +x there."""
    gaussians = random_gaussians(k=3)
    gaussians["means"][:3] = torch.eye(3)
    export(gaussians, tmp_path, axes="y-down")
    for name in ("gaussians.ply", "gaussians-points.ply"):
        vertex = PlyData.read(str(tmp_path / name))["vertex"]
        xyz = np.stack([vertex[axis] for axis in "xyz"], axis=1)
        assert np.array_equal(xyz[:3], [[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    # what is exported so starts where it was, because the file says its axes
    back = made(tmp_path / "gaussians.ply", sh_degree=1)
    for name, value in gaussians.items():
        if name == "quats":  # q and -q are the same rotation
            back[name] = back[name] * (back[name] * value).sum(1, keepdim=True).sign()
        torch.testing.assert_close(back[name], value, atol=1e-5, rtol=1e-5)
    points = made(tmp_path / "gaussians-points.ply")
    torch.testing.assert_close(points["means"], gaussians["means"], atol=1e-6, rtol=0)


def test_by_default_a_ply_is_as_it_always_was(made, tmp_path):
    gaussians = random_gaussians(k=3)
    export(gaussians, tmp_path)
    assert b"comment" not in (tmp_path / "gaussians.ply").read_bytes()[:2000]
    back = made(tmp_path / "gaussians.ply", sh_degree=1)
    assert all(torch.equal(back[name], gaussians[name]) for name in gaussians)


def test_gaussians_of_other_axes_can_be_turned_upright(made, tmp_path):
    """A file of another program, which does not say its axes."""
    gaussians = random_gaussians(k=3)
    turned = axes.rotate_gaussians(gaussians, axes.axes_rotation("-z", "-y").T)
    ply.write_ply(tmp_path / "a.ply", **turned)
    as_it_is = made(tmp_path / "a.ply", sh_degree=1)
    assert torch.equal(as_it_is["means"], turned["means"])
    upright = made(tmp_path / "a.ply", sh_degree=1, front="-z", up="-y")
    for name in ("means", "shN"):
        torch.testing.assert_close(upright[name], gaussians[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(covariances(upright), covariances(gaussians), atol=1e-4, rtol=1e-4)


def test_unknown_axes_are_named():
    with pytest.raises(ValueError, match="axes must be one of z-up, y-down, y-up, not 'up'"):
        export(random_gaussians(k=3), None, axes="up")
