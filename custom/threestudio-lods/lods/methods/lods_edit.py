"""Editing with LODS (arXiv:2312.04820): DDS, whose null is learned on the source."""

from dataclasses import dataclass
from typing import Annotated, Any

from lods import scores
from lods.methods.editing import EditMethod, source_of
from lods.methods.lods_embedding import LODSEmbedding
from lods.methods.registry import register
from lods.scores import WEIGHTINGS


@register("lods-edit")
class LODSEdit(EditMethod, LODSEmbedding):
    """g = w(t) [ eps(x_t; y) - eps(x'_t; y') + (1 - s) / s (eps(x_t; e) - eps(x'_t; e)) ],

    the gradient of LODS at the picture less that at the source x' under its text y', both with the
    noise eps, which cancels, and with one embedding e in the place of the null prompt. e is learned
    as LODS learns it, but on the source: ``loss_embedding`` = mean (eps(x'_t'; e) - eps')^2. It
    comes to say what the source is, beyond what y' says of it, and what guidance leads away from is
    then the source itself. Limits:

    - e still the null prompt n: DDS / s;
    - eps(x'_t; y') = eps(x'_t; e) = eps, a source that its text and e describe wholly: LODS at the
      picture, eps(x_t; y) - eps / s + (1 - s) / s eps(x_t; e), with e learned elsewhere; with e
      still n as well: SDS / s;
    - s = inf: the change of eps(.; y) - eps(.; e) from the source to the picture, CSD less CSD.

    It is 0 where the picture is the source and y is y', whatever e is. ``embedding_start=source``
    starts e as y'. ``prompt_scale`` r: cfg_r(eps(.; y), eps(.; n)) in the place of eps(.; y), at
    the source with y'. The rest is as for :class:`LODSEmbedding`.
    """

    @dataclass
    class Config(LODSEmbedding.Config):
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.05
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.95
        weighting_strategy: Annotated[str, WEIGHTINGS] = "uniform"

    cfg: Config

    def learn(self, latents, conditions):
        """See :class:`lods.methods.learning.LearningMethod`; on the source."""
        return super().learn(source_of(conditions), conditions)

    def gradient(self, x_t, t, eps, conditions):
        r, learned = self.cfg.prompt_scale, self._null(len(x_t))
        texts = (learned,) if r == 1 else (conditions.null, learned)
        x_source = self.noised_source(t, eps, conditions)
        (eps_c, eps_e), (source_c, source_e) = (
            (scores.cfg(eps_y, null[0], r) if null else eps_y, learned_eps)
            for eps_y, *null, learned_eps in self.compared(x_t, x_source, t, conditions, *texts)
        )
        s, w = self.cfg.guidance_scale, self.weight(t)
        return scores.lods_edit(eps_c, eps_e, source_c, source_e, s, w)
