"""Which Gaussians some words mean: what a model sees in views of them, traced back to each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.edits.region import word_map
from lods.methods.conditions import Conditions
from lods.models.base import Model
from torch import Tensor

Draw = Callable[[Float[Tensor, "N 3"], Any], Float[Tensor, "H W C"]]


def traced(
    draw: Draw, count: int, maps: Sequence[Float[Tensor, "H W"]], views: Sequence[Any]
) -> Float[Tensor, " N"]:
    """The mean of a map of each view over the pixels of each Gaussian, weighted by its part in the
    pixel (as GaussianEditor traces masks, arXiv:2311.14521); 0 for one that is in no view.

    ``draw(colors, view)`` renders ``count`` Gaussians of these colours before nothing. A picture is
    linear in them, so that the weights are its gradients: none is approximated.
    """
    seen = torch.zeros(count, 2, device=maps[0].device)
    for found, view in zip(maps, views):
        colors = torch.zeros(count, 3, device=found.device, requires_grad=True)
        with torch.enable_grad():
            picture = draw(colors, view)
            total = (picture[..., 0] * found).sum() + picture[..., 1].sum()
        seen += torch.autograd.grad(total, colors)[0][:, :2]
    return seen[:, 0] / seen[:, 1].clamp_min(1e-12)


def maps_of_words(
    model: Model,
    words: str,
    latents: Sequence[Float[Tensor, "1 c h w"]],
    conditions: Sequence[Conditions],
    size: tuple[int, int],
) -> list[Float[Tensor, "H W"]]:
    """:func:`lods.edits.region.word_map` of each view, with ``size`` (H, W) pixels. They are the
    same at every call, and leave the random state alone."""
    text = model.text([words]).to(model.device)
    found = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        for z, each in zip(latents, conditions):
            coarse = word_map(model, z, text, each)
            options = {"mode": "bilinear", "align_corners": False}
            found.append(F.interpolate(coarse[None, None], size, **options)[0, 0])
    return found
