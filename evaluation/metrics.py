"""Metrics of a run's pictures: pure functions of arrays. Rates and accuracies are in 0..1."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

from pocket.frechet import frechet
from pocket.shapes.data import VIEWS
from pocket.shapes.scenes import KINDS

__all__ = ["accuracy", "clip_score", "frechet", "janus_rate", "judged", "silhouette_iou"]

FRONT = VIEWS.index("front")
# what CLIP's image tower was trained on (arXiv:2103.00020)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def accuracy(said: Int[np.ndarray, " V"], wanted: int) -> float:
    """The share of views of which ``wanted`` was said."""
    return float((np.asarray(said) == wanted).mean())


def janus_rate(view: Int[np.ndarray, " V"], azimuth: Float[np.ndarray, " V"]) -> float:
    """Of the views from behind, the share in which a front is seen: of an object with one front,
    that looks along azimuth 0 as the captions have it, none should be.

    ``view`` is the judge's, an index of ``VIEWS``; ``azimuth`` in degrees; behind is more than
    90 degrees from the front. NaN if there is no such view.
    """
    away = np.abs((np.asarray(azimuth) + 180.0) % 360.0 - 180.0)
    behind = away > 90.0 + 1e-6
    return float((np.asarray(view)[behind] == FRONT).mean()) if behind.any() else float("nan")


def silhouette_iou(
    mask: Bool[np.ndarray, "V H W"], true: Bool[np.ndarray, "S V H W"] | Bool[np.ndarray, "V H W"]
) -> float:
    """Mean over the V views of |A and B| / |A or B| (1 where both are empty), the best of S true
    shapes and of V turns about the vertical.

    Views are evenly around the object at one elevation, so that turning it by one view's angle is
    the same as shifting the order of the views.
    """
    mask = np.asarray(mask, bool)
    views = len(mask)
    a = mask.reshape(views, -1).astype(np.float32)
    best = 0.0
    for shape in np.asarray(true, bool).reshape(-1, *mask.shape):
        b = shape.reshape(views, -1).astype(np.float32)
        both = a @ b.T  # view i of the one against view j of the other
        either = a.sum(1)[:, None] + b.sum(1) - both
        ratio = np.where(either > 0, both / np.maximum(either, 1), 1.0)
        i = np.arange(views)
        best = max(best, *(float(ratio[i, (i + turn) % views].mean()) for turn in range(views)))
    return best


def judged(
    said: dict[str, np.ndarray],
    kind: int,
    color: int,
    azimuth: Float[np.ndarray, " V"] | None,
    true_features: Float[np.ndarray, "M D"],
) -> dict[str, float]:
    """The metrics that need the judge's ``verdict`` on V views only. ``color`` -1: none was asked
    for; ``azimuth`` None: not views of one object. What does not apply is NaN.

    ``frechet`` compares the V views with M true pictures. Few pictures bias it upward, for all
    methods alike where V is: the rows of true renders are the floor that can be reached. It does
    not apply to views of one object whose kind has colours of which none was asked for: true
    objects of several colours are as far from each other as from wrong ones.
    """
    front = azimuth is not None and KINDS[kind].front
    any_color = azimuth is not None and KINDS[kind].natural is not None and color < 0
    return {
        "object_accuracy": accuracy(said["kind"], kind),
        "color_accuracy": accuracy(said["color"], color) if color >= 0 else float("nan"),
        "frechet": float("nan") if any_color else frechet(true_features, said["features"]),
        "janus_rate": janus_rate(said["view"], azimuth) if front else float("nan"),
    }


@torch.no_grad()
def clip_score(model, tokenizer, images: Float[torch.Tensor, "V 3 H W"], prompt: str) -> float:
    """100 max(cos(image, prompt), 0) of a transformers ``CLIPModel``, mean over V pictures in 0..1
    (CLIPScore, arXiv:2104.08718, without its factor 2.5)."""
    size = model.config.vision_config.image_size
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    text = tokenizer(
        [prompt],
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    out = model(
        input_ids=text.input_ids.to(model.device),
        attention_mask=text.attention_mask.to(model.device),
        pixel_values=((x - mean) / std).to(model.device),
    )
    return float(100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0).mean())
