"""Classifier score distillation (CSD, arXiv:2310.19415)."""

from lods import scores
from lods.methods.base import Method
from lods.methods.registry import register


@register("lods-csd")
class CSD(Method):
    """g = w(t) [ eps(x_t; y) - eps(x_t; n) ], n the negative prompt.

    Only the part of SDS that the prompt is responsible for: SDS / s for s = inf. Nothing is
    learned, and ``guidance_scale`` has no use.
    """

    def gradient(self, x_t, t, eps, conditions):
        eps_c, eps_u = self.predict(x_t, t, conditions, conditions.prompt, conditions.null)
        return scores.csd(eps_c, eps_u, self.weight(t))
