"""Noise-free score distillation (NFSD, arXiv:2310.17590)."""

from dataclasses import dataclass
from typing import Annotated

from lods import scores
from lods.methods.base import Method
from lods.methods.registry import register


@register("lods-nfsd")
class NFSD(Method):
    """g = w(t) [ delta_D + s delta_C ], the paper's two directions without the noise:

    - delta_C = eps(x_t; y) - eps(x_t; n) towards the prompt, n the negative prompt;
    - delta_D towards real pictures: eps(x_t; n) for t < ``nfsd_threshold`` T, where a model's
      prediction holds hardly any noise of its own, else eps(x_t; n) - eps(x_t; bad), with a text
      of bad pictures.

    All three are rows of one call of the model. Nothing is learned.
    """

    @dataclass
    class Config(Method.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5
        # the part of the timesteps below which t counts as small
        nfsd_threshold: Annotated[float, "[0, 1]"] = 0.2

    cfg: Config

    grows_with_scale = True
    other_texts = ("bad",)

    def gradient(self, x_t, t, eps, conditions):
        texts = conditions.prompt, conditions.null, conditions.others["bad"]
        eps_c, eps_u, eps_bad = self.predict(x_t, t, conditions, *texts)
        low = t < self.cfg.nfsd_threshold * self.model.schedule.steps
        scale = self.cfg.guidance_scale
        return scores.nfsd(eps_c, eps_u, eps_bad, low, scale, self.weight(t))
