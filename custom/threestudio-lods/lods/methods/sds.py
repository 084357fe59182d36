"""Plain score distillation sampling, the baseline (DreamFusion, arXiv:2209.14988)."""

from dataclasses import dataclass
from typing import Annotated

from lods import scores
from lods.methods.base import Method
from lods.methods.reconstruction import Rescaling, rescaled
from lods.methods.registry import register


@register("lods-sds")
class SDS(Method):
    """g = w(t) [ eps_u + s (eps_c - eps_u) - eps ], with eps_u under the negative prompt.

    Nothing is learned. This is s times the gradient that the LODS methods have for the same
    ``guidance_scale``: with Adam that hardly matters, but a ``grad_clip`` and the weights of other
    losses mean something else. ``recon_std_rescale``: see :func:`lods.scores.std_rescale`.
    """

    @dataclass
    class Config(Rescaling, Method.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5

    cfg: Config

    grows_with_scale = True

    def gradient(self, x_t, t, eps, conditions):
        eps_c, eps_u = self.predict(x_t, t, conditions, conditions.prompt, conditions.null)
        s = self.cfg.guidance_scale
        found = scores.sds(eps_c, eps_u, eps, s, self.weight(t))
        return rescaled(self, found, x_t, t, eps_c, eps_u, times=s)
