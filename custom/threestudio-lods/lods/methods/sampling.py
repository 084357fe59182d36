"""From noisy latents to clean ones, by the model's own sampler."""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from lods import scores
from lods.models.base import Model, Schedule
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


def denoised(
    schedule: Schedule,
    predict: Predict,
    x: Float[Tensor, "B c h w"],
    steps: Int[Tensor, "K B"],
) -> Float[Tensor, "B c h w"]:
    """Clean latents from those at the timesteps ``steps[0]``, by K steps of DDIM without noise
    (arXiv:2010.02502): through the timesteps ``steps``, which fall for each row, and from the last
    of them to alpha = 1, sigma = 0. For a rectified flow these are steps of Euler."""
    levels = [schedule.alpha_sigma(t) for t in steps]
    levels.append((torch.ones_like(levels[0][0]), torch.zeros_like(levels[0][1])))
    for t, (now, then) in zip(steps, itertools.pairwise(levels)):
        x = scores.ddim(x, predict(x, t), now, then)
    return x


def image_to_image(
    model: Model,
    predict: Predict,
    latents: Float[Tensor, "B c h w"],
    t: Int[Tensor, " B"],
    whole: int,
) -> Float[Tensor, "B c h w"]:
    """The latents noised to the timesteps t with fresh noise, and denoised again (SDEdit,
    arXiv:2108.01073): what is finer than the noise is made anew, the rest stays. t / T, with T the
    model's number of timesteps, is the strength of diffusers' pipelines.

    ``whole``: the number of steps that a whole sampling would take, of which the share max(t) / T
    is taken, rounded up; a row with a smaller t takes as many smaller ones.
    """
    eps = torch.randn_like(latents, memory_format=torch.contiguous_format)
    x = model.add_noise(latents, eps, t)
    T = model.schedule.steps
    count = max(1, -(-int(t.max()) * whole // T))
    left = 1 - torch.arange(count, device=t.device)[:, None] / count
    return denoised(model.schedule, predict, x, (t * left).round().long())
