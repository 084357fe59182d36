"""The views of a test without their background: frames with transparency, and animations."""

import contextlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt
from lods.assets.baking import spread
from lods.files import whole_file
from omegaconf import ListConfig
from torch import Tensor

WEBP, WEBM, FRAMES = KINDS = ("webp", "webm", "frames")
NAMED = {"none": (), "both": (WEBP, FRAMES)}
# VP9 with a plane for the opacity, which browsers show; crf is the quality, from 0, the best, to 63
VP9 = "-c:v libvpx-vp9 -pix_fmt yuva420p -crf 18 -b:v 0 -auto-alt-ref 0 -cpu-used 2 -row-mt 1"
# said, since players guess it by the size of the picture
COLORS = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv"


def kinds_of(turntable: Any) -> tuple[str, ...]:
    """The KINDS that ``system.turntable`` asks for: one, a list of them, or a name of NAMED. Raises
    ``ValueError``, one line, for anything else, and for a webm where there is no ffmpeg."""
    several = isinstance(turntable, (list, tuple, ListConfig))
    words = list(turntable) if several else [turntable]
    found: list[str] = []
    for word in words:
        if word not in (*KINDS, *NAMED):
            raise ValueError(
                f"system.turntable has {str(word)[:40]!r}: it is one or a list of "
                f"{', '.join(KINDS)}, or both (webp and frames), or none"
            )
        found += NAMED.get(word, (word,))
    if WEBM in found and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError("a webm needs ffmpeg: pip install imageio-ffmpeg")
    return tuple(kind for kind in KINDS if kind in found)


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


def _pictures(frames: Iterable[Path]) -> Iterator[Any]:
    """The frames as Pillow's pictures, read one at a time, all of the size of the first."""
    from PIL import Image

    size = None
    for frame in frames:
        with Image.open(frame) as file:
            picture = file.convert("RGBA")
        size = size or picture.size
        yield picture if picture.size == size else picture.resize(size)


def write_webp(path: str | Path, frames: list[Path], fps: int) -> None:
    """An animated WebP with transparency, without end. Raises ValueError where there are no
    frames."""
    _refuse_none(frames)
    pictures = _pictures(frames)
    with whole_file(path) as partial:
        next(pictures).save(
            partial,
            save_all=True,
            append_images=pictures,
            duration=round(1000 / fps),
            loop=0,
            quality=90,
            method=4,
        )


def write_webm(path: str | Path, frames: list[Path], fps: int) -> None:
    """A WebM with transparency (VP9), which players repeat if they are asked to. Raises ValueError,
    one line, where there are no frames, and for what ffmpeg says."""
    import imageio_ffmpeg

    _refuse_none(frames)
    width, height = next(_pictures(frames)).size
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo"]
    command += ["-pix_fmt", "rgba", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    command += ["-an", "-vf", "scale=out_color_matrix=bt709:out_range=tv"]
    command += [*VP9.split(), *COLORS.split()]
    with whole_file(path) as partial, tempfile.TemporaryFile() as said:
        ffmpeg = subprocess.Popen([*command, str(partial)], stdin=subprocess.PIPE, stderr=said)
        assert ffmpeg.stdin is not None
        with contextlib.suppress(BrokenPipeError), ffmpeg:  # it has ended early, and says why
            for picture in _pictures(frames):
                ffmpeg.stdin.write(_with_colour_everywhere(np.asarray(picture)).tobytes())
        if ffmpeg.returncode:
            said.seek(0)
            lines = said.read(1 << 16).decode(errors="replace").split("\n")
            why = next((line.strip() for line in reversed(lines) if line.strip()), "no reason")
            raise ValueError(f"ffmpeg could not write '{path}': {why[:200]}")


def _with_colour_everywhere(picture: UInt[np.ndarray, "H W 4"]) -> UInt[np.ndarray, "H W 4"]:
    """The picture with the nearest colour where it is transparent: a video has colours for every
    two pixels only, and those at an edge would mix with whatever is behind it."""
    color = spread(picture[..., :3], picture[..., 3] > 0)
    return np.concatenate([color, picture[..., 3:]], axis=-1)


def _refuse_none(frames: list[Path]) -> None:
    if not frames:
        raise ValueError("there are no views to animate: set data.n_test_views above 0")
