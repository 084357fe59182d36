"""Score distillation via inversion (SDI, arXiv:2405.15891)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from lods import scores as formulas
from lods.methods.inversion import ddim_invert
from lods.methods.sds import SDSGuidance
from torch import Tensor

import threestudio


@threestudio.register("lods-sdi-guidance")
class SDIGuidance(SDSGuidance):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps ], as SDS, but eps is not drawn: x_t is
    found by DDIM inversion of the latents z under cfg_r(eps(.; y), eps(.; n)), in
    ``inversion_steps`` equal steps from 0 to t, and eps = (x_t - alpha_t z) / sigma_t.

    r = ``inversion_scale`` is -7.5 in the paper. Its published code counts the scale from the
    prompt (its -7.5 is -6.5 here), inverts on a fixed grid of timesteps to a little beyond t, and
    weighs with sigma_t / alpha_t; here w(t) is that of all priors. The paper lets t fall over the
    run: ``timestep_schedule`` monotone is near to that. Nothing is learnt; a step costs
    ``inversion_steps`` more calls of the UNet.
    """

    @dataclass
    class Config(SDSGuidance.Config):
        pass

    cfg: Config

    def check(self) -> None:
        super().check()
        if self.cfg.inversion_steps < 1:
            raise ValueError(f"inversion_steps must be 1 or more, not {self.cfg.inversion_steps}")
        if not 0 <= self.cfg.inversion_eta <= 1:
            raise ValueError(f"inversion_eta must be 0 to 1, not {self.cfg.inversion_eta}")
        if not math.isfinite(self.cfg.inversion_scale):
            raise ValueError(f"inversion_scale must be finite, not {self.cfg.inversion_scale}")

    def diffuse(
        self, latents, t, prompt, null
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        def predict(x, t):
            eps_c, eps_u = self.predict_pair(x, t, prompt, null)
            return formulas.cfg(eps_c, eps_u, self.cfg.inversion_scale)

        n = self.cfg.inversion_steps
        part = torch.arange(n + 1, device=t.device)[:, None] / n
        steps = (t * part).round().long()
        x_t = ddim_invert(self.denoiser, predict, latents, steps, self.cfg.inversion_eta)
        return x_t, self.denoiser.noise_of(x_t, latents, t)
