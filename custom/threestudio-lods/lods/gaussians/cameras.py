"""Cameras: matrices that the rasterisers take."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def world_to_camera(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 4 4"]:
    """The inverse of ``c2w`` (OpenGL: x right, y up, z backward), as OpenCV has it (x right, y
    down, z forward). A rotation is inverted by its transpose: [R^T | -R^T p]."""
    rotation = c2w[:, :3, :3] * c2w.new_tensor([1.0, -1.0, -1.0])
    inverse = torch.zeros_like(c2w)
    inverse[:, :3, :3] = rotation.transpose(1, 2)
    inverse[:, :3, 3:] = -rotation.transpose(1, 2) @ c2w[:, :3, 3:]
    inverse[:, 3, 3] = 1.0
    return inverse


def intrinsics(fovy: Float[Tensor, " B"], height: int, width: int) -> Float[Tensor, "B 3 3"]:
    """Pinhole matrices in pixels: focal length height / (2 tan(fovy / 2)) in both directions, the
    principal point in the middle of the image. ``fovy`` in radians."""
    K = fovy.new_zeros(len(fovy), 3, 3)
    K[:, 0, 0] = K[:, 1, 1] = 0.5 * height / torch.tan(0.5 * fovy)
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = 0.5 * width, 0.5 * height, 1.0
    return K


def orbit(
    n: int, distance: float, elevation: float = 15.0, azimuth: float = 0.0
) -> Float[Tensor, "B 4 4"]:
    """``n`` cameras evenly around the origin, which they look at, as camera-to-world matrices with
    OpenGL's axes; z is up in the world.

    ``distance`` in world units, the angles in degrees: ``elevation`` above the ground, below 90,
    and ``azimuth`` of the first camera, counted from +x towards +y.
    """
    angles = torch.deg2rad(azimuth + torch.arange(n) * (360.0 / n))
    up = math.radians(elevation)
    flat = math.cos(up)
    back = torch.stack(
        [flat * angles.cos(), flat * angles.sin(), torch.full_like(angles, math.sin(up))], dim=-1
    )
    right = torch.stack([-angles.sin(), angles.cos(), torch.zeros_like(angles)], dim=-1)
    c2w = torch.eye(4).repeat(n, 1, 1)
    axes = [right, torch.linalg.cross(back, right), back]
    c2w[:, :3, :3] = torch.stack(axes, dim=-1)
    c2w[:, :3, 3] = distance * back
    return c2w
