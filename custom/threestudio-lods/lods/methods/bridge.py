"""Score distillation as a bridge between two texts (SDS-Bridge, arXiv:2406.09417)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from lods import scores
from lods.methods.base import Method
from lods.methods.registry import register


@register("lods-bridge")
class Bridge(Method):
    """g = w(t) [ eps(x_t; y) - eps(x_t; source) ], where the source is a text of what the renders
    look like now.

    Before step ``bridge_start`` the renders look like nothing, and g is SDS over its scale,
    s = ``bridge_sds_scale``: w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps ] / s. The published code
    multiplies the second stage by s in place of dividing the first, and also adds ", detailed high
    resolution, high quality, sharp" to the prompt, which is left to the user here. Its stages are
    500 of 1000 steps each, with s = 40. ``guidance_scale`` has no use. Nothing is learned.
    """

    @dataclass
    class Config(Method.Config):
        # so many steps of SDS at this scale come first (in the paper half of the run)
        bridge_start: Annotated[int, "[0, 1e12]"] = 500
        bridge_sds_scale: Annotated[float, "(0, 1e9]"] = 40.0

    cfg: Config

    unread = ("sds_steps", "sds_scale")
    other_texts = ("source",)

    def sds_stage(self) -> tuple[int, float]:
        return self.cfg.bridge_start, self.cfg.bridge_sds_scale

    def start_from(self, prompts) -> None:
        if torch.equal(prompts.plain("source"), prompts.plain("prompt")):
            raise ValueError(
                "the bridge's source is the prompt itself, and there is nothing to distil: set "
                "system.prompt_processor.source_prompt or source_suffix"
            )

    def gradient(self, x_t, t, eps, conditions):
        texts = conditions.prompt, conditions.others["source"]
        eps_c, eps_source = self.predict(x_t, t, conditions, *texts)
        return scores.csd(eps_c, eps_source, self.weight(t))
