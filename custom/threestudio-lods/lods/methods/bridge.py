"""Score distillation as a bridge between two texts (SDS-Bridge, arXiv:2406.09417)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from lods import scores as formulas
from lods.methods.base import BaseGuidance
from lods.methods.options import WITHOUT_EFFECT
from torch import Tensor

import threestudio


@threestudio.register("lods-bridge-guidance")
class BridgeGuidance(BaseGuidance):
    """g = w(t) [ eps(x_t; y) - eps(x_t; source) ], where the source is a text of what the renders
    look like now: ``prompt_processor.source_prompt``, or the prompt and ``source_suffix``.

    Before step ``bridge_start`` the renders look like nothing, and g is SDS over its scale,
    s = ``bridge_sds_scale``: w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps ] / s. The published code
    multiplies the second stage by s in place of dividing the first, and also adds ", detailed high
    resolution, high quality, sharp" to the prompt, which is left to the user here. Its stages are
    500 of 1000 steps each, with s = 40. ``guidance_scale`` has no use. Nothing is learnt.
    """

    @dataclass
    class Config(BaseGuidance.Config):
        pass

    cfg: Config
    without_effect = WITHOUT_EFFECT | {"sds_steps": (0,), "sds_scale": (100.0,)}

    def sds_stage(self) -> tuple[int, float]:
        return self.cfg.bridge_start, self.cfg.bridge_sds_scale

    def start_from(self, prompt_utils) -> None:
        self._texts = self.other_text(prompt_utils, "source")
        if torch.equal(self._texts.text_embeddings, prompt_utils.text_embeddings):
            raise ValueError(
                "the bridge's source is the prompt itself, and there is nothing to distil: set "
                "system.prompt_processor.source_prompt or source_suffix"
            )

    def look(self, views, batch) -> None:
        if self._negatives:  # Perp-Neg's prompt is between the views', so the source too
            rows, weights = self._texts.get_text_embeddings_perp_neg(*views, True)
            self._source = rows[: len(weights)]
        else:
            dependent = self.cfg.view_dependent_prompting
            self._source = self._texts.get_text_embeddings(*views, dependent).chunk(2)[0]

    def gradient(self, x_t, t, eps, prompt, null) -> Float[Tensor, "B c h w"]:
        eps_c, eps_source = self.predict_pair(x_t, t, prompt, self._source)
        return formulas.csd(eps_c, eps_source, self.weight(t))
