"""Plain score distillation sampling, the baseline (DreamFusion, arXiv:2209.14988)."""

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from lods import scores as formulas
from lods.methods.base import BaseGuidance
from torch import Tensor

import threestudio


@threestudio.register("lods-sds-guidance")
class SDSGuidance(BaseGuidance):
    """g = w(t) [ eps_u + s (eps_c - eps_u) - eps ], with eps_u under the negative prompt.

    Nothing is learnt. This is s times the gradient that the LODS priors have for the same
    ``guidance_scale``: with Adam that hardly matters, but a ``grad_clip`` and the weights of other
    losses mean something else.
    """

    @dataclass
    class Config(BaseGuidance.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5

    cfg: Config
    finite_scale = True

    def gradient(self, x_t, t, eps, prompt, null) -> Float[Tensor, "B c h w"]:
        eps_c, eps_u = self.predict_pair(x_t, t, prompt, null)
        return formulas.sds(eps_c, eps_u, eps, self.cfg.guidance_scale, self.weight(t))
