"""Refining: renders are led to what the model makes of them, image to image."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from lods import scores
from lods.methods.base import Method
from lods.methods.inputs import resized
from lods.methods.registry import register
from lods.methods.sampling import image_to_image


@register("lods-refine")
class Refine(Method):
    """The second stage of DreamGaussian (arXiv:2309.16653): with x' = img2img(x), the render noised
    to t and denoised again under cfg_s(eps(.; y), eps(.; n)) (:mod:`lods.methods.sampling`),

    loss = 1/2 sum (x - stopgrad(x'))^2 / B

    over the pixels of the render x at the model's size; or, of latents, over z - z'. It sharpens
    what is there, as a texture that is fitted to it in some ten steps, and makes no new shape.

    The strength is t / T, drawn from the range of t that all methods have; here both ends fall
    from 0.2 to 0.05 over 50 steps. The published code counts it from the other end, as 0.8 to 0.95,
    in 50 iterations, with s = 100 and 50 steps of a whole sampling; its rate for the texture, 0.2,
    is of logits, which at mid grey is 0.05 of a colour. With another ``weighting_strategy`` than
    ``latent`` z' is z - w_latent(t) (z - z'). Nothing is learned; a step costs up to
    ``refine_steps`` max(t) / T calls of the model.
    """

    grows_with_scale = False

    @dataclass
    class Config(Method.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = (0, 0.2, 0.05, 50)
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = (0, 0.2, 0.05, 50)
        weighting_strategy: Annotated[str, scores.WEIGHTINGS] = "latent"
        # of a whole sampling, from pure noise
        refine_steps: Annotated[int, "[1, 10000]"] = 50

    cfg: Config

    _images: torch.Tensor | None = None  # of the call, at the model's size

    def latents_of(self, images):
        self._images = resized(images, self.model.image_size)
        # only SDS goes back through the encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.now < self.cfg.sds_steps):
            return self.model.encode(self._images)

    def own_gradient(self, latents, t, conditions):
        def predict(x, t):
            eps_c, eps_u = self.predict(x, t, conditions, conditions.prompt, conditions.null)
            return scores.cfg(eps_c, eps_u, self.cfg.guidance_scale)

        refined = image_to_image(self.model, predict, latents, t, self.cfg.refine_steps)
        alpha, sigma = self.model.schedule.alpha_sigma(t)
        weight = scores.rows(self.weight(t) * alpha / sigma, latents)
        return weight * (latents - refined)

    def pull(self, latents, target):
        images, self._images = self._images, None
        if images is None or self.now < self.cfg.sds_steps:
            return super().pull(latents, target)
        with torch.no_grad():
            refined = self.model.decode(target)
        return 0.5 * F.mse_loss(images, refined, reduction="sum") / len(images)
