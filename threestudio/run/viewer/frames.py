"""Pictures from any camera, drawn between the steps of a training that does not notice."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from threestudio.data.cameras import FAR, NEAR
from threestudio.utils.misc import capture_rng_state, restore_rng_state
from threestudio.utils.ops import (
    get_mvp_matrix,
    get_projection_matrix,
    get_ray_directions,
    get_rays,
)
from threestudio.utils.typing import Float, Tensor

PARTS = ("geometry", "material", "background", "renderer")
SMALLEST = 48  # pixels of the shorter side


@dataclass(frozen=True)
class View:
    """A visitor's camera: ``wxyz``, the rotation from camera to world with OpenCV's axes (x right,
    y down, z forward), ``position`` in the world, the vertical field of view ``fov`` in radians,
    and the size of the canvas in pixels."""

    wxyz: tuple[float, ...]
    position: tuple[float, ...]
    fov: float
    width: int
    height: int

    @classmethod
    def of(cls, camera: Any) -> "View":
        """That of viser's handle of a camera."""
        return cls(
            tuple(float(x) for x in camera.wxyz),
            tuple(float(x) for x in camera.position),
            float(camera.fov),
            int(camera.image_width),
            int(camera.image_height),
        )

    def c2w(self) -> Float[Tensor, "4 4"]:
        """Camera to world, with OpenGL's axes (x right, y up, looking along -z)."""
        found = torch.eye(4, dtype=torch.float64)
        found[:3, :3] = torch.from_numpy(rotation(self.wxyz) * np.array([1.0, -1.0, -1.0]))
        found[:3, 3] = torch.tensor(self.position, dtype=torch.float64)
        return found.float()

    def size(self, pixels: float, tallest: int) -> tuple[int, int]:
        """(width, height) of a picture of the canvas' shape with at most about `pixels` pixels,
        and no more than the canvas has, nor higher than `tallest`."""
        part = min(1.0, tallest / self.height, math.sqrt(pixels / (self.width * self.height)))
        part = max(part, min(1.0, SMALLEST / min(self.width, self.height)))
        return max(8, round(self.width * part)), max(8, round(self.height * part))


def rotation(wxyz: tuple[float, ...]) -> np.ndarray:
    """The matrix (3, 3) of a quaternion, which need not be of unit length."""
    w, x, y, z = np.asarray(wxyz, np.float64) / np.linalg.norm(wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion(matrix: np.ndarray) -> tuple[float, float, float, float]:
    """(w, x, y, z) of a rotation (3, 3): the eigenvector of the largest eigenvalue of Bar-Itzhack's
    symmetric matrix (J. Guidance 23(6), 2000), which exists for every rotation."""
    m = np.asarray(matrix, np.float64)
    k = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], m[1, 0] + m[0, 1], m[2, 0] + m[0, 2], m[2, 1] - m[1, 2]],
            [m[1, 0] + m[0, 1], m[1, 1] - m[0, 0] - m[2, 2], m[2, 1] + m[1, 2], m[0, 2] - m[2, 0]],
            [m[2, 0] + m[0, 2], m[2, 1] + m[1, 2], m[2, 2] - m[0, 0] - m[1, 1], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], m[0, 0] + m[1, 1] + m[2, 2]],
        ]
    )
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]
    return float(w), float(x), float(y), float(z)


def batch_of(view: View, width: int, height: int, device: Any, unit: bool = True) -> dict[str, Any]:
    """The batch of one camera that renderers and systems take. `unit`: rays of unit length."""
    c2w, fovy = view.c2w()[None], torch.tensor([view.fov])
    position = c2w[:, :3, 3]
    distance = position.norm(dim=-1)
    projection = get_projection_matrix(fovy, width / height, NEAR, FAR)
    directions = get_ray_directions(height, width, focal=0.5 * height / math.tan(0.5 * view.fov))
    rays_o, rays_d = get_rays(directions[None], c2w, keepdim=True, normalize=unit)
    x, y, z = position.unbind(-1)
    batch = {
        "c2w": c2w,
        "fovy": fovy,
        "proj_mtx": projection,
        "mvp_mtx": get_mvp_matrix(c2w, projection),
        "camera_positions": position,
        "light_positions": position,
        "elevation": torch.rad2deg(torch.asin((z / distance.clamp(min=1e-9)).clamp(-1, 1))),
        "azimuth": torch.rad2deg(torch.atan2(y, x)),
        "camera_distances": distance,
        "rays_o": rays_o,
        "rays_d": rays_d,
        "index": torch.zeros(1, dtype=torch.long),
    }
    on_device = {key: value.to(device) for key, value in batch.items()}
    return {**on_device, "height": height, "width": width}


@contextlib.contextmanager
def undisturbed(system: Any, trainer: Any) -> Iterator[None]:
    """Within this, the parts of the system are in evaluation, nothing is differentiated, and the
    precision is that of a validation. Afterwards every module is in the mode that it had, and the
    random generators are as they were, whatever was done."""
    parts = [getattr(system, name, None) for name in PARTS]
    parts = [part for part in parts if isinstance(part, torch.nn.Module)]
    modes = [(part, [(m, m.training) for m in part.modules()]) for part in parts]
    own, random = system.training, capture_rng_state()
    plugin = getattr(trainer, "precision_plugin", None)
    precision = contextlib.nullcontext() if plugin is None else plugin.forward_context()
    try:
        system.training = False
        for part in parts:
            part.eval()
        with torch.no_grad(), precision:
            yield
    finally:
        for part, before in modes:
            part.train(before[0][1])  # of the part itself: some renderers have a hook there
            for module, mode in before:
                module.training = mode
        system.training = own
        restore_rng_state(random)


class Painter:
    """Draws a system's object. To be used within :func:`undisturbed`."""

    def __init__(self, system: Any, unit_rays: bool = True) -> None:
        self.system, self.unit_rays = system, unit_rays
        self._draw = getattr(system, "picture", system)
        self.drawing = False  # as opposed to training

    def __call__(self, view: View, width: int, height: int) -> np.ndarray:
        """The picture (height, width, 3), uint8."""
        batch = batch_of(view, width, height, self.system.device, self.unit_rays)
        self.drawing = True
        try:
            out = self._draw(batch)
        finally:
            self.drawing = False
        return to_bytes(out["comp_rgb"][0])


def to_bytes(image: Float[Tensor, "H W 3"]) -> np.ndarray:
    """An image in 0..1 as uint8."""
    image = torch.nan_to_num(image.detach().float()).clamp(0, 1)
    return (image * 255 + 0.5).to(torch.uint8).cpu().numpy()
