"""LODS with a learned LoRA as the null prediction (arXiv:2312.04820)."""

from dataclasses import dataclass
from typing import Annotated

from lods import scores
from lods.methods.learned_lora import LoraMethod
from lods.methods.reconstruction import Rescaling, rescaled
from lods.methods.registry import register


@register("lods-lora")
class LODSLora(LoraMethod):
    """g = w(t) [ eps(x_t; y) - eps / s + (1 - s) / s eps_lora(x_t; n) ], n the negative prompt.

    eps is the frozen model, eps_lora the same with its LoRA at strength ``lora_scale``, learned by
    ``loss_lora`` = mean (eps_lora(x_t'; n) - eps')^2 over what is being rendered.
    """

    @dataclass
    class Config(Rescaling, LoraMethod.Config):
        # r of cfg_r(eps(x_t; y), eps(x_t; n)), which takes the place of eps(x_t; y) as in VSD: the
        # renders then tend to samples with that guidance scale. 1: as published
        prompt_scale: Annotated[float, "(0, 1e6]"] = 1.0

    cfg: Config

    def learning_losses(self, latents, conditions):
        null = conditions.null.repeat(self.cfg.lora_n_timestamp_samples, 1, 1)
        cameras = self.cameras_of_draws(conditions)

        def predict(x_t, t):
            return self.predict_learned(x_t, t, null, cameras)

        return {"loss_lora": self.denoising_loss(latents, predict)}

    def gradient(self, x_t, t, eps, conditions):
        y, n = conditions.prompt, conditions.null
        if self.cfg.prompt_scale == 1:
            eps_c, eps_u = self.predict_with_lora(x_t, t, conditions, [y], n)
        else:
            eps_c, eps_n, eps_u = self.predict_with_lora(x_t, t, conditions, [y, n], n)
            eps_c = scores.cfg(eps_c, eps_n, self.cfg.prompt_scale)
        found = scores.lods(eps_c, eps_u, eps, self.cfg.guidance_scale, self.weight(t))
        return rescaled(self, found, x_t, t, eps_c, eps_u)
