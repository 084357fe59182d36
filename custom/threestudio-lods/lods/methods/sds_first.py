"""Some steps of SDS before a method's own gradient: the layout is then that of SDS."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from lods import scores
from lods.methods import predictions, timesteps
from lods.methods.conditions import Conditions
from lods.models.base import views_of
from torch import Tensor

if TYPE_CHECKING:
    from lods.methods.base import Method


class SDSFirst:
    """The gradient of ``method``; in its first ``steps`` steps SDS over its scale instead,

    w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps ] / s,  s = ``scale``,

    times ``guidance_scale`` for a method whose gradient grows with that. The learned part learns
    from the first step on.
    """

    def __init__(self, method: "Method", steps: int, scale: float):
        self.method, self.steps, self.scale = (method,), steps, scale  # a tuple: no submodule

    @torch.no_grad()
    def __call__(
        self, latents: Float[Tensor, "B c h w"], conditions: Conditions
    ) -> Float[Tensor, "B c h w"]:
        (method,) = self.method
        bounds = method.min_step, method.max_step
        # a model that sees several views was trained with one t for them, and MVDream distils with
        # one for the batch
        views = views_of(method.model)
        t = timesteps.draw(
            method.cfg,
            bounds,
            method.now,
            len(latents) if views == 1 else 1,
            latents.device,
            method.model.schedule,
        ).expand(len(latents))
        if method.now >= self.steps:
            return method.own_gradient(latents, t, conditions)
        # with the frozen model's own two predictions, and new noise
        x_t, eps = predictions.fresh_noise(method.model, latents, t)
        eps_c, eps_u = predictions.predict(
            method.model, x_t, t, conditions, conditions.prompt, conditions.null
        )
        if method.sight is not None:
            texts = conditions.prompt, conditions.null
            method.sight.keep(x_t, t, conditions, texts, (eps_c, eps_u))
        raw = scores.lods(eps_c, eps_u, eps, self.scale, method.weight(t))
        # so that the next stage's is not s times as large
        return raw * method.cfg.guidance_scale if method.grows_with_scale else raw
