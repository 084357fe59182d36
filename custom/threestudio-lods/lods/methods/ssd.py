"""Stable score distillation (SSD, ICCV 2025)."""

from dataclasses import dataclass
from typing import Annotated, Any

from lods import scores
from lods.methods.editing import EditMethod
from lods.methods.registry import register


@register("lods-ssd")
class SSD(EditMethod):
    """Four differences, of the picture x_t and the source x'_t under the texts y, y' and n:

    g = w(t) [ a (eps(x_t; y') - eps(x'_t; y'))                                keep what it is
             + s (eps(x_t; y) - eps(x_t; y'))                                  edit
             + b (eps(x_t; y) - eps(x_t; n) - (eps(x'_t; y') - eps(x'_t; n)))  strengthen
             + k exp(t / T) (x_t - x'_t) ]                                     stay at the source

    with a = ``ssd_anchor_scale``, s = ``guidance_scale``, b = ``ssd_enhance_scale`` and
    k = ``ssd_keep_scale``. The published code (Alex-Zhu1/SSD) has a = 1, s = 3.75, b = 5.5,
    k = 0.075, w = 1, and two terms that are not 0 where nothing is to be changed:
    eps(x'_t; n) in the first, and no source in the third. With ``ssd_published`` they are as there;
    picture and texts that are the source's are then sharpened, by 6.5 (eps(x; y) - eps(x; n)). Its
    change to the UNet's skip connections (FreeU) is left out. A step costs three calls of 2 B rows.
    Nothing is learned.
    """

    @dataclass
    class Config(EditMethod.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 3.75
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.02
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.98
        ssd_anchor_scale: Annotated[float, "[0, 1e6]"] = 1.0
        ssd_enhance_scale: Annotated[float, "[0, 1e6]"] = 5.5
        ssd_keep_scale: Annotated[float, "[0, 1e6]"] = 0.075
        ssd_published: bool = False

    cfg: Config

    grows_with_scale = True

    def gradient(self, x_t, t, eps, conditions):
        cfg, y_source = self.cfg, conditions.others["edited"]
        x_source = self.noised_source(t, eps, conditions)
        (eps_c, eps_u), there = self.compared(x_t, x_source, t, conditions, conditions.null)
        eps_source, _ = self.at_source(x_t, t, conditions, y_source, conditions.null)
        anchor, extra = there[0], there[0] - there[1]
        if cfg.ssd_published:
            anchor, extra = there[1], 0 * extra
        scales = cfg.ssd_anchor_scale, cfg.guidance_scale, cfg.ssd_enhance_scale
        w = self.weight(t)
        moved = scores.ssd(eps_c, eps_u, eps_source, anchor, extra, scales, w)
        keep = cfg.ssd_keep_scale * w * (t / self.model.schedule.steps).exp()
        return moved + scores.rows(keep, x_t) * (x_t - x_source)
