"""Assets whose looks are known, for the tests."""

import math

import numpy as np
import torch
from lods.assets import Mesh
from lods.gaussians import Gaussians, orbit

from tests.gaussians.clouds import random_gaussians

FIELDS, SIDE = 6, 1.2  # a chart of FIELDS x FIELDS colours, SIDE units wide
WHITE = torch.ones(2, 3)


def shell(count=1500, degree=0, seed=0):
    """A shell of flat and of long Gaussians, many of them faint: what is behind shows through."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(count, 3))
    means *= rng.uniform(0.5, 0.75, (count, 1)) / np.linalg.norm(means, axis=1, keepdims=True)
    colors = 0.5 + 0.45 * np.sin(5 * means + [0, 2, 4])
    parts = {
        "means": means + [0.1, -0.2, 0.3],
        "scales": rng.uniform(math.log(0.008), math.log(0.07), (count, 3)),
        "quats": rng.normal(size=(count, 4)),
        "opacities": rng.uniform(-4, 3, count),
        "sh0": ((colors - 0.5) / 0.28209479177387814)[:, None],
    }
    found = {name: torch.from_numpy(part).float() for name, part in parts.items()}
    if degree:
        found["shN"] = 0.1 * random_gaussians(count, (degree + 1) ** 2 - 1, seed)["shN"]
    return Gaussians(found)


@torch.no_grad()
def picture(gaussians, size=96):
    return gaussians.render(orbit(2, 3.4, 20.0, 25.0), size, size, backgrounds=WHITE)[0]


def psnr(one, other):
    """Of pictures with values 0..1, in decibels."""
    return float(-10 * torch.log10(((one - other) ** 2).mean()))


def chart_colors():
    """(FIELDS * FIELDS, 3): shown colours 0..255, from black to white and others."""
    colors = np.random.default_rng(0).integers(0, 256, (FIELDS**2, 3))
    colors[:12] = np.array([0, 2, 5, 9, 13, 20, 40, 80, 139, 195, 230, 255])[:, None]
    return colors


def chart_places():
    """(FIELDS * FIELDS, 3): the middles of the fields in the plane x = 0, seen from +x."""
    row, column = np.divmod(np.arange(FIELDS**2), FIELDS)
    across = (np.stack([column, row], axis=1) + 0.5) / FIELDS * SIDE - SIDE / 2
    return np.c_[np.zeros(FIELDS**2), across]


def chart_color_at(points):
    """The colour 0..1 of the chart at points (N, 3)."""
    cell = ((points[:, 1:] + SIDE / 2) / SIDE * FIELDS).long().clamp(0, FIELDS - 1)
    return torch.from_numpy(
        chart_colors()[(cell[:, 1] * FIELDS + cell[:, 0]).numpy()] / 255
    ).float()


def chart_mesh():
    """The chart as squares that share no vertices, with colours at them."""
    half = SIDE / FIELDS / 2
    corner = half * np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]])
    points = (chart_places()[:, None] + corner).reshape(-1, 3)
    faces = np.array([[0, 1, 2], [0, 2, 3]]) + 4 * np.arange(FIELDS**2)[:, None, None]
    return Mesh(
        torch.from_numpy(points).float(),
        torch.from_numpy(faces.reshape(-1, 3)),
        colours=torch.from_numpy(np.repeat(chart_colors(), 4, axis=0) / 255).float(),
    )


def ball(color=lambda points: 0.5 + 0.45 * torch.sin(6 * points), size=256):
    """A ball with a texture of a colour by place."""
    import trimesh
    from lods.assets import bake

    made = trimesh.creation.icosphere(2, 0.8)
    plain = Mesh(torch.from_numpy(made.vertices).float(), torch.from_numpy(made.faces).long())
    return bake(plain, lambda points, normals: color(points), size)


def on_surface(mesh, count=3000):
    """Points of a mesh and their texture coordinates: in triangles, on edges, at corners."""
    rng = np.random.default_rng(0)
    face = rng.integers(0, len(mesh.faces), count)
    weights = rng.dirichlet((1, 1, 1), count)
    weights[count // 4 : count // 2, 0] = 0
    weights[: count // 4, 1:] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    share = torch.from_numpy(weights).float()[..., None]
    corner = mesh.faces[torch.from_numpy(face)]
    return (mesh.vertices[corner] * share).sum(1), (mesh.uv[corner] * share).sum(1)
