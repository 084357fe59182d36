"""Triangles with colours, as mesh files hold them, and sRGB's curve.

Colours here are *shown*, as pictures on a screen have them (sRGB), or *linear* in light, as glTF
keeps factors and vertex colours, and as shading multiplies them.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Num, UInt

MAX_BYTES = 1 << 32  # of a file of a mesh, of Gaussians, or of what belongs to one
# what pillow decodes itself: for EPS it would run another program on what the file says
DECODED = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TGA", "TIFF")
MAX_PIXELS = 8192 * 8192  # of one picture: 200 MB when it is decoded
MAX_ALL_PIXELS = 4 * MAX_PIXELS  # of all pictures of a file: they are decoded one at a time


def linear_from_shown(shown: Float[np.ndarray, "*N"]) -> Float[np.ndarray, "*N"]:
    """The inverse of sRGB's curve (IEC 61966-2-1), on values clipped to 0..1."""
    shown = np.clip(shown, 0.0, 1.0)
    return np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)


def shown_from_linear(linear: Float[np.ndarray, "*N"]) -> Float[np.ndarray, "*N"]:
    """sRGB's curve (IEC 61966-2-1), on values clipped to 0..1."""
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def unit_colors(values: Num[np.ndarray, "*N"]) -> Float[np.ndarray, "*N"]:
    """Colours 0..1 of a file that does not say their range.

    Whole numbers are bytes, or 16-bit where their type is and one exceeds 255. Floats are 0..1, or
    0..255 where the largest is between 2 and 255 (a little more than 1 is a rounding error).
    """
    values = np.asarray(values)
    largest = np.nanmax(values, initial=0.0)
    if values.dtype.kind in "iu":
        scale = 65535.0 if values.dtype == np.uint16 and largest > 255 else 255.0
    else:
        scale = 255.0 if 2.0 <= largest <= 255.5 else 1.0
    return (values / scale).clip(0.0, 1.0).astype(np.float64)


class Picture:
    """A texture's picture. Its file is looked into at once and decoded when its colours are read.

    Raises ValueError for one that is not a picture, or larger than ``MAX_PIXELS``.
    """

    def __init__(self, image: Any, wrap: tuple[str, str] = ("repeat", "repeat")) -> None:
        """``image``: a file's bytes, or a picture of pillow's; ``wrap``: 'repeat', 'mirror' or
        'clamp', along u and along v."""
        self.source, self.wrap = image, wrap
        width, height = self.size = self._opened().size
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"its picture has {width} x {height} pixels, of which at most {MAX_PIXELS} are "
                "read: make it smaller"
            )

    def _opened(self) -> Any:
        # anew each time: what is decoded would stay with pillow's picture
        return open_picture(self.source) if isinstance(self.source, bytes) else self.source

    def pixels(self) -> UInt[np.ndarray, "H W 3"]:
        return np.asarray(in_bytes(self._opened()).convert("RGB"))

    def at(
        self, pixels: UInt[np.ndarray, "H W 3"], uv: Float[np.ndarray, "N 2"]
    ) -> tuple[Float[np.ndarray, "N 2 2 3"], Float[np.ndarray, "N 2 2 1"]]:
        """The four pixels around each point, 0..1, and their weights (N, 2, 2, 1). (0, 0) is the
        top left corner of the picture, (1, 1) the bottom right one."""
        places, weights = [], []
        for axis, size in ((1, pixels.shape[0]), (0, pixels.shape[1])):
            t = np.nan_to_num(uv[:, axis].astype(np.float64)).clip(-1e9, 1e9) * size - 0.5
            first = np.floor(t)
            both = np.stack([first, first + 1], axis=1).astype(np.int64)
            if self.wrap[axis] == "clamp":
                both = both.clip(0, size - 1)
            elif self.wrap[axis] == "mirror":
                both = both % (2 * size)
                both = np.where(both < size, both, 2 * size - 1 - both)
            else:
                both = both % size
            places.append(both)
            weights.append(np.stack([1 - (t - first), t - first], axis=1))
        texels = pixels[places[0][:, :, None], places[1][:, None, :]] / 255.0
        return texels, (weights[0][:, :, None] * weights[1][:, None, :])[..., None]


def in_bytes(image: Any):
    """A picture of pillow's with 8 bits a channel: of 16 bits of grey it keeps the upper ones,
    where its own conversion would make white of nearly all."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def open_picture(data: bytes):
    """A picture of pillow's, not decoded yet. Raises ValueError if it cannot be one."""
    import warnings

    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size, which is checked here
            return Image.open(io.BytesIO(data), formats=DECODED)
    except UnidentifiedImageError as error:  # whose text is the address of an object
        raise ValueError("a picture of it cannot be read (of no known format)") from error
    except Exception as error:
        raise ValueError(f"a picture of it cannot be read ({error})") from error


def check_pictures(parts: list["Part"]) -> None:
    """Raise ValueError where the pictures of a file would take long to decode."""
    pictures = {id(part.picture): part.picture for part in parts if part.picture is not None}
    pixels = sum(picture.size[0] * picture.size[1] for picture in pictures.values())
    if pixels > MAX_ALL_PIXELS:
        raise ValueError(
            f"its {len(pictures)} pictures have {pixels} pixels together, of which at most "
            f"{MAX_ALL_PIXELS} are read: make them smaller"
        )


@dataclass
class Part:
    """Triangles of one material.

    The colour is the product of ``factor``, of the vertices' ``rgb`` and of the ``picture`` at
    ``uv`` (its v points down the picture), as far as they are there; ``linear`` tells which kind
    the first two are. A picture's own values are always shown ones.
    """

    vertices: Float[np.ndarray, "V 3"]
    faces: Integer[np.ndarray, "F 3"]
    matrix: Float[np.ndarray, "4 4"] | None = None  # from ``vertices`` to the file's space
    factor: Float[np.ndarray, "3"] = field(default_factory=lambda: np.ones(3))
    rgb: Float[np.ndarray, "V 3"] | None = None
    uv: Float[np.ndarray, "V 2"] | None = None
    picture: Picture | None = None
    linear: bool = False

    def triangles(self, faces: Any = slice(None)) -> Float[np.ndarray, "F 3 3"]:
        """The corners of these triangles, in the file's space."""
        corners = np.asarray(self.vertices, np.float64)[self.faces[faces]]
        if self.matrix is None:
            return corners
        with np.errstate(all="ignore"):  # what is not finite is left out later
            return corners @ self.matrix[:3, :3].T + self.matrix[:3, 3]

    def areas(self) -> Float[np.ndarray, " F"]:
        """Of the triangles; not finite where a corner is not."""
        corners = self.triangles()
        with np.errstate(invalid="ignore", over="ignore"):
            u, v = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
            # np.cross takes a hundred microseconds for a single triangle, and files have many parts
            cross = u[:, [1, 2, 0]] * v[:, [2, 0, 1]] - u[:, [2, 0, 1]] * v[:, [1, 2, 0]]
            return np.sqrt((cross * cross).sum(1)) / 2

    def colors(
        self,
        faces: Integer[np.ndarray, " N"],
        weights: Float[np.ndarray, "N 3"],
        pixels: UInt[np.ndarray, "H W 3"] | None = None,
    ) -> Float[np.ndarray, "N 3"]:
        """Shown colours 0..1 at points of these triangles, with barycentric ``weights``;
        ``pixels`` of the picture."""
        corners, weights = self.faces[faces], weights[..., None]
        color = np.broadcast_to(np.asarray(self.factor, np.float64), (len(faces), 3))
        if self.rgb is not None:
            color = color * (self.rgb[corners].astype(np.float64) * weights).sum(1)
        if pixels is not None and self.picture is not None and self.uv is not None:
            texels, share = self.picture.at(pixels, (self.uv[corners] * weights).sum(1))
            texels = linear_from_shown(texels) if self.linear else texels
            color = color * (texels * share).sum((1, 2))
        return shown_from_linear(color) if self.linear else color.clip(0, 1)
