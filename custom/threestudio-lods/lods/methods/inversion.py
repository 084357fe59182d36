"""DDIM inversion: which noisy latents a deterministic sampler would reach clean ones from."""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from lods import scores
from lods.models.base import Schedule
from torch import Tensor


def ddim_invert(
    schedule: Schedule,
    predict: Callable[[Tensor, Tensor], Tensor],
    z: Float[Tensor, "B c h w"],
    steps: Int[Tensor, "K B"],
    eta: float = 0.0,
) -> Float[Tensor, "B c h w"]:
    """The latents at the timesteps ``steps[-1]``, from clean ones ``z``, by K - 1 steps of DDIM
    (arXiv:2010.02502) towards noise:

    x_{k+1} = alpha_{k+1} (x_k - sigma_k e) / alpha_k + sigma_{k+1} e,  e = predict(x_k, steps[k]),

    with x_0 = z, alpha_0 = 1 and sigma_0 = 0: the first row of ``steps`` is only what the model is
    told of z. Timesteps may stay (that changes nothing), not fall. With ``eta`` each x_{k+1} gets
    fresh noise, ``eta`` times the standard deviation that a DDPM step back to k would have.
    """
    x, now = z, (torch.ones_like(steps[0]).to(z), torch.zeros_like(steps[0]).to(z))
    for low, high in itertools.pairwise(steps):
        then = schedule.alpha_sigma(high)
        x = scores.ddim(x, predict(x, low), now, then)
        if eta:
            variance = (now[1] / then[1]) ** 2 * schedule.transition_variance(now, then)
            noise = torch.randn_like(x, memory_format=torch.contiguous_format)
            x = x + eta * scores.rows(variance.clamp_min(0).sqrt(), x) * noise
        now = then
    return x
