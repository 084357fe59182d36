"""Predictions under several texts as rows of one call of the model."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from lods import scores
from lods.methods.conditions import Conditions
from lods.models.base import Model
from torch import Tensor

Predictions = tuple[Float[Tensor, "B c h w"], ...]
Predict = Callable[..., Predictions]


def one_call(
    model: Model,
    x_t: Float[Tensor, "B c h w"],
    t: Int[Tensor, " B"],
    conditions: Conditions,
    *texts: Float[Tensor, "B T D"],
) -> Predictions:
    """The noise predictions under each of these texts."""
    n = len(texts)
    cameras = conditions.cameras and conditions.cameras.repeat(n)
    return model.predict(torch.cat([x_t] * n), torch.cat([t] * n), torch.cat(texts), cameras).chunk(
        n
    )


def with_perp_neg(predict: Predict) -> Predict:
    """``predict`` with Perp-Neg (arXiv:2304.04968) where the conditions have negatives: they become
    the last rows of the call, and the first prediction, that under the prompt, becomes the
    composition of :func:`lods.scores.perp_neg` with the second as the null prediction."""

    def composed(model, x_t, t, conditions, *texts) -> Predictions:
        if not conditions.negatives:
            return predict(model, x_t, t, conditions, *texts)
        found = predict(model, x_t, t, conditions, *texts, *conditions.negatives)
        (eps_c, *others), negatives = found[: len(texts)], found[len(texts) :]
        return perp_neg(eps_c, others[0], negatives, conditions), *others

    return composed


def perp_neg(eps_c: Tensor, eps_u: Tensor, negatives: Predictions, conditions: Conditions):
    """``eps_c``, or with negatives the composition of Perp-Neg."""
    if not negatives:
        return eps_c
    assert conditions.weights is not None
    return scores.perp_neg(eps_c, eps_u, negatives, conditions.weights)


predict = with_perp_neg(one_call)


def fresh_noise(
    model: Model, latents: Float[Tensor, "B c h w"], t: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
    """(x_t, eps) with eps drawn from N(0, 1)."""
    # in one order whatever the layout, or a seed would mean other noise in another layout
    eps = torch.randn_like(latents, memory_format=torch.contiguous_format)
    return model.add_noise(latents, eps, t), eps
