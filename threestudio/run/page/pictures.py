"""Pictures of a run, as data that lie in a page."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from threestudio.run.page.files import Folder

MAX_PIXELS = 1 << 26
MAX_PREVIEWS = 12


@dataclass(frozen=True)
class Picture:
    """A picture in a page."""

    data: str  # data:image/webp;base64,...
    width: int
    height: int
    label: str = ""


def embedded(path: Path, side: int, quality: int = 80, ratio: float | None = None) -> Picture:
    """A picture file with at most ``side`` pixels in width. ``ratio``: only its left end, whose
    width is so many heights. Raises ``ValueError`` or ``OSError`` for what is no picture."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{path.name} has too many pixels")
        image = file.convert("RGB")
    if ratio is not None:
        image = image.crop(
            (0, 0, min(image.width, max(1, round(image.height * ratio))), image.height)
        )
    if image.width > side:
        height = max(1, round(image.height * side / image.width))
        image = image.resize((side, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/webp;base64,{data}", image.width, image.height)


def newest(folder: Folder, pattern: str) -> tuple[int, str] | None:
    """The step and the name of the plain file in ``save`` with the highest step, whose name, from
    the step on, is ``pattern``."""
    found = []
    for name in folder.names("save"):
        match = re.fullmatch(rf"it(\d{{1,12}}){pattern}", name)
        if match:
            found.append((int(match[1]), f"save/{name}"))
    return max(found, default=None)


def previews(folder: Folder) -> list[tuple[int, str]]:
    """Steps and names of the validation pictures of the first view, MAX_PREVIEWS at most, evenly
    chosen with the first and the last."""
    views: dict[int, tuple[int, str]] = {}
    for name in folder.names("save"):
        match = re.fullmatch(r"it(\d{1,12})-(\d{1,6})\.png", name)
        if match:
            step, view = int(match[1]), int(match[2])
            if step not in views or view < views[step][0]:
                views[step] = view, f"save/{name}"
    steps = sorted(views)
    if len(steps) > MAX_PREVIEWS:
        last = len(steps) - 1
        chosen = {round(i * last / (MAX_PREVIEWS - 1)) for i in range(MAX_PREVIEWS)}
        steps = [steps[i] for i in sorted(chosen)]
    return [(step, views[step][1]) for step in steps]
