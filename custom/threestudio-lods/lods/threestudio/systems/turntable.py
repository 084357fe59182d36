"""The views of a test without their background: frames with transparency, and an animation."""

import re
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt
from lods.files import whole_file
from torch import Tensor

TURNTABLES = ("none", "webp", "frames", "both")


def straight(
    foreground: Float[Tensor, "H W 3"], opacity: Float[Tensor, "H W 1"]
) -> UInt[np.ndarray, "H W 4"]:
    """Colours and opacity in 8 bits. A render's ``foreground`` is the colour times the opacity;
    pictures keep the colour itself. In front of any background, the two show the same."""
    alpha = opacity.detach().float().clamp(0, 1)
    color = foreground.detach().float() / alpha.clamp_min(1e-6)
    both = torch.cat([color.clamp(0, 1), alpha], dim=-1)
    return (255 * both).round().byte().cpu().numpy()


def write_frame(path: str | Path, picture: UInt[np.ndarray, "H W 4"]) -> None:
    """A PNG with transparency."""
    from PIL import Image

    with whole_file(path) as partial:
        Image.fromarray(picture).save(partial)


def frames_in(folder: str | Path) -> list[Path]:
    """The frames of a folder, in their order."""
    found = [path for path in Path(folder).glob("*.png") if re.fullmatch(r"\d+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem))


def write_webp(path: str | Path, frames: list[Path], fps: int) -> None:
    """An animated WebP with transparency, without end, of frames that are read one at a time.
    Raises ValueError where there are none."""
    from PIL import Image

    if not frames:
        raise ValueError("there are no views to animate: set data.n_test_views above 0")

    def read(frame: Path):
        with Image.open(frame) as file:
            return file.convert("RGBA")

    with whole_file(path) as partial:
        read(frames[0]).save(
            partial,
            save_all=True,
            append_images=(read(frame) for frame in frames[1:]),
            duration=round(1000 / fps),
            loop=0,
            quality=90,
            method=4,
        )
