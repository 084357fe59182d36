"""Gaussians, cameras and training steps for the tests."""

import math

import numpy as np
import torch
from lods.gaussians import Gaussians
from lods.gaussians.harmonics import SH_C0
from lods.threestudio.renderer import GaussianRasterizer

import threestudio
from threestudio.data.cameras import camera_batch


def cameras(azimuths, elevation=20.0, size=24, distance=3.0, fovy=40.0):
    azimuth = torch.tensor([float(a) for a in azimuths])
    one = torch.ones_like(azimuth)
    return camera_batch(
        one * elevation, azimuth, one * distance, one * math.radians(fovy), size, size + 8
    )


def make_renderer(geometry, color=(1.0, 1.0, 1.0), **cfg):
    background = threestudio.find("solid-color-background")({"color": list(color)})
    material = threestudio.find("no-material")({"n_output_dims": 0})
    return GaussianRasterizer(
        {"backend": "reference", **cfg}, geometry=geometry, material=material, background=background
    )


def optimizer_for(geometry, extra=None, whole=False):
    groups = [{"params": [p], "name": f"geometry.{n}"} for n, p in geometry.gaussians().items()]
    if whole:
        groups = [{"params": list(geometry.gaussians().values()), "name": "geometry"}]
    if extra is not None:
        groups.append({"params": [extra], "name": "guidance"})
    return torch.optim.Adam(groups, lr=1e-3)


def steps(geometry, densifier, optimizer, n, start=0):
    """n steps that pull a random picture out of the Gaussians."""
    renderer = make_renderer(geometry)
    batch = cameras([0, 100])
    target = torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))
    for step in range(start, start + n):
        out = renderer(**batch)
        densifier.before_backward(out["info"])
        optimizer.zero_grad()
        ((out["comp_rgb"] - target) ** 2).mean().backward()
        optimizer.step()
        densifier.after_step(geometry, optimizer, step, out["info"])


def check_consistent(geometry, optimizer):
    params = geometry.gaussians()
    n = geometry.count
    assert all(len(p) == n for p in params.values())
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in params.values()} <= {id(p) for p in grouped}
    # nothing of former parameters is left, and every state fits its parameter
    assert {id(p) for p in optimizer.state} <= {id(p) for p in grouped}
    for p in params.values():
        assert p.requires_grad and p.is_leaf
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["exp_avg_sq"].shape == p.shape
    assert dict(geometry.named_parameters()).keys() == params.keys()


def random_gaussians(n=17, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"means": (n, 3), "scales": (n, 3), "quats": (n, 4), "opacities": (n,)}
    shapes |= {"sh0": (n, 1, 3)} | ({"shN": (n, k, 3)} if k else {})
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def made(means, scales, opacities, colors):
    """Gaussians with random rotations, of plain numbers."""
    values = {
        "means": torch.tensor(means),
        "scales": torch.tensor(scales).log(),
        "quats": torch.randn(len(means), 4),
        "opacities": torch.tensor(opacities).logit(),
        "sh0": ((torch.tensor(colors) - 0.5) / SH_C0)[:, None],
    }
    return Gaussians({name: value.float() for name, value in values.items()})


def soft_gaussians(*more):
    """A ball of soft Gaussians (of an opacity of 0.05) with an arm along +x, so thin that only
    half of the light is stopped by it; reddish for x > 0.2, else bluish. ``more``: (mean, scales,
    opacity) of others."""
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(1200, 3))
    ball *= 0.4 * rng.random((1200, 1)) ** (1 / 3) / np.linalg.norm(ball, axis=1, keepdims=True)
    arm = np.c_[np.linspace(0.3, 0.9, 240), 0.02 * rng.normal(size=(240, 2))]
    means = np.concatenate([ball, arm])
    colors = np.where(means[:, :1] > 0.2, [[0.8, 0.25, 0.3]], [[0.3, 0.4, 0.7]])
    return made(
        [*means.tolist(), *(one[0] for one in more)],
        [*([[0.06] * 3] * len(means)), *(one[1] for one in more)],
        [*([0.05] * len(means)), *(one[2] for one in more)],
        [*colors.tolist(), *([[0.0, 1, 0]] * len(more))],
    )
