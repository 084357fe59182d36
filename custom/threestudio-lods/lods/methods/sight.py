"""What a model sees in a step: the noisy input, and the clean images that its predictions mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from lods import scores
from lods.methods.conditions import Conditions
from lods.models.base import Model
from torch import Tensor

PROMPT, LEARNED = "guess under the prompt", "guess of the learned part"
EMPTY, OTHER = "guess under the negative prompt", "guess under the text: {}"
NOISY, DIFFERENCE = "noisy", "difference"


@dataclass
class Sight:
    """The input and the predictions of the last call for a gradient. Only references are kept."""

    x_t: Float[Tensor, "B c h w"] | None = None
    t: Int[Tensor, " B"] | None = None
    predictions: dict[str, Float[Tensor, "B c h w"]] = field(default_factory=dict)

    def keep(
        self,
        x_t: Float[Tensor, "B c h w"],
        t: Int[Tensor, " B"],
        conditions: Conditions,
        texts: Sequence[Any],
        found: Sequence[Tensor],
    ) -> None:
        """Keep the predictions ``found`` for x_t, of which each has its text: one of the
        conditions', or of the learned part."""
        self.x_t, self.t = x_t.detach(), t
        named = [_name(text, conditions) for text in texts]
        self.predictions = {name: eps.detach() for name, eps in zip(named, found)}

    @torch.no_grad()
    def images(self, model: Model) -> dict[str, Float[Tensor, "B 3 H W"]]:
        """See :meth:`lods.methods.base.Method.seen`. The clean latents that the noise prediction
        eps means are (x_t - sigma_t eps) / alpha_t; the difference is 1/2 + d / (2 max |d|), with d
        that of the decoded images and the maximum over all of them."""
        if self.x_t is None or self.t is None:
            return {}
        alpha, sigma = (scores.rows(v, self.x_t) for v in model.schedule.alpha_sigma(self.t))
        found = {NOISY: model.decode(self.x_t)}
        for name, eps in self.predictions.items():
            found[name] = model.decode((self.x_t - sigma * eps) / alpha)
        guesses = list(self.predictions)
        if len(guesses) > 1:
            # what the method compares the prompt's guess with: the learned one, where there is one
            other = LEARNED if LEARNED in guesses else guesses[1]
            d = found[PROMPT] - found[other] if PROMPT in found else torch.zeros_like(found[other])
            found[DIFFERENCE] = 0.5 + 0.5 * d / d.abs().max().clamp_min(1e-8)
        return {name: image.clamp(0, 1) for name, image in found.items()}


def _name(text: Any, conditions: Conditions) -> str:
    if text is conditions.prompt:
        return PROMPT
    if text is conditions.null:
        return EMPTY
    for name, other in conditions.others.items():
        if text is other:
            return OTHER.format(name)
    return LEARNED
