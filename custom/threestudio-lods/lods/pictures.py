"""Images of tensors as a picture file."""

import math
from pathlib import Path

import torch
from jaxtyping import Float
from lods.files import whole_file
from torch import Tensor


@torch.no_grad()
def save_images(
    path: str | Path,
    images: Float[Tensor, "B 3 H W"],
    columns: int | None = None,
    zoom: int = 1,
) -> Path:
    """Write images in 0..1 side by side as one picture (png, or what the ending of ``path`` says)
    and return its path; folders are made where they are missing.

    ``columns``: by default as many as rows, or one more. ``zoom``: each pixel becomes so many a
    side, with smooth transitions. Raises ``ValueError`` for a tensor of another shape.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images are (B, 3, H, W) in 0..1, not {tuple(images.shape)}")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    height, width = (zoom * side for side in images.shape[2:])
    pixels = (images.detach().clamp(0, 1).permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pixels) / columns) * height))
    for i, image in enumerate(pixels):
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(tile, (i % columns * width, i // columns * height))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        sheet.save(partial)
    return path
