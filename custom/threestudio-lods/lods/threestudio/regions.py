"""What of an object may change in an edit, as geometries have it in their configuration."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from lods.edits.picture import light_pixels
from lods.gaussians.cameras import orbit
from lods.gaussians.edited import in_box, in_mask
from torch import Tensor


@dataclass
class Region:
    """Fields of a configuration; what several of them leave free is what all of them do."""

    # x0, y0, z0, x1, y1, z1 in world units: only what is in it changes; null: all does
    box: Annotated[list[float] | None, "list (-inf, inf)"] = None
    # a picture, seen from a camera around the origin: only what lies before its light pixels
    # changes, at whatever depth; null: all does
    mask: str | None = None
    mask_azimuth: Annotated[float, "[-360, 360]"] = 0.0  # degrees
    mask_elevation: Annotated[float, "[-90, 90]"] = 0.0
    # of that camera, and of those that look for words: world units, degrees
    view_distance: Annotated[float, "(0, 1e6]"] = 3.6
    view_fovy: Annotated[float, "(0, 180)"] = 40.0

    def contradictions(self):
        """A box that is none: (field, what is wrong)."""
        if self.box is not None and (wrong := no_box(list(self.box))):
            yield "box", wrong


def box_of(region: Any) -> tuple[float, ...] | None:
    """Its box, as six numbers."""
    return None if region.box is None else tuple(float(v) for v in region.box)


def inside(region: Any, points: Float[Tensor, "N 3"], where: str, what: str) -> Bool[Tensor, " N"]:
    """Which points may change. ``where`` stands before the fields' names in messages, ``what`` says
    what the points are. Raises ``ValueError``, one line, where none may."""
    total, points = len(points), points.detach()
    found = torch.ones(total, dtype=torch.bool, device=points.device)
    if (box := box_of(region)) is not None:
        found = in_box(points, box)
    if total and not found.any():
        raise ValueError(
            f"{where}box holds none of the {total} {what}, whose centres go from "
            f"{_point(points.min(0).values)} to {_point(points.max(0).values)}"
        )
    if total and region.mask is not None:
        light = torch.from_numpy(light_pixels(Path(region.mask), f"{where}mask {region.mask}"))
        camera = orbit(1, region.view_distance, region.mask_elevation, region.mask_azimuth)
        found &= in_mask(points, light.to(points.device), camera.to(points), region.view_fovy)
        if not found.any():
            raise ValueError(f"{where}mask is light before none of the {what}")
    return found


def no_box(box: list[Any]) -> str:
    """What is wrong with x0, y0, z0, x1, y1, z1; nothing if it is a box."""
    numbers = [v for v in box if isinstance(v, (int, float)) and math.isfinite(v)]
    if len(numbers) != 6 or len(box) != 6:
        return "must be the six numbers x0, y0, z0, x1, y1, z1"
    if not all(low < high for low, high in zip(box[:3], box[3:])):
        return f"={box} is empty: x0 < x1, y0 < y1 and z0 < z1 are needed"
    return ""


def _point(values: Tensor) -> str:
    return "(" + ", ".join(f"{v:.3g}" for v in values.tolist()) + ")"
