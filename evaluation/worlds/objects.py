"""The world of real objects: the truth of a prompt are 24 views of the very object that it names.

A trained scene is looked at from the cameras of the truth; of latents, number i of N is seen from
azimuth 360 i / N (the nearest of the truth's), as high and as far away as the truth.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from evaluation import truth_metrics
from evaluation.against_truth import TRUTH, TrueViews, over, truth_of, views_of
from pocket.judge import OWN, PALETTE, verdict
from pocket.judge import load as load_judge
from pocket.shapes.truth import Pictures
from pocket.truth import JUDGED, judged_cameras
from pocket.world import NAMES, asked
from threestudio.utils.misc import get_device

FACING = 45.0  # degrees that the judge may be off with an azimuth


class Objects:
    """See :class:`evaluation.worlds.World`."""

    metrics: tuple[str, ...] = (
        *("object_accuracy", "color_accuracy", "view_accuracy"),
        *("psnr", "ssim", "gmsd", "iou", "nearest_psnr"),
        *("turn", "turned_psnr", "turned_ssim", "turned_gmsd", "turned_iou"),
        *("sharpness", "saturation", "clipped", "half_transparent", "janus_rate"),
    )
    side = 128
    views: int | None = JUDGED

    def ready(self) -> None:
        if not (TRUTH / "renders.json").is_file():
            raise ValueError(
                f"{TRUTH} has no true views (an installed copy comes without them): run this from "
                "a checkout of the repository"
            )

    def labels(self, prompt: str) -> dict[str, str]:
        thing, colour = asked(prompt)
        return {"kind": thing.name, "color": colour or ""}

    def cameras(self, count: int) -> Float[np.ndarray, "N 4"]:
        return judged_cameras()[around(count)]

    def look(self, system: Any, data: Any, views: int) -> Pictures:
        """From the cameras of the truth, the foreground over white, on the CPU."""
        device = get_device()
        system.to(device).eval()
        system.do_update_step(system.true_current_epoch, system.true_global_step)
        rgb, opacity = views_of(system.renderer, judged_cameras(), self.side, device)
        return pictures(over(rgb, opacity), opacity, np.arange(views))

    def example(self, prompt: str, cfg: Any, seed: int, count: int) -> Pictures:
        true = truth_of(prompt)
        shown = around(count) if cfg is None else np.arange(JUDGED)
        opacity = None if cfg is None else true.opacity
        return pictures(true.rgb[shown], opacity, shown)

    def score(self, prompt: str, cfg: Any, made: Pictures, true: bool) -> dict[str, float]:
        views, size = truth_of(prompt), (self.side, self.side)
        if made.rgb.shape[2:] != size:  # another model's
            made = replace(made, rgb=F.interpolate(made.rgb, size, mode="area"))
        found = judged(made, prompt)
        if true:  # nothing is learnt from comparing the truth with itself
            return found
        rgb = made.rgb.permute(0, 2, 3, 1)
        if cfg is None:
            shown = around(len(rgb))
            return found | truth_metrics.pictures(rgb, views.rgb, views.opacity, shown)
        return found | compared(rgb, made.opacity, views)


def around(count: int) -> np.ndarray:
    """Of the judged views those nearest to ``count`` even turns, from azimuth 0 on."""
    return (np.arange(count) * JUDGED / count).round().astype(int) % JUDGED


def pictures(rgb: torch.Tensor, opacity: torch.Tensor | None, shown: np.ndarray) -> Pictures:
    """(V, H, W, 3) as a run's pictures, seen from these of the judged cameras."""
    azimuth = judged_cameras()[shown, 1].astype(float)
    return Pictures(rgb.permute(0, 3, 1, 2).contiguous(), opacity, azimuth)


def compared(rgb: torch.Tensor, opacity: torch.Tensor | None, true: TrueViews) -> dict[str, float]:
    """The metrics of the judged views (V, H, W, 3) against the true ones."""
    return truth_metrics.against(rgb, opacity, true.rgb, true.opacity, true.thing.front)


def judged(made: Pictures, prompt: str) -> dict[str, float]:
    """What the judge says. Colours are asked of objects that come in several, sides of those with a
    front; NaN for others."""
    thing, colour = asked(prompt)
    said = verdict(load_judge(), made.rgb)
    nan = float("nan")
    wanted = PALETTE.index(colour or thing.like or OWN)
    found = {
        "object_accuracy": float((said["object"] == NAMES.index(thing.name)).mean()),
        "color_accuracy": float((said["colour"] == wanted).mean()) if thing.colours else nan,
        "view_accuracy": nan,
    }
    if thing.front and made.azimuth is not None:
        off = np.abs((said["azimuth"] - made.azimuth + 180) % 360 - 180)
        found["view_accuracy"] = float((off < FACING).mean())
    return found
