"""Unique couple matching (UCM; FlowDreamer, arXiv:2408.05008)."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from lods import scores
from lods.methods import predictions
from lods.methods.registry import register
from lods.methods.rfds import RFDS


@register("lods-ucm")
class UCM(RFDS):
    """RFDS, with the noise n that the model's own trajectory couples with z ("push-backward"):

    n = z + sum_k (s_{k+1} - s_k) v(x_k; y),  x_0 = z,  s_0 = 0 to s_K = 1 in K = ``ucm_steps``
    equal steps, without guidance, and g = cfg_s(v(x_t; y), v(x_t; n)) - (n - z) at
    x_t = alpha_t z + sigma_t n.

    In the first ``ucm_random_steps`` steps the noise is drawn, as in RFDS. As the noise that is in
    x_k, eps_k = x_k + (1 - s_k) v, a step of Euler is one of DDIM, and the last one leads to eps_k
    itself: so it is written here, and serves diffusions too, where the steps are equal in t. A step
    costs K more calls of the model, of half the rows. K and the scale are the published ones; the
    range of t is that of all methods. Nothing is learned.
    """

    @dataclass
    class Config(RFDS.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 60.0
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.98
        ucm_steps: Annotated[int, "[1, 1000]"] = 3
        ucm_random_steps: Annotated[int, "[0, 1e12]"] = 1800

    cfg: Config

    def diffuse(self, latents, t, conditions):
        if self.now < self.cfg.ucm_random_steps:
            return predictions.fresh_noise(self.model, latents, t)
        noise = self.coupled(latents, conditions)
        return self.model.add_noise(latents, noise, t), noise

    def coupled(self, latents, conditions):
        """n of these latents."""
        schedule, K = self.model.schedule, self.cfg.ucm_steps
        rows, device = len(latents), latents.device
        x, now = latents, (torch.ones(rows, device=device), torch.zeros(rows, device=device))
        eps, t = latents, torch.zeros(rows, dtype=torch.long, device=device)
        for k in range(K):
            eps = self.model.predict(x, t, conditions.prompt, conditions.cameras)
            t = torch.full_like(t, schedule.at((k + 1) / K))
            then = schedule.alpha_sigma(t)
            x, now = scores.ddim(x, eps, now, then), then
        return eps
