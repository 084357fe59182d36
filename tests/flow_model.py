"""Closed forms of Gaussian pictures, as a flow and as a diffusion.

A text stands for a picture m (:class:`tests.ideal_model.Texts`), and the pictures under it are
N(m, std^2). What a model sees in x_t = alpha z + sigma eps is then

    E[eps | x_t] = sigma d,  E[z | x_t] = m + alpha std^2 d,
    d = (x_t - alpha m) / (alpha^2 std^2 + sigma^2),

and the velocity of a flow is the difference of the two.
"""

import torch
from lods import scores
from lods.models import RectifiedFlow, VariancePreserving

from tests.ideal_model import IdealModel


class GaussianModel(IdealModel):
    """Of any ``schedule``. That of a flow goes the way of its velocity and back."""

    def __init__(self, schedule, std=0.0):
        super().__init__()
        self.schedule, self.std = schedule, std

    def predict(self, x_t, t, texts, cameras=None):
        alpha, sigma = (scores.rows(a.double(), x_t.double()) for a in self.schedule.alpha_sigma(t))
        m, x = self.network(t, texts).double(), x_t.double()
        d = (x - alpha * m) / (alpha**2 * self.std**2 + sigma**2)
        eps, z = sigma * d, m + alpha * self.std**2 * d
        if isinstance(self.schedule, RectifiedFlow):
            return self.schedule.to_noise(eps - z, x, t, "flow").to(x_t)
        return eps.to(x_t)


def as_diffusion(flow: RectifiedFlow) -> VariancePreserving:
    """The diffusion with the same ratio of picture and noise at each t: its x_t is that of the flow
    over sqrt(alpha^2 + sigma^2)."""
    alpha, sigma = (a.double() for a in flow.alpha_sigma(torch.arange(flow.steps)))
    return VariancePreserving(alpha**2 / (alpha**2 + sigma**2))
