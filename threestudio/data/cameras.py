"""Random cameras around the origin: pure functions from numbers to batches.

Conventions, everywhere in threestudio: the world is right-handed with z up; elevation and azimuth
are in degrees, azimuth 0 on +x and positive towards +y; ``fovy`` is vertical and in radians;
``c2w`` has OpenGL axes (its columns are right, up, backward, position). Every ``range`` is a pair
``(low, high)``. All draws come from the ``torch.Generator`` that is passed in.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from threestudio.utils.ops import (
    get_mvp_matrix,
    get_projection_matrix,
    get_ray_directions,
    get_rays,
)
from threestudio.utils.typing import *

NEAR, FAR = 0.01, 100.0  # of the projection matrix


def uniform(n: int, bounds: Sequence[float], generator: torch.Generator) -> Float[Tensor, "N"]:
    low, high = bounds
    return low + (high - low) * torch.rand(n, generator=generator)


def sample_elevation(
    n: int, bounds: Sequence[float], generator: torch.Generator
) -> Float[Tensor, "N"]:
    """Degrees within ``bounds``. With probability 1/2 (one coin for the batch) uniform in the
    angle, else uniform in area on the sphere: the sine is uniform between those of the bounds."""
    if torch.rand((), generator=generator) < 0.5:
        return uniform(n, bounds, generator)
    low, high = (math.sin(math.radians(b)) for b in bounds)
    sine = uniform(n, (low, high), generator).clamp(-1.0, 1.0)
    # the float32 arc sine may leave the range by a rounding error
    return torch.rad2deg(torch.asin(sine)).clamp(*(float(b) for b in bounds))


def sample_azimuth(
    n: int, bounds: Sequence[float], generator: torch.Generator, stratified: bool = False
) -> Float[Tensor, "N"]:
    """Degrees within ``bounds``; ``stratified`` puts sample i in the i-th of n equal bins."""
    if not stratified:
        return uniform(n, bounds, generator)
    low, high = bounds
    return low + (high - low) * (torch.arange(n) + torch.rand(n, generator=generator)) / n


def spherical_to_cartesian(
    elevation: Float[Tensor, "N"], azimuth: Float[Tensor, "N"], distance: Float[Tensor, "N"]
) -> Float[Tensor, "N 3"]:
    """``d (cos e cos a, cos e sin a, sin e)``, angles in degrees."""
    e, a = torch.deg2rad(elevation), torch.deg2rad(azimuth)
    return distance[:, None] * torch.stack(
        [torch.cos(e) * torch.cos(a), torch.cos(e) * torch.sin(a), torch.sin(e)], dim=-1
    )


def look_at(
    position: Float[Tensor, "N 3"],
    center: Float[Tensor, "N 3"],
    up: Float[Tensor, "N 3"],
    azimuth: Float[Tensor, "N"],
) -> Float[Tensor, "N 4 4"]:
    """Camera-to-world matrices (OpenGL) of cameras at ``position`` that see ``center`` in the
    middle of the image and ``up`` upwards.

    Straight above or below the centre ``up`` gives no direction; then the camera keeps the
    horizontal ``right = (-sin a, cos a, 0)`` that its neighbours at lower elevation have.
    """
    forward = F.normalize(center - position, dim=-1)
    right = torch.cross(forward, F.normalize(up, dim=-1), dim=-1)
    a = torch.deg2rad(azimuth)
    level = torch.stack([-torch.sin(a), torch.cos(a), torch.zeros_like(a)], dim=-1)
    # made orthogonal to 'forward', which a perturbed centre may have tilted
    level = level - (level * forward).sum(-1, keepdim=True) * forward
    right = torch.where(right.norm(dim=-1, keepdim=True) < 1e-4, level, right)
    right = F.normalize(right, dim=-1)
    true_up = F.normalize(torch.cross(right, forward, dim=-1), dim=-1)
    c2w = torch.zeros(len(position), 4, 4)
    c2w[:, :3] = torch.stack([right, true_up, -forward, position], dim=-1)
    c2w[:, 3, 3] = 1.0
    return c2w


def sample_lights(
    strategy: str,
    position: Float[Tensor, "N 3"],
    azimuth: Float[Tensor, "N"],
    distance_range: Sequence[float],
    perturb: float,
    generator: torch.Generator,
) -> Float[Tensor, "N 3"]:
    """Positions of one point light per camera, at a distance within ``distance_range``.

    ``dreamfusion``: in the direction of the camera's position plus N(0, perturb^2);
    ``magic3d``: within 60 degrees of the line from the origin to the camera, the angle above the
    camera's plane being uniform in [pi/6, pi/2].
    """
    n = len(position)
    distance = uniform(n, distance_range, generator)[:, None]
    if strategy == "dreamfusion":
        noise = perturb * torch.randn(n, 3, generator=generator)
        return distance * F.normalize(position + noise, dim=-1)
    around = 2 * math.pi * torch.rand(n, generator=generator)
    above = uniform(n, (math.pi / 6, math.pi / 2), generator)
    local = spherical_to_cartesian(torch.rad2deg(above), torch.rad2deg(around), distance[:, 0])
    # right, up and backward of a camera that looks at the origin: the line to it is 'backward'
    zero = torch.zeros(n, 3)
    axes = look_at(position, zero, zero + torch.tensor([0.0, 0.0, 1.0]), azimuth)[:, :3, :3]
    return (axes @ local[..., None])[..., 0]


def sample_cameras(
    generator: torch.Generator,
    n: int,
    *,
    elevation_range: Sequence[float],
    azimuth_range: Sequence[float],
    camera_distance_range: Sequence[float],
    fovy_range: Sequence[float],
    batch_uniform_azimuth: bool = True,
    camera_perturb: float = 0.0,
    center_perturb: float = 0.0,
    up_perturb: float = 0.0,
    light_sample_strategy: str = "dreamfusion",
    light_distance_range: Sequence[float] = (0.8, 1.5),
    light_position_perturb: float = 1.0,
) -> Dict[str, Float[Tensor, "N ..."]]:
    """``n`` random cameras, as keyword arguments of :func:`camera_batch`.

    Angles (all ranges in degrees) and distance are what was drawn; the perturbations
    (``camera_perturb`` uniform in +-value, the two others normal) move the camera, the point it
    looks at and its up vector afterwards.
    """
    elevation = sample_elevation(n, elevation_range, generator)
    azimuth = sample_azimuth(n, azimuth_range, generator, stratified=batch_uniform_azimuth)
    distance = uniform(n, camera_distance_range, generator)
    fovy = torch.deg2rad(uniform(n, fovy_range, generator))
    position = spherical_to_cartesian(elevation, azimuth, distance)
    position = position + camera_perturb * (2 * torch.rand(n, 3, generator=generator) - 1)
    center = center_perturb * torch.randn(n, 3, generator=generator)
    up = torch.tensor([0.0, 0.0, 1.0]) + up_perturb * torch.randn(n, 3, generator=generator)
    light = sample_lights(
        light_sample_strategy,
        position,
        azimuth,
        light_distance_range,
        light_position_perturb,
        generator,
    )
    return {
        "elevation": elevation,
        "azimuth": azimuth,
        "camera_distances": distance,
        "fovy": fovy,
        "camera_positions": position,
        "center": center,
        "up": up,
        "light_positions": light,
    }


def camera_batch(
    elevation: Float[Tensor, "N"],
    azimuth: Float[Tensor, "N"],
    camera_distances: Float[Tensor, "N"],
    fovy: Float[Tensor, "N"],
    height: int,
    width: int,
    *,
    rays: bool = True,
    rays_d_normalize: bool = True,
    directions_unit_focal: Optional[Float[Tensor, "H W 3"]] = None,
    camera_positions: Optional[Float[Tensor, "N 3"]] = None,
    center: Optional[Float[Tensor, "N 3"]] = None,
    up: Optional[Float[Tensor, "N 3"]] = None,
    light_positions: Optional[Float[Tensor, "N 3"]] = None,
) -> Dict[str, Any]:
    """Everything that a renderer and a guidance may want to know of ``N`` cameras.

    Without the last four arguments the camera looks from its angles at the origin, z up, with the
    light at the camera. Returns (float32, CPU): ``mvp_mtx``, ``proj_mtx`` (image y down, as
    nvdiffrast wants it), ``c2w`` (N, 4, 4); ``camera_positions``, ``light_positions`` (N, 3);
    ``elevation``, ``azimuth`` (degrees), ``camera_distances``, ``fovy`` (radians) (N,);
    ``height``, ``width``; and if ``rays``, ``rays_o``, ``rays_d`` (N, H, W, 3) through the pixel
    centres, of unit length iff ``rays_d_normalize`` (else of unit depth).
    """
    if camera_positions is None:
        camera_positions = spherical_to_cartesian(elevation, azimuth, camera_distances)
    if center is None:
        center = torch.zeros_like(camera_positions)
    if up is None:
        up = torch.tensor([0.0, 0.0, 1.0]).expand_as(camera_positions)
    c2w = look_at(camera_positions, center, up, azimuth)
    proj = get_projection_matrix(fovy, width / height, NEAR, FAR)
    batch = {
        "mvp_mtx": get_mvp_matrix(c2w, proj),
        "proj_mtx": proj,
        "camera_positions": camera_positions,
        "c2w": c2w,
        "light_positions": camera_positions if light_positions is None else light_positions,
        "elevation": elevation,
        "azimuth": azimuth,
        "camera_distances": camera_distances,
        "fovy": fovy,
        "height": height,
        "width": width,
    }
    if rays:
        if directions_unit_focal is None:
            directions_unit_focal = get_ray_directions(height, width, focal=1.0)
        # (x, y, -1) with x and y in pixels: divided by the focal length they are the direction
        focal = 0.5 * height / torch.tan(0.5 * fovy)
        directions = directions_unit_focal.repeat(len(fovy), 1, 1, 1)
        directions[..., :2] /= focal[:, None, None, None]
        batch["rays_o"], batch["rays_d"] = get_rays(
            directions, c2w, keepdim=True, normalize=rays_d_normalize
        )
    return batch
