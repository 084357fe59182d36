"""What of a picture may change: a box, a mask picture, or where the model sees some words."""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from lods.edits.picture import light_pixels
from lods.methods import predictions
from lods.methods.conditions import Conditions
from lods.models.base import Model
from torch import Tensor

FEATHER = 1 / 32  # of the side: so wide is the seam, inside the region
# of the timesteps, between which words are looked for: at less noise a model needs no text to see
# what is there, at more it sees nothing of it
WORDS_AT = (0.4, 0.7)
QUANTILE = 0.99  # of the map, what counts as 1


def box_region(text: str, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The pixels from (x0, y0) to before (x1, y1), for ``text`` "x0,y0,x1,y1", of a picture of this
    ``size`` (width, height). Raises ``ValueError``, one line."""
    numbers = re.fullmatch(r"(-?\d{1,6}),(-?\d{1,6}),(-?\d{1,6}),(-?\d{1,6})", text.strip())
    if numbers is None:
        raise ValueError(f"--region {text[:60]!r} is not written X0,Y0,X1,Y1, in whole pixels")
    x0, y0, x1, y1 = map(int, numbers.groups())
    width, height = size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"--region {text} is no box in a picture of {width} x {height}: 0 <= X0 < X1 <= "
            f"{width} and 0 <= Y0 < Y1 <= {height}"
        )
    region = np.zeros((height, width), bool)
    region[y0:y1, x0:x1] = True
    return region


def mask_region(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The light pixels (128 and more of 255; transparent ones are dark) of a mask picture of this
    ``size`` (width, height). Raises ``ValueError``, one line."""
    region = light_pixels(path, f"--mask {path}")
    height, width = region.shape
    if (width, height) != size:
        raise ValueError(
            f"--mask {path} is {width} x {height}, and the picture {size[0]} x {size[1]}: they "
            "have to be alike"
        )
    return region


@torch.no_grad()
def word_map(
    model: Model,
    latents: Float[Tensor, "1 c h w"],
    words: Float[Tensor, "1 T D"],
    conditions: Conditions,
    draws: int = 16,
) -> Float[Tensor, "h w"]:
    """Where in a picture the model's prediction depends on some words (as in DiffEdit,
    arXiv:2210.11427): the mean over ``draws`` of t, from 0.4 T to 0.7 T, and of noise, of
    |eps(x_t; words) - eps(x_t; n)|, over the channels, smoothed over 3 x 3, and divided by its 0.99
    quantile: 0 to 1. It depends on the global random state."""
    total = torch.zeros_like(latents[:, :1])
    steps = model.schedule.steps
    for part in torch.linspace(*WORDS_AT, draws).tolist():
        t = torch.full((1,), min(int(part * steps), steps - 1), device=latents.device)
        x_t, _ = predictions.fresh_noise(model, latents, t)
        with_words, without = predictions.one_call(
            model, x_t, t, conditions, words, conditions.null
        )
        total += (with_words - without).abs().mean(1, keepdim=True)
    smooth = F.avg_pool2d(F.pad(total, (1, 1, 1, 1), mode="replicate"), 3, 1)[0, 0]
    return (smooth / smooth.flatten().quantile(QUANTILE).clamp_min(1e-12)).clamp(max=1)


def region_of_words(
    found: Float[Tensor, "h w"], level: float, size: int
) -> Bool[np.ndarray, "S S"]:
    """The pixels where a map of :func:`word_map` is ``level`` or more."""
    smooth = F.interpolate(found[None, None], (size, size), mode="bicubic", align_corners=False)
    return (smooth[0, 0] >= level).cpu().numpy()


def latent_mask(
    region: Bool[np.ndarray, "S S"], shape: tuple[int, int, int], device: torch.device
) -> Float[Tensor, "1 1 h w"]:
    """1 for the numbers of the latents of which any pixel is in the region, else 0."""
    pixels = torch.from_numpy(region.astype(np.float32))[None, None].to(device)
    return F.adaptive_max_pool2d(pixels, shape[1:])


def blended(
    edited: UInt8[np.ndarray, "S S 3"],
    source: UInt8[np.ndarray, "S S 3"],
    region: Bool[np.ndarray, "S S"],
) -> UInt8[np.ndarray, "S S 3"]:
    """``source`` outside of the region, to the last bit; inside, ``edited``, which comes in over
    the first 1/32 of the side."""
    from scipy.ndimage import distance_transform_edt

    if region.all():
        return edited
    depth = np.asarray(distance_transform_edt(region))
    share = np.clip(depth / max(1.0, FEATHER * len(source)), 0, 1)[..., None]
    mixed = np.rint(share * edited + (1 - share) * source).astype(np.uint8)
    return np.where(region[..., None], mixed, source)
