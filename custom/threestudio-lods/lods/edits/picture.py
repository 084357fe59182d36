"""Pictures of any size and shape, as a model takes them."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from lods.gaussians.mesh_parts import in_bytes

MAX_BYTES = 1 << 28
MAX_SIDE = 16_384  # pixels
ENDS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
# what these are: pillow knows others, for some of which it runs other programs
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")


def open_picture(path: Path, what: str = ""):
    """The picture in a file, upright, as Pillow has it, with 8 bits a channel; ``what`` names it in
    messages. Raises ``ValueError``, one line, for what is none, or too large."""
    from PIL import Image, ImageOps

    what = what or str(path)
    if not path.is_file():
        raise ValueError(f"there is no picture {what}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{what} has more than {MAX_BYTES >> 20} MB: make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                size = file.size
                picture = None
                if max(size) <= MAX_SIDE:
                    picture = in_bytes(ImageOps.exif_transpose(file).copy())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{what} has too many pixels: make it smaller") from None
    except Exception as error:  # of many kinds, by format
        text = str(error).split("\n")[0][:120]
        raise ValueError(f"{what} cannot be read as a picture: {text}") from None
    if picture is None:
        raise ValueError(f"{what} is {size[0]} x {size[1]}: {MAX_SIDE} pixels a side are the most")
    return picture


def light_pixels(path: Path, what: str) -> Bool[np.ndarray, "H W"]:
    """Those of a mask picture that are light (128 and more of 255) and opaque; ``what`` names it in
    messages. Raises ``ValueError``, one line, where none are."""
    light, opaque = (
        np.asarray(band, np.uint16) for band in open_picture(path, what).convert("LA").split()
    )
    region = light * opaque >= 128 * 255
    if not region.any():
        raise ValueError(f"{what} is dark everywhere: what may change is light in it")
    return region


@dataclass(frozen=True)
class Picture:
    """A picture of ``width`` x ``height``, padded to a square with white at its right and lower
    edge, and resized to ``size`` pixels a side: ``pixels``. ``box`` (w, h) is what of these is the
    picture itself, at least a pixel."""

    pixels: UInt8[np.ndarray, "S S 3"]
    width: int
    height: int

    @classmethod
    def read(cls, path: Path, size: int) -> "Picture":
        """From a file; what is transparent in it is white."""
        from PIL import Image

        picture = open_picture(path).convert("RGBA")
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        square.alpha_composite(picture)
        if side != size:
            square = square.resize((size, size), Image.Resampling.LANCZOS)
        return cls(np.asarray(square.convert("RGB")), *picture.size)

    @property
    def size(self) -> int:
        return len(self.pixels)

    @property
    def box(self) -> tuple[int, int]:
        share = self.size / max(self.width, self.height)
        return max(1, round(self.width * share)), max(1, round(self.height * share))

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """What of a square like ``pixels`` (S, S, ...) is the picture itself."""
        width, height = self.box
        return pixels[:height, :width]

    def mask(self, region: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "S S"]:
        """A region of the file's pixels (height, width) as one of the square's. Raises
        ``ValueError``, one line, if nothing is left of it."""
        from PIL import Image

        side = max(self.width, self.height)
        square = np.zeros((side, side), np.uint8)
        square[: self.height, : self.width] = 255 * region
        resized = Image.fromarray(square)
        if side != self.size:
            resized = resized.resize((self.size, self.size), Image.Resampling.BOX)
        found = np.asarray(resized) >= 128
        if not found.any():
            raise ValueError(
                f"the region is smaller than a pixel of the {self.size} x {self.size} pixels that "
                "the model sees: make it larger"
            )
        return found
