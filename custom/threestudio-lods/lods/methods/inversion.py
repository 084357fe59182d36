"""DDIM inversion: which noisy latents a deterministic sampler would reach clean ones from."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float, Int
from lods import scores
from lods.methods.conditions import Conditions
from lods.models.base import Schedule
from torch import Tensor

if TYPE_CHECKING:
    from lods.methods.base import Method


@dataclass
class Inversion:
    """Settings of methods whose noise is found by an inversion under two texts."""

    # steps and guidance scale of the inversion, and the part of the noise of a DDPM step that each
    # of them adds
    inversion_steps: Annotated[int, "[1, 10000]"] = 10
    inversion_scale: Annotated[float, "[-1e6, 1e6]"] = -7.5
    inversion_eta: Annotated[float, "[0, 1]"] = 0.3


def inverted(
    method: "Method",
    latents: Float[Tensor, "B c h w"],
    t: Int[Tensor, " B"],
    conditions: Conditions,
) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
    """(x_t, eps) of the latents z for a method with the settings of :class:`Inversion`: x_t under
    cfg_r(eps(.; y), eps(.; n)), in ``inversion_steps`` equal steps of the timestep from 0 to t, and
    eps = (x_t - alpha_t z) / sigma_t; r = ``inversion_scale``."""
    cfg: Any = method.cfg

    def predict(x: Tensor, t: Tensor) -> Tensor:
        eps_c, eps_u = method.predict(x, t, conditions, conditions.prompt, conditions.null)
        return scores.cfg(eps_c, eps_u, cfg.inversion_scale)

    n = cfg.inversion_steps
    part = torch.arange(n + 1, device=t.device)[:, None] / n
    steps = (t * part).round().long()
    x_t = ddim_invert(method.model.schedule, predict, latents, steps, cfg.inversion_eta)
    return x_t, method.model.noise_of(x_t, latents, t)


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
