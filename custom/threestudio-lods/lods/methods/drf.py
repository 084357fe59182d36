"""Delta rectified flow (DVRF, arXiv:2509.05342)."""

from dataclasses import dataclass
from typing import Annotated, Any

from lods import log, schedules, scores
from lods.methods import predictions
from lods.methods.editing import EditMethod, source_of
from lods.methods.registry import register
from lods.scores import WEIGHTINGS


@register("lods-drf")
class DeltaFlow(EditMethod):
    """g = cfg_s(v(x_t; y), v(x_t; n)) - cfg_s'(v(x'_t; y'), v(x'_t; n)) + (1 - eta) (z - z'),

    the difference of velocities with the same noise, x'_t = (1 - s_t) z' + s_t eps, and
    x_t = (1 - s_t) z + s_t (eps + eta (z - z')): the picture is noised with eps + eta (z - z'), and
    the last term is what is then left of the difference of the true velocities, noise less picture.
    So, with w(t) = 1 / alpha_t ("velocity"),

    g = w(t) [ (eps_hat - eps - eta (z - z')) - (eps_hat' - eps) ],

    which diffusions have as well; with eta = 0 and s' = s it is DDS with another weight. On a
    diffusion that weight is large at high noise, and other methods do better: a warning says so.

    Published, for SD3: s = 16.5, s' = 6, t falls from 1 over 50 steps, eta rises from 0 to 1
    (``drf_shift=[0, 0.0, 1.0, 50]``), SGD with the rate 0.02. Here s' is s, unless set, so that
    nothing changes where nothing is to. Nothing is learned.
    """

    @dataclass
    class Config(EditMethod.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 16.5
        weighting_strategy: Annotated[str, WEIGHTINGS] = "velocity"
        # s' of the source's own guidance; null: guidance_scale
        drf_source_scale: Annotated[float | None, "(0, inf)"] = None
        # eta; schedules allowed
        drf_shift: Annotated[Any, "scheduled [0, 1]"] = 0.0

    cfg: Config

    grows_with_scale = True

    def __init__(self, model, config=None, **values):
        super().__init__(model, config, **values)
        if model.schedule.space != "velocity":
            log.warn(
                f"DeltaFlow is for flow models, and this one is {model.schedule.kind}: try DDS"
            )

    def step(self, step, epoch=0):
        super().step(step, epoch)
        self.eta = schedules.value_at(self.cfg.drf_shift, step, epoch)

    def own_gradient(self, latents, t, conditions):
        _, eps = predictions.fresh_noise(self.model, latents, t)
        shift = self.eta * (latents.detach() - source_of(conditions))
        x_t = self.model.add_noise(latents, eps + shift, t)
        x_source = self.noised_source(t, eps, conditions)
        (eps_c, eps_u), (source_c, source_u) = self.compared(
            x_t, x_source, t, conditions, conditions.null
        )
        s, s_source = self.cfg.guidance_scale, self.cfg.drf_source_scale
        guided = scores.cfg(eps_c, eps_u, s)
        source = scores.cfg(source_c, source_u, s if s_source is None else s_source)
        return scores.rows(self.weight(t), shift) * (guided - source - shift)
