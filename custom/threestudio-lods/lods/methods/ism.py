"""Interval score matching (ISM; LucidDreamer, arXiv:2311.11284)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from lods import scores
from lods.methods.inversion import ddim_invert
from lods.methods.registry import register
from lods.methods.sds import SDS


@register("lods-ism")
class ISM(SDS):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps(x_s; n) ],  s = t - ``ism_delta_t``:

    x_s by DDIM inversion of the latents under the negative prompt n (empty in the paper), in steps
    of ``ism_delta_s`` timesteps of which the last may be shorter, and x_t by one more step, from
    x_s, and s no less than 0. Nothing is drawn but t, and nothing is learned. A step costs up to
    T / ``ism_delta_s`` + 1 more calls of the model, of half the rows. The published code weighs by
    sqrt((1 - abar) / abar), lets ``ism_delta_t`` fall over the first steps, and may invert under
    another text than the negative prompt.
    """

    @dataclass
    class Config(SDS.Config):
        # timesteps between the two predictions, and in a step of the inversion
        ism_delta_t: Annotated[int, "[1, 100000]"] = 50
        ism_delta_s: Annotated[int, "[1, 100000]"] = 200

    cfg: Config

    def diffuse(self, latents, t, conditions):
        def predict(x, t):
            return self.model.predict(x, t, conditions.null, conditions.cameras)

        s = (t - self.cfg.ism_delta_t).clamp_min(0)
        count = max(-(-int(s.max()) // self.cfg.ism_delta_s), 1)
        grid = self.cfg.ism_delta_s * torch.arange(count + 1, device=t.device)[:, None]
        x_s = ddim_invert(self.model.schedule, predict, latents, torch.minimum(grid, s))
        eps = predict(x_s, s)
        alpha_sigma = self.model.schedule.alpha_sigma
        return scores.ddim(x_s, eps, alpha_sigma(s), alpha_sigma(t)), eps
