"""Meshes and cameras for the tests of the rasterisers."""

import torch
import trimesh
from lods.gaussians.cameras import intrinsics, orbit, world_to_camera

FLAT = torch.eye(4)[None]  # a camera at the origin that looks along +z, y down


def sphere(subdivisions=2, noise=0.0, seed=0):
    """(vertices, faces) of a ball of radius 1 with uneven vertices."""
    ball = trimesh.creation.icosphere(subdivisions=subdivisions)
    vertices = torch.tensor(ball.vertices, dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    vertices = vertices + noise * torch.randn(vertices.shape, generator=random).double()
    return vertices, torch.tensor(ball.faces)


def cameras(count, width, height, distance=3.0, fovy=0.8):
    """(viewmats, Ks) of cameras around the origin."""
    views = world_to_camera(orbit(count, distance, 20, 33))
    return views, intrinsics(torch.full((count,), fovy), height, width)


def pixels_as_units(width, height, focal=1.0):
    """K with which the point (x, y, focal) of camera space lies at the pixel coordinates (x, y)."""
    K = torch.eye(3)[None].clone()
    K[:, 0, 0] = K[:, 1, 1] = focal
    return K


def flat(places, z=1.0):
    """Points of an image, in pixels, as vertices at the depth z of a camera with K = 1."""
    places = torch.as_tensor(places, dtype=torch.float64)
    return torch.cat([places * z, torch.full_like(places[:, :1], z)], dim=1)
