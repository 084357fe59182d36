"""From arrays to 8-bit pictures: colour images, maps of scalars and of texture coordinates, grids.

Pure functions of numpy arrays; ``threestudio.utils.saving`` writes what they return.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

COLORMAPS = {"jet": "jet", "magma": "magma", "spectral": "Spectral"}  # ours -> matplotlib's


def to_uint8(x: np.ndarray, data_range: Tuple[float, float] = (0, 1)) -> np.ndarray:
    """Clip to ``data_range``, map it to 0..255 and round; NaN is 0 and uint8 passes unchanged."""
    if x.dtype == np.uint8:
        return x
    low, high = data_range
    x = (np.nan_to_num(x.astype(np.float32), nan=low) - low) / (high - low)
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


def srgb_to_linear(x: np.ndarray) -> np.ndarray:
    """Light 0..1 of colours as they are shown, 0..1 (values outside are clipped): the inverse of
    sRGB's curve (IEC 61966-2-1)."""
    x = np.clip(x, 0.0, 1.0)
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def channels_last(x: np.ndarray, data_format: str) -> np.ndarray:
    if data_format not in ("CHW", "HWC") or x.ndim != 3:
        raise UserError(f"an image must be 'CHW' or 'HWC', not {data_format!r} {x.shape}")
    return x.transpose(1, 2, 0) if data_format == "CHW" else x


def rgb_image(
    x: np.ndarray,
    data_format: str = "HWC",
    data_range: Tuple[float, float] = (0, 1),
    rgba: bool = False,
) -> np.ndarray:
    """(H, W, 3) uint8. One channel is grey; beyond three (four if ``rgba``) each further group
    stands to the right of the one before, missing channels being zero."""
    x = to_uint8(channels_last(x, data_format), data_range)
    if x.shape[-1] == 1:
        return np.repeat(x, 3, axis=-1)
    size = 4 if rgba else 3
    x = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % size)))
    return np.concatenate(np.split(x, x.shape[-1] // size, axis=-1), axis=1)


def uv_image(
    x: np.ndarray,
    data_format: str = "HWC",
    data_range: Tuple[float, float] = (0, 1),
    cmap: str = "checkerboard",
) -> np.ndarray:
    """(H, W, 3) uint8 of coordinates (H, W, 2): a 64 x 64 checkerboard, or u red and v green."""
    low, high = data_range
    uv = (channels_last(x, data_format).astype(np.float32).clip(low, high) - low) / (high - low)
    if uv.shape[-1] != 2:
        raise UserError(f"texture coordinates have 2 channels, not {uv.shape[-1]}")
    if cmap == "color":
        return rgb_image(uv)
    if cmap != "checkerboard":
        raise UserError(f"unknown cmap {cmap!r} for uv: choose 'checkerboard' or 'color'")
    light = (uv * 64).astype(int).sum(-1, keepdims=True) % 2 == 0
    return np.repeat(light.astype(np.uint8) * 255, 3, axis=-1)


def grayscale_image(
    x: np.ndarray,
    data_range: Optional[Tuple[float, float]] = None,
    cmap: Optional[str] = "jet",
) -> np.ndarray:
    """(H, W, 3) uint8 of a map (H, W) or (H, W, 1); ``data_range`` None: its minimum to maximum
    (a constant map is all low)."""
    x = np.nan_to_num(x.astype(np.float32))
    if x.ndim == 3 and x.shape[-1] == 1:
        x = x[..., 0]
    if x.ndim != 2:
        raise UserError(f"a grayscale image must be (H, W), not {x.shape}")
    low, high = (float(x.min()), float(x.max())) if data_range is None else data_range
    x = ((x - low) / (high - low if high > low else 1)).clip(0, 1)
    if cmap is None:
        return rgb_image(x[..., None])
    if cmap not in COLORMAPS:
        raise UserError(f"unknown cmap {cmap!r}: choose null, {', '.join(COLORMAPS)}")
    from matplotlib import colormaps  # slow to import

    return rgb_image(colormaps[COLORMAPS[cmap]](x)[..., :3])


def resize(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, uint8 (H, W, 3)."""
    if x.shape[:2] == (height, width):
        return x
    return np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BILINEAR))


def image_grid(
    rows: List[List[np.ndarray]],
    align: Union[str, int, Tuple[int, int]] = "max",
    texts: Optional[List[Any]] = None,
) -> np.ndarray:
    """Rows of uint8 images as one image (H, W, 3).

    Every image is resized to the same size: the largest or smallest height and width among them
    (``align`` "max" or "min"), a square of ``align`` pixels, or (height, width). Short rows are
    filled with black. ``texts[i]`` is written at the left, the i-th of equal vertical parts.
    """
    shapes = np.array([image.shape[:2] for row in rows for image in row])
    if align in ("max", "min"):
        height, width = getattr(shapes, align)(axis=0)
    elif isinstance(align, int):
        height = width = align
    elif isinstance(align, (tuple, list)) and len(align) == 2:
        height, width = align
    else:
        raise UserError(f"align must be 'max', 'min', a size or (height, width), not {align!r}")
    columns = max(len(row) for row in rows)
    grid = np.zeros((len(rows), height, columns, width, 3), dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            grid[i, :, j] = resize(image, height, width)
    picture = grid.reshape(len(rows) * height, columns * width, 3)
    return picture if texts is None else write_texts(picture, texts)


def write_texts(picture: np.ndarray, texts: List[Any]) -> np.ndarray:
    """White letters with a black edge, one text per equal vertical part of the picture."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    part = picture.shape[0] // max(len(texts), 1)
    font = ImageFont.load_default(size=min(max(part // 16, 10), 24))
    for i, text in enumerate(texts):
        draw.text((2, part * i + 1), str(text), "white", font, stroke_width=1, stroke_fill="black")
    return np.asarray(canvas)


def cubemap_image(
    x: np.ndarray, data_range: Tuple[float, float] = (0, 1), rgba: bool = False
) -> np.ndarray:
    """Six faces (6, S, S, C) in the order +x, -x, +y, -y, +z, -z as a cross (3S, 4S, 3 or 4):
    +y above and -y below the second of -x, +z, +x, -z. Further groups of channels to the right."""
    if x.ndim != 4 or x.shape[0] != 6 or x.shape[1] != x.shape[2]:
        raise UserError(f"a cube map must be (6, S, S, C), not {x.shape}")
    size, step = x.shape[1], 4 if rgba else 3
    crosses = []
    for start in range(0, x.shape[-1], step):
        faces = [rgb_image(f, "HWC", data_range, rgba) for f in x[..., start : start + step]]
        cross = np.zeros((3, size, 4, size, faces[0].shape[-1]), dtype=np.uint8)
        cells = [(1, 2), (1, 0), (0, 1), (2, 1), (1, 1), (1, 3)]
        for (row, column), face in zip(cells, faces):
            cross[row, :, column] = face
        crosses.append(cross.reshape(3 * size, 4 * size, -1))
    return np.concatenate(crosses, axis=1)
