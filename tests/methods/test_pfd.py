"""Probability-flow distillation against flows of Gaussian pictures, whose ways are known."""

import pytest
import torch
from lods.models import VariancePreserving

from tests.methods.test_flow import FLOW, gradient, latents, made

DIFFUSION = VariancePreserving(torch.linspace(0.999, 0.01, 1000))
AT = {"min_step_percent": 0.6, "max_step_percent": 0.6}
SCHEDULES = [pytest.param(FLOW, id="flow"), pytest.param(DIFFUSION, id="diffusion")]


def pfd(schedule, steps, **values):
    fields = {"inversion_steps": steps, "pfd_steps": steps, "std": 0.5, **AT, **values}
    return made("pfd", schedule, **fields)


def limit(schedule, **values):
    """(the gradient for steps of no length, what that of 150 steps has beside it): the error of a
    step of Euler is halved with its length, which divides 600 here."""
    few, many = (gradient(pfd(schedule, n, **values), latents()) for n in (75, 150))
    return 2 * many - few, few - many


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_back_is_sdi(schedule):
    same = {
        "std": 0.5,
        "weighting_strategy": "latent",
        "guidance_scale": 5.0,
        "inversion_scale": -3,
    }
    sdi = gradient(made("sdi", schedule, **AT, **same), latents())
    got = gradient(made("pfd", schedule, pfd_steps=1, **AT, **same), latents())
    torch.testing.assert_close(got, sdi, rtol=1e-4, atol=1e-5)
    more = gradient(made("pfd", schedule, pfd_steps=2, **AT, **same), latents())
    assert (more - sdi).abs().max() > 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_way_back_under_the_same_text_ends_where_it_began(schedule):
    same = {"inversion_scale": 1.0, "guidance_scale": 1.0}
    found, rest = limit(schedule, **same)
    assert rest.abs().max() > 0.05 and found.abs().max() < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_one_gaussian_to_another_it_moves_by_a_known_part(schedule):
    """Under either text u = (x_t - alpha m) / S stays on the way, S^2 = alpha^2 std^2 + sigma^2; so
    a picture of N(m', std^2) ends at z + (1 - alpha std / S) (m - m')."""
    ways = {"inversion_scale": 0.0, "guidance_scale": 1.0}
    method, (got, _) = pfd(schedule, 1), limit(schedule, **ways)
    texts = (method.prompts.plain(which)[None] for which in ("prompt", "null"))
    to, origin = (method.model.network(torch.zeros(1), text) for text in texts)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([method.max_step]))
    spread = (alpha**2 * 0.25 + sigma**2).sqrt()
    want = ((1 - alpha * 0.5 / spread) * (origin - to)).expand_as(got)
    assert want.abs().max() > 0.3
    torch.testing.assert_close(got, want, rtol=0, atol=0.02)


def test_another_weight_is_one_of_noise():
    alpha, sigma = FLOW.alpha_sigma(torch.tensor([600]))
    latent, uniform = (
        gradient(pfd(FLOW, 4, weighting_strategy=name), latents()) for name in ("latent", "uniform")
    )
    torch.testing.assert_close(uniform, latent * alpha / sigma, rtol=1e-4, atol=1e-5)
