"""Metrics of views of an object against true views from the same cameras: pure functions.

Pictures are float (V, H, W, 3) in 0..1 over white, opacities (V, H, W). The V views are evenly
around the object from azimuth 0: turning it by a view's angle shifts the order of the views.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

from pocket.sharpness import gradients, sharpness

SOLID, EMPTY = 0.5, 0.02  # opacity of a silhouette, and of what is outside of it
GMSD_C = 0.0026  # of arXiv:1308.3052, for values in 0..1
FRONT, BEHIND = 45.0, 90.0  # degrees from the front: a front view ends, one from behind begins


def psnr_table(
    made: Float[torch.Tensor, "V H W 3"], true: Float[torch.Tensor, "V H W 3"]
) -> Float[np.ndarray, "V V"]:
    """PSNR in dB, -10 log10 of the mean squared error, of each view against each true view; 100 at
    most."""
    a, b = made.flatten(1).double(), true.flatten(1).double()
    error = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / a.shape[1]
    return (-10 * error.clamp(min=1e-10).log10()).numpy()


def ssim(a: Float[torch.Tensor, "V H W 3"], b: Float[torch.Tensor, "V H W 3"]) -> float:
    """Structural similarity, a Gaussian window of 11 pixels and sigma 1.5, mean over views."""
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    a, b = a.permute(0, 3, 1, 2).float(), b.permute(0, 3, 1, 2).float()
    found = measure(a, b, data_range=1.0)
    assert isinstance(found, torch.Tensor)  # a pair only where the whole map is asked for
    return float(found)


def gmsd(a: Float[torch.Tensor, "V H W 3"], b: Float[torch.Tensor, "V H W 3"]) -> float:
    """Gradient magnitude similarity deviation (arXiv:1308.3052), mean over views: the standard
    deviation over the picture, at half its size, of (2 m n + c) / (m^2 + n^2 + c) with m and n the
    lengths of the gradients. 0 for equal pictures; a distance that sees structure, not colour."""
    m, n = (gradients(F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)) for x in (a, b))
    similarity = (2 * m * n + GMSD_C) / (m**2 + n**2 + GMSD_C)
    return float(similarity.flatten(1).std(dim=1, correction=0).mean())


def saturation(made: Float[torch.Tensor, "V H W 3"], true: Float[torch.Tensor, "V H W 3"]) -> float:
    """Mean chroma (largest minus smallest of red, green and blue), relative to that of the true
    views: above 1 colours are stronger than they truly are, as high guidance scales make them."""
    chroma = [float((x.amax(-1) - x.amin(-1)).double().mean()) for x in (made, true)]
    return chroma[0] / max(chroma[1], 1e-6)


def clipped(images: Float[torch.Tensor, "V H W 3"], mask: Bool[torch.Tensor, "V H W"]) -> float:
    """Share of the colours' values within the mask that are at the ends of their range, below 0.02
    or above 0.98; 0 for an empty mask. Too much guidance drives them there."""
    values = images[mask]
    ends = (values < EMPTY) | (values > 1 - EMPTY)
    return float(ends.float().mean()) if len(values) else 0.0


def iou(made: Bool[np.ndarray, "V H W"], true: Bool[np.ndarray, "V H W"]) -> float:
    """|A and B| / |A or B| of silhouettes, mean over views; 1 where both are empty."""
    both, either = ((f(made, true)).sum((1, 2)) for f in (np.logical_and, np.logical_or))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())


def veil(opacity: Float[torch.Tensor, "V H W"]) -> float:
    """Share of pixels that are neither empty nor solid, 0.02 to 0.98 of opacity: haze, and soft
    edges."""
    return float(((opacity > EMPTY) & (opacity < 1 - EMPTY)).float().mean())


def janus_rate(table: Float[np.ndarray, "V V"]) -> float:
    """Of the views from behind (more than 90 degrees from the front), the share that looks more
    like a true front view (less than 45 degrees from it) than like any other: ``table`` is
    :func:`psnr_table`. NaN without such views. Only meant for objects that have a front."""
    views = len(table)
    away = np.abs((np.arange(views) * 360.0 / views + 180) % 360 - 180)
    behind = away > BEHIND + 1e-6
    nearest = table[behind].argmax(1)
    return float((away[nearest] < FRONT - 1e-6).mean()) if behind.any() else float("nan")


def against(
    made: Float[torch.Tensor, "V H W 3"],
    opacity: Float[torch.Tensor, "V H W"] | None,
    true: Float[torch.Tensor, "V H W 3"],
    true_opacity: Float[torch.Tensor, "V H W"],
    front: bool,
) -> dict[str, float]:
    """All metrics; ``turned_...`` after the turn about the vertical axis, in steps of a view's
    angle, that has the best PSNR. ``opacity`` None and ``front`` False leave out what needs them
    (NaN)."""
    table, views = psnr_table(made, true), len(true)
    order = np.arange(views)
    by_turn = [float(table[order, (order + k) % views].mean()) for k in range(views)]
    turn = int(np.argmax(by_turn))
    found = {}
    for name, k in (("", 0), ("turned_", turn)):
        to, mask = true.roll(-k, 0), (true_opacity > SOLID).roll(-k, 0).numpy()
        found |= {
            f"{name}psnr": by_turn[k],
            f"{name}ssim": ssim(made, to),
            f"{name}gmsd": gmsd(made, to),
            f"{name}iou": np.nan if opacity is None else iou((opacity > SOLID).numpy(), mask),
        }
    nan, inside = float("nan"), true_opacity > SOLID
    return {
        **found,
        "turn": turn * 360.0 / views,
        "sharpness": sharpness(made, true),
        "saturation": saturation(made, true),
        "clipped": clipped(made, inside) - clipped(true, inside),
        "half_transparent": nan if opacity is None else veil(opacity) - veil(true_opacity),
        "janus_rate": janus_rate(table) if front else nan,
    }


def before_its_background(
    made: Float[torch.Tensor, "N H W 3"],
    true: Float[torch.Tensor, "N H W 3"],
    opacity: Float[torch.Tensor, "N H W"],
) -> Float[torch.Tensor, "N H W 3"]:
    """True views over white as they would be before the backgrounds of the pictures, which are
    the mean colours of what is outside of the true silhouettes; white where nothing is outside."""
    outside = (opacity < EMPTY).to(made.dtype)[..., None]
    area = outside.sum((1, 2))
    mean = (made * outside).sum((1, 2)) / area.clamp(min=1)
    ground = torch.where(area > 0, mean, torch.ones_like(mean))[:, None, None]
    return (true - (1 - opacity[..., None]) * (1 - ground)).clamp(0, 1)


def pictures(
    made: Float[torch.Tensor, "N H W 3"],
    true: Float[torch.Tensor, "V H W 3"],
    opacity: Float[torch.Tensor, "V H W"],
    shown: Int[np.ndarray, " N"],
) -> dict[str, float]:
    """The metrics of single pictures, of which number i should be the true view ``shown[i]``, each
    before the picture's own background (:func:`before_its_background`): a text says nothing of it.
    ``nearest_psnr`` is to whichever of the true views is nearest; ``saturation`` is of the true
    silhouette alone, and so is ``clipped``, less the truth's."""
    table = np.concatenate(
        [
            psnr_table(one, before_its_background(one.expand_as(true), true, opacity))
            for one in made.split(1)
        ]
    )
    view = torch.from_numpy(shown)
    wanted = before_its_background(made, true[view], opacity[view])
    inside = opacity[view] > SOLID
    shape = inside[..., None]
    return {
        "psnr": float(table[np.arange(len(made)), shown].mean()),
        "nearest_psnr": float(table.max(1).mean()),
        "ssim": ssim(made, wanted),
        "gmsd": gmsd(made, wanted),
        "sharpness": sharpness(made, wanted),
        "saturation": saturation(made * shape, wanted * shape),
        "clipped": clipped(made, inside) - clipped(wanted, inside),
    }
