"""Probability-flow distillation (PFD, arXiv:2605.09071)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from lods import scores
from lods.methods.base import Method
from lods.methods.inversion import Inversion, inverted
from lods.methods.registry import register
from lods.methods.sampling import denoised


@register("lods-pfd")
class PFD(Method):
    """g = z - z': the latents z go to x_t by DDIM inversion under cfg_r(eps(.; y), eps(.; n)), and
    from there to clean ones, z', by K = ``pfd_steps`` steps of DDIM under cfg_s, the way of the
    probability-flow ODE. The first way is that of what is rendered, the second that of the prompt;
    where both are the same and the steps small, z' is z.

    SDI is this with K = 1, where z' is the clean latents that one prediction means. As there r =
    ``inversion_scale`` is below 0, 1 - s in the paper: for what is rendered, prompt and null prompt
    change places. With another ``weighting_strategy`` than ``latent`` g is w_latent(t) (z - z').

    Of the paper are the gradient, the scales and the range of t, whose upper end it takes down to
    0.7 late in a run (``max_step_percent=[start, 0.98, 0.7, end]``). It integrates the way back by
    a solver of second order (DPM-Solver++); here both ways are steps of DDIM, equal in t, as many
    as SDI inverts with. Nothing is learned; a step costs ``inversion_steps`` + K calls of the
    model.
    """

    grows_with_scale = True

    @dataclass
    class Config(Inversion, Method.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5
        inversion_scale: Annotated[float, "[-1e6, 1e6]"] = -6.5
        inversion_eta: Annotated[float, "[0, 1]"] = 0.0
        weighting_strategy: Annotated[str, scores.WEIGHTINGS] = "latent"
        pfd_steps: Annotated[int, "[1, 10000]"] = 10

    cfg: Config

    def diffuse(self, latents, t, conditions):
        return inverted(self, latents, t, conditions)

    def gradient(self, x_t, t, eps, conditions):
        def predict(x, t):
            eps_c, eps_u = self.predict(x, t, conditions, conditions.prompt, conditions.null)
            return scores.cfg(eps_c, eps_u, self.cfg.guidance_scale)

        left = 1 - torch.arange(self.cfg.pfd_steps, device=t.device)[:, None] / self.cfg.pfd_steps
        end = denoised(self.model.schedule, predict, x_t, (t * left).round().long())
        # w (eps' - eps) with eps' the noise for which x_t is made of z' is w_latent (z - z')
        weight = scores.rows(self.weight(t), x_t)
        return weight * (self.model.noise_of(x_t, end, t) - eps)
