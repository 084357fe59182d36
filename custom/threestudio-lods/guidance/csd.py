"""Classifier score distillation (CSD, arXiv:2310.19415)."""

from dataclasses import dataclass

import threestudio
from threestudio.utils.typing import *

from . import formulas
from .base import BaseGuidance


@threestudio.register("lods-csd-guidance")
class CSDGuidance(BaseGuidance):
    """g = w(t) [ eps(x_t; y) - eps(x_t; n) ], n the negative prompt.

    Only the part of SDS that the prompt is responsible for: SDS / s for s = inf. Nothing is learnt,
    and ``guidance_scale`` has no use.
    """

    @dataclass
    class Config(BaseGuidance.Config):
        pass

    cfg: Config

    def gradient(self, x_t, t, eps, prompt, null) -> Float[Tensor, "B c h w"]:
        eps_c, eps_u = self.predict_pair(x_t, t, prompt, null)
        return formulas.csd(eps_c, eps_u, self.weight(t))
