"""What a method of the library is called with: checked, with a line for a mistake, and resized."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods import log
from lods.cameras import Cameras, no_cameras, no_views, refuse_rows
from torch import Tensor

OPTIONAL = ("c2w", "mvp", "fovy")  # fields of Cameras


def check_images(images: Any) -> None:
    """Raise ``ValueError`` for what are no images (B, 3, H, W) of floats."""
    _check_floats(images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are (B, 3, H, W), not {tuple(images.shape)}")
    _check_filled(images)


def check_values(images: Float[Tensor, "B 3 H W"]) -> None:
    """Raise ``ValueError`` for images that are not finite, and warn of those that are clearly not
    in 0..1."""
    low, high = (float(value) for value in images.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the images hold nan or inf: images are in 0..1")
    if low < -0.5 or high > 1.5:
        log.warn(f"the images go from {low:.3g} to {high:.3g}: the model was made for 0..1")


def check_latents(latents: Any, shape: tuple[int, int, int]) -> None:
    """Raise ``ValueError`` for what are no latents (B, c, h, w) of floats of a model."""
    _check_floats(latents)
    if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(shape):
        raise ValueError(
            f"latents of this model are (B, {', '.join(map(str, shape))}), "
            f"not {tuple(latents.shape)}"
        )
    _check_filled(latents)


def _check_floats(given: Any) -> None:
    if not (isinstance(given, Tensor) and given.is_floating_point()):
        kind = getattr(given, "dtype", type(given).__name__)
        raise ValueError(f"images in 0..1 and latents are tensors of floats, not {kind}")


def _check_filled(given: Tensor) -> None:
    if given.numel() == 0:
        raise ValueError(f"a batch of shape {tuple(given.shape)} is empty")


def cameras_for(
    cameras: Cameras | None, latents: Float[Tensor, "B c h w"], told: str = "words", views: int = 1
) -> Cameras:
    """``cameras`` if there is one for each row; for None all see the front, unless the model is
    told more than words (``told``, see :data:`lods.cameras.TOLD`). Raises ``ValueError`` for
    another number of them, for what are no tensors of one number (or matrix) a row, where the
    model needs cameras or their field of view and has none, and for pictures that are not the
    ``views`` of each object that the model sees at once."""
    rows = len(latents)
    if views > 1:
        refuse_rows(rows, views)
        if cameras is None:
            raise ValueError(no_views(views))
    if cameras is None and told != "words":
        raise ValueError(no_cameras(told))
    if cameras is None:
        front = torch.zeros(rows, device=latents.device)
        return Cameras(front, front, front)
    if not isinstance(cameras, Cameras):
        raise ValueError(f"cameras are a lods.Cameras, not a {type(cameras).__name__}")
    for name, value in vars(cameras).items():
        wanted = (rows, 4, 4) if name in ("c2w", "mvp") else (rows,)
        if value is None and name in OPTIONAL:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} of the cameras is a tensor, not a {type(value).__name__}")
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"{name} of the cameras has the shape {tuple(value.shape)}, which for {rows} "
                f"image{'s' * (rows > 1)} must be {wanted}"
            )
    if told != "words" and views == 1:
        cameras.numbers()
    return cameras


def resized(x: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B C h w"]:
    """``x`` with ``size`` pixels a side, bilinearly."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
