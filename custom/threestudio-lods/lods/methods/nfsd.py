"""Noise-free score distillation (NFSD, arXiv:2310.17590)."""

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from lods import scores as formulas
from lods.methods.base import BaseGuidance
from torch import Tensor

import threestudio


@threestudio.register("lods-nfsd-guidance")
class NFSDGuidance(BaseGuidance):
    """g = w(t) [ delta_D + s delta_C ], the paper's two directions without the noise:

    - delta_C = eps(x_t; y) - eps(x_t; n) towards the prompt, n the negative prompt;
    - delta_D towards real pictures: eps(x_t; n) for t < ``nfsd_threshold`` T, where a model's
      prediction holds hardly any noise of its own, else eps(x_t; n) - eps(x_t; bad), with
      ``prompt_processor.nfsd_negative_prompt`` as the text of bad pictures.

    All three are rows of one UNet call. Nothing is learnt.
    """

    @dataclass
    class Config(BaseGuidance.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 7.5

    cfg: Config
    finite_scale = True

    def check(self) -> None:
        super().check()
        if not 0 <= self.cfg.nfsd_threshold <= 1:
            raise ValueError(
                f"nfsd_threshold is a part of all timesteps, 0 to 1, not {self.cfg.nfsd_threshold}"
            )

    def start_from(self, prompt_utils) -> None:
        self._bad = self.other_text(prompt_utils, "nfsd_negative").text_embeddings

    def gradient(self, x_t, t, eps, prompt, null) -> Float[Tensor, "B c h w"]:
        bad = self._bad.expand(len(x_t), -1, -1)
        eps_c, eps_u, eps_bad = self.predict_pair(x_t, t, prompt, null, bad)
        low = t < self.cfg.nfsd_threshold * self.denoiser.num_train_timesteps
        scale = self.cfg.guidance_scale
        return formulas.nfsd(eps_c, eps_u, eps_bad, low, scale, self.weight(t))
