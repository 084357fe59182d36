"""Delta denoising score (DDS, arXiv:2304.07090)."""

from dataclasses import dataclass
from typing import Annotated

from lods import scores
from lods.methods.editing import EditMethod
from lods.methods.registry import register


@register("lods-dds")
class DDS(EditMethod):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - cfg_s(eps(x'_t; y'), eps(x'_t; n)) ],

    with x'_t the source under the same noise, and y' its text. What SDS does wrong at the source is
    taken off. Published for pictures of 512 pixels: w = 1, s = 7.5, t from 50 to 950, 200 steps of
    SGD from the source's latents. Their rate, 0.1 of 2000 times a mean over the 4 x 64 x 64 numbers
    of the latents, is 0.0122 of the gradient as it is here. Nothing is learned.
    """

    @dataclass
    class Config(EditMethod.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5

    cfg: Config

    grows_with_scale = True

    def gradient(self, x_t, t, eps, conditions):
        x_source = self.noised_source(t, eps, conditions)
        here, there = self.compared(x_t, x_source, t, conditions, conditions.null)
        (eps_c, eps_u), (source_c, source_u) = here, there
        s, w = self.cfg.guidance_scale, self.weight(t)
        return scores.dds(eps_c, eps_u, source_c, source_u, s, w)
