"""A method of one's own as an extension: SDS with a share of its gradient."""

from dataclasses import dataclass
from typing import Annotated

from lods import scores
from lods.methods import Method, register


@register("halved")
class HalfSDS(Method):
    @dataclass
    class Config(Method.Config):
        share: Annotated[float, "(0, 1]"] = 0.5

    def gradient(self, x_t, t, eps, conditions):
        eps_c, eps_u = self.predict(x_t, t, conditions, conditions.prompt, conditions.null)
        scale = self.cfg.guidance_scale
        return self.cfg.share * scores.sds(eps_c, eps_u, eps, scale, self.weight(t))
