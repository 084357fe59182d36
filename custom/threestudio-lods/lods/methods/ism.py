"""Interval score matching (ISM; LucidDreamer, arXiv:2311.11284)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from lods import scores as formulas
from lods.methods.inversion import ddim_invert
from lods.methods.sds import SDSGuidance
from torch import Tensor

import threestudio


@threestudio.register("lods-ism-guidance")
class ISMGuidance(SDSGuidance):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps(x_s; n) ],  s = t - ``ism_delta_t``:

    x_s by DDIM inversion of the latents under the negative prompt n (empty in the paper), in steps
    of ``ism_delta_s`` timesteps of which the last may be shorter, and x_t by one more step, from
    x_s, and s no less than 0. Nothing is drawn but t, and nothing is learnt. A step costs up to
    T / ``ism_delta_s`` + 1 more calls of the UNet, of half the rows. The published code weighs by
    sqrt((1 - abar) / abar), lets ``ism_delta_t`` fall over the first steps, and may invert under
    another text than the negative prompt.
    """

    @dataclass
    class Config(SDSGuidance.Config):
        pass

    cfg: Config

    def check(self) -> None:
        super().check()
        for field in ("ism_delta_t", "ism_delta_s"):
            if self.cfg[field] < 1:
                raise ValueError(f"{field} is a number of timesteps, 1 or more")

    def diffuse(
        self, latents, t, prompt, null
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        def predict(x, t):
            return self.denoiser.predict_noise(x, t, null)

        s = (t - self.cfg.ism_delta_t).clamp_min(0)
        count = max(-(-int(s.max()) // self.cfg.ism_delta_s), 1)
        grid = self.cfg.ism_delta_s * torch.arange(count + 1, device=t.device)[:, None]
        x_s = ddim_invert(self.denoiser, predict, latents, torch.minimum(grid, s))
        eps = predict(x_s, s)
        alpha_sigma = self.denoiser.alpha_sigma
        return formulas.ddim(x_s, eps, alpha_sigma(s), alpha_sigma(t)), eps
