"""The rescaling of the guided image, as an option of methods."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from jaxtyping import Float, Int
from lods import scores
from lods.models.base import views_of
from torch import Tensor

if TYPE_CHECKING:
    from lods.methods.base import Method


@dataclass
class Rescaling:
    """Settings of methods whose guided image can be rescaled."""

    # phi of scores.std_rescale, of a guided prediction that means an image of too much contrast: 0
    # off, 1 all; MVDream's loss is this with weighting_strategy=latent, phi 0.7, or 0.5 in its code
    recon_std_rescale: Annotated[float, "[0, 1]"] = 0.0


def rescaled(
    method: "Method",
    gradient: Float[Tensor, "B c h w"],
    x_t: Float[Tensor, "B c h w"],
    t: Int[Tensor, " B"],
    eps_c: Float[Tensor, "B c h w"],
    eps_u: Float[Tensor, "B c h w"],
    times: float = 1.0,
) -> Float[Tensor, "B c h w"]:
    """``gradient``, which is ``times`` that of :func:`lods.scores.lods`, with the guided image
    rescaled by ``recon_std_rescale``, over all views of an object that the model sees at once."""
    cfg: Any = method.cfg  # of a method with these settings
    phi = cfg.recon_std_rescale
    if not phi:
        return gradient
    alpha, sigma = method.model.schedule.alpha_sigma(t)
    more = scores.std_rescale(
        x_t,
        eps_c,
        eps_u,
        alpha,
        sigma,
        cfg.guidance_scale,
        phi,
        method.weight(t),
        views_of(method.model),
    )
    return gradient + times * more
