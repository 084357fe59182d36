"""LODS with a learnt LoRA as the null prediction (arXiv:2312.04820)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lods import scores as formulas
from lods.learned.lora import RowLora
from lods.methods.base import BaseGuidance
from lods.methods.options import LORA_FIELDS, check_lora_scale, unread
from lods.models.cards import canonical
from torch import Tensor

import threestudio

# what a model for the learnt prediction must share with the other
ALIKE = ("latent_channels", "latent_size", "text_width", "pooled_width", "num_train_timesteps")


@threestudio.register("lods-lora-guidance")
class LODSLoRAGuidance(BaseGuidance):
    """g = w(t) [ eps(x_t; y) - eps / s + (1 - s) / s eps_lora(x_t; n) ], n the negative prompt.

    eps is the frozen model, eps_lora the same with its LoRA at strength ``lora_scale``, learnt by
    ``loss_lora`` = mean (eps_lora(x_t'; n) - eps')^2 over what is being rendered. Both are rows of
    one UNet call, unless ``pretrained_model_name_or_path_lora`` names another model.
    """

    @dataclass
    class Config(BaseGuidance.Config):
        def contradictions(self):
            """See :class:`BaseGuidance`."""
            if self.lora_scale == 0:
                yield "lora_scale", "must not be 0: the LoRA would never act, nor learn"

    cfg: Config
    without_effect = unread("prompt_scale", "lora_n_timestamp_samples", *LORA_FIELDS)

    def check(self) -> None:
        super().check()
        check_lora_scale(self.cfg.lora_scale)

    def create_learned(self) -> None:
        other = self.cfg.pretrained_model_name_or_path_lora
        if not other or canonical(other) == canonical(self.cfg.pretrained_model_name_or_path):
            self.denoiser_lora = self.denoiser
        else:
            self.denoiser_lora = self.load_denoiser(other, vae=self.denoiser.vae)
            self._check_alike(other)
        self.lora = RowLora(self.denoiser_lora.unet, self.cfg.lora_rank)
        self.unscale_gradients(self.lora.parameters())

    def recompute_context(self) -> Callable[[], Any]:
        return self.lora.same_strength()

    def _check_alike(self, other: str) -> None:
        one, two = self.denoiser, self.denoiser_lora
        for what in ALIKE:
            if getattr(one, what) != getattr(two, what):
                raise ValueError(
                    f"pretrained_model_name_or_path_lora {other!r} does not fit: its {what} is "
                    f"{getattr(two, what)}, not {getattr(one, what)}"
                )
        if not torch.allclose(one.alphas_cumprod, two.alphas_cumprod, atol=1e-4):
            raise ValueError(
                f"pretrained_model_name_or_path_lora {other!r} does not fit: its noise schedule "
                "is another"
            )

    def learn(self, latents, prompt, null) -> dict[str, Float[Tensor, ""]]:
        null = null.repeat(self.cfg.lora_n_timestamp_samples, 1, 1)
        return {
            "loss_lora": self.denoising_loss(
                latents, lambda x_t, t: self.predict_learnt(x_t, t, null)
            )
        }

    def predict_learnt(self, x_t, t, text) -> Float[Tensor, "B c h w"]:
        """eps_lora under ``text``, in a call of its own."""
        with self.lora.strength(self.cfg.lora_scale):
            return self.denoiser_lora.predict_noise(x_t, t, text)

    def strengths(self, x_t: Float[Tensor, "B c h w"], place: int) -> Float[Tensor, " N"]:
        """For a call of ``predict_pair``: the LoRA in the rows of text number ``place`` only."""
        rows = x_t.new_zeros(place + 1 + len(self._negatives), len(x_t))
        rows[place] = self.cfg.lora_scale
        return rows.flatten()

    def predict_pair(self, x_t, t, prompt, null) -> tuple[Float[Tensor, "B c h w"], ...]:
        """(eps under the prompt, LoRA off; eps_lora under the null prompt)."""
        if self.denoiser_lora is not self.denoiser:
            eps_u = self.predict_learnt(x_t, t, null)
            eps_c, *negatives = self.predict(x_t, t, prompt, *self._negatives)
            return self.compose(eps_c, eps_u, negatives), eps_u
        with self.lora.strength(self.strengths(x_t, 1)):
            return super().predict_pair(x_t, t, prompt, null)

    def predict_three(self, x_t, t, prompt, null, text) -> tuple[Float[Tensor, "B c h w"], ...]:
        """(eps under the prompt and under the null prompt, LoRA off; eps_lora under ``text``)."""
        pair = super().predict_pair
        if self.denoiser_lora is not self.denoiser:
            return *pair(x_t, t, prompt, null), self.predict_learnt(x_t, t, text)
        with self.lora.strength(self.strengths(x_t, 2)):
            return pair(x_t, t, prompt, null, text)

    def gradient(self, x_t, t, eps, prompt, null) -> Float[Tensor, "B c h w"]:
        if self.cfg.prompt_scale == 1:
            eps_c, eps_u = self.predict_pair(x_t, t, prompt, null)
        else:
            eps_c, eps_n, eps_u = self.predict_three(x_t, t, prompt, null, null)
            eps_c = formulas.cfg(eps_c, eps_n, self.cfg.prompt_scale)
        return formulas.lods(eps_c, eps_u, eps, self.cfg.guidance_scale, self.weight(t))

    @property
    def learnt_on(self) -> str:
        other = self.cfg.pretrained_model_name_or_path_lora
        return canonical(other) if other else super().learnt_on

    def save_learned(self, path) -> Path:
        """Write the LoRA for ``load_lora_weights`` of diffusers' pipelines, at ``lora_scale``."""
        return self.lora.save(path, self.cfg.lora_scale, {"model": self.learnt_on})

    def load_learned(self, path) -> dict[str, str]:
        return self.lora.load(path, self.cfg.lora_scale)
