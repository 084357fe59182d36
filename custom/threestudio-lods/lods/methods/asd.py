"""Asynchronous score distillation (ASD; ScaleDreamer, arXiv:2407.02040)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Int
from lods import scores
from lods.methods.registry import register
from lods.methods.sds import SDS
from lods.models.base import views_of
from torch import Tensor


@register("lods-asd")
class ASD(SDS):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps(x_{t+d}; y) ], with the same noise in x_t
    and in x_{t+d}, and d = r ``asd_shift`` (t - t_min), r uniform in 0..1 (or 1 without
    ``asd_random_shift``), cut to a timestep that there is.

    The frozen model's own prediction at a higher noise takes the place of the fine-tuned one of
    VSD, whose error on the renders is smaller too: nothing is learned. The published runs with
    Stable Diffusion have the scale 7.5 and ``asd_shift`` 0.1; their code can draw r or leave it
    out. A step costs one more call of the model, of half the rows.
    """

    @dataclass
    class Config(SDS.Config):
        # the greatest d, as a part of t - t_min
        asd_shift: Annotated[float, "[0, 1000]"] = 0.1
        asd_random_shift: bool = True

    cfg: Config

    unread = ("recon_std_rescale",)

    def own_gradient(self, latents, t, conditions):
        x_t, eps = self.diffuse(latents, t, conditions)
        later = self.later(t)
        x_later = self.model.add_noise(latents, eps, later)
        eps_c, eps_u = self.predict(x_t, t, conditions, conditions.prompt, conditions.null)
        eps_later = self.model.predict(x_later, later, conditions.prompt, conditions.cameras)
        return scores.sds(eps_c, eps_u, eps_later, self.cfg.guidance_scale, self.weight(t))

    def later(self, t: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """t + d of each row."""
        d = self.cfg.asd_shift * (t - self.min_step).clamp_min(0)
        if self.cfg.asd_random_shift:
            views = views_of(self.model)
            d = d * torch.rand(len(t) // views, device=t.device).repeat_interleave(views)
        return (t + d.long()).clamp_max(self.model.schedule.steps - 1)
