"""Classifier score distillation (CSD, arXiv:2310.19415)."""

from dataclasses import dataclass

from jaxtyping import Float
from lods import scores as formulas
from lods.methods.base import BaseGuidance
from torch import Tensor

import threestudio


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
