"""What is measured of runs, and how tables and plots show it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A column of results.csv: ``better`` is 1 if more is better, -1 if less is and 0 if neither
    is; tables show the value times ``scale`` with ``digits`` decimals."""

    column: str
    title: str
    better: int
    scale: float = 1.0
    digits: int = 1
    about: str = ""  # what it is, for readers

    def improves(self, sign: int) -> bool:
        """Whether a difference of this sign (0: none that is told apart) is an improvement."""
        return sign != 0 and sign == self.better

    def show(self, value: float, sign: str = "") -> str:
        text = f"{self.scale * value:{sign}.{self.digits}f}"
        return text.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Measures:
    """What the runs in one world are measured by. ``headline`` are two of the metrics: the object
    accuracy, and the one by which settings are chosen. ``ratio`` is one whose values differ by
    factors from prompt to prompt, so that its ratio is told beside its difference."""

    title: str
    metrics: tuple[Metric, ...]
    headline: tuple[Metric, Metric]
    ratio: Metric | None = None


_SHAPES = (
    Metric(
        "object_accuracy",
        "object accuracy, %",
        1,
        100,
        about="The share of the views (of the pictures, on latents) that the judge takes for the "
        "object of the prompt. Chance is 5 %.",
    ),
    Metric(
        "color_accuracy",
        "colour accuracy, %",
        1,
        100,
        about="The same for the colour, where the prompt names one. Chance is 12.5 %.",
    ),
    Metric(
        "frechet",
        "Fréchet distance",
        -1,
        about="The squared distance, as in FID, between the views and true renders of the prompt "
        "in the features of the judge. Few pictures bias it upward, for all methods alike: the row "
        "of true renders is its floor.",
    ),
    Metric(
        "janus_rate",
        "Janus rate, %",
        -1,
        100,
        about="The share of the views from behind in which the judge sees a front, for objects "
        "with one front. An unrecognisable object has a low rate too.",
    ),
    Metric(
        "silhouette_iou",
        "silhouette IoU, %",
        1,
        100,
        about="The overlap of the opacity with the true shape after the best turn about the "
        "vertical.",
    ),
    Metric("clip_score", "CLIP score", 1, 1, 3, "100 times the cosine of image and prompt."),
)
_OBJECTS = (
    Metric(
        "object_accuracy",
        "object accuracy, %",
        1,
        100,
        about="The share of the 24 views (of the pictures, on latents) that the judge takes for "
        "the object of the prompt. Chance is 2.5 %.",
    ),
    Metric(
        "color_accuracy",
        "colour accuracy, %",
        1,
        100,
        about="The same for the colour, of objects that come in several. Chance is 20 %.",
    ),
    Metric(
        "view_accuracy",
        "view accuracy, %",
        1,
        100,
        about="The share in which the judge sees the azimuth within 45 degrees of the true one, of "
        "objects with a front. Chance is 25 %.",
    ),
    Metric(
        "psnr",
        "PSNR, dB",
        1,
        about="To the true view from the same camera, over white; of a picture on latents, over "
        "its own background.",
    ),
    Metric(
        "nearest_psnr",
        "PSNR to the nearest view, dB",
        1,
        about="Of a picture on latents to whichever of the 24 true views is nearest to it.",
    ),
    Metric("ssim", "SSIM", 1, 1, 3, about="Structural similarity to the true view; 1 is equal."),
    Metric(
        "gmsd",
        "GMSD",
        -1,
        1,
        3,
        about="Gradient magnitude similarity deviation, a perceptual distance that sees structure "
        "and no colour; 0 is equal.",
    ),
    Metric("iou", "IoU, %", 1, 100, about="The overlap of silhouettes, opacity above one half."),
    Metric(
        "turned_psnr",
        "PSNR turned, dB",
        1,
        about="After the turn about the vertical axis, in steps of 15 degrees, that is best for "
        "PSNR; so for the other metrics that are turned.",
    ),
    Metric("turned_ssim", "SSIM turned", 1, 1, 3),
    Metric("turned_gmsd", "GMSD turned", -1, 1, 3),
    Metric("turned_iou", "IoU turned, %", 1, 100),
    Metric(
        "sharpness",
        "sharpness",
        1,
        1,
        2,
        about="Mean length of the gradient relative to the truth's: 1 is as sharp. Streaks and "
        "noise raise it as well.",
    ),
    Metric(
        "saturation",
        "saturation",
        0,
        1,
        2,
        about="Mean chroma relative to the truth's: 1 is as colourful, more is too strong.",
    ),
    Metric(
        "clipped",
        "clipped, %",
        -1,
        100,
        about="The share of colour values within the true silhouette that are at the ends of their "
        "range, less the truth's. Too much guidance drives them there.",
    ),
    Metric(
        "half_transparent",
        "half transparent, %",
        -1,
        100,
        about="The share of pixels that are neither empty nor solid, less the truth's.",
    ),
    Metric(
        "janus_rate",
        "Janus rate, %",
        -1,
        100,
        about="The share of the views from behind that look more like a true front view than like "
        "any other true view, for objects with a front.",
    ),
    Metric("clip_score", "CLIP score", 1, 1, 3, "100 times the cosine of image and prompt."),
)
COSTS = (
    Metric("seconds", "seconds", -1, about="The time of the training alone, on this machine."),
    Metric("seconds_per_step", "seconds a step", -1, 1, 3),
    Metric("peak_mib", "peak memory, MiB", -1, 1, 0, "Of the process, or of CUDA's allocator."),
)

SHAPES = Measures(
    "Methods of score distillation, compared with the model pocket-shapes",
    _SHAPES,
    (_SHAPES[0], _SHAPES[2]),
    Metric("frechet", "Fréchet distance", -1, 1, 2),
)
OBJECTS = Measures(
    "Methods of score distillation, compared with the true objects",
    _OBJECTS,
    (_OBJECTS[0], _OBJECTS[3]),
)


def measures_of(rows: Sequence[dict]) -> Measures:
    """Those of the world whose columns a table's rows have."""
    return OBJECTS if any("psnr" in row for row in rows) else SHAPES
