"""Score distillation via inversion (SDI, arXiv:2405.15891)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from lods import scores
from lods.methods.inversion import ddim_invert
from lods.methods.registry import register
from lods.methods.sds import SDS


@register("lods-sdi")
class SDI(SDS):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps ], as SDS, but eps is not drawn: x_t is
    found by DDIM inversion of the latents z under cfg_r(eps(.; y), eps(.; n)), in
    ``inversion_steps`` equal steps from 0 to t, and eps = (x_t - alpha_t z) / sigma_t.

    r = ``inversion_scale`` is -7.5 in the paper. Its published code counts the scale from the
    prompt (its -7.5 is -6.5 here), inverts on a fixed grid of timesteps to a little beyond t, and
    weighs with sigma_t / alpha_t; here w(t) is that of all methods. The paper lets t fall over the
    run: ``timestep_schedule`` monotone is near to that. Nothing is learned; a step costs
    ``inversion_steps`` more calls of the model.
    """

    @dataclass
    class Config(SDS.Config):
        # steps and guidance scale of the inversion, and the part of the noise of a DDPM step that
        # each of them adds
        inversion_steps: Annotated[int, "[1, 10000]"] = 10
        inversion_scale: Annotated[float, "[-1e6, 1e6]"] = -7.5
        inversion_eta: Annotated[float, "[0, 1]"] = 0.3

    cfg: Config

    def diffuse(self, latents, t, conditions):
        def predict(x, t):
            eps_c, eps_u = self.predict(x, t, conditions, conditions.prompt, conditions.null)
            return scores.cfg(eps_c, eps_u, self.cfg.inversion_scale)

        n = self.cfg.inversion_steps
        part = torch.arange(n + 1, device=t.device)[:, None] / n
        steps = (t * part).round().long()
        schedule = self.model.schedule
        x_t = ddim_invert(schedule, predict, latents, steps, self.cfg.inversion_eta)
        return x_t, self.model.noise_of(x_t, latents, t)
