"""The formulas: limits, equivalences between the priors, and numbers worked out by hand."""

import importlib
import math

import pytest
import torch

SHAPE = (3, 4, 5, 5)


@pytest.fixture(scope="module")
def formulas(lods):
    return importlib.import_module("lods.scores")


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    eps_c, eps_u, eps = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    return eps_c, eps_u, eps, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def test_by_hand(formulas):
    c, u, eps, w = (torch.full((1, 1), x) for x in (2.0, 1.0, 4.0, 0.5))
    assert formulas.cfg(c, u, 3.0).item() == 4.0  # 1 + 3 (2 - 1)
    assert formulas.sds(c, u, eps, 2.0, w[0]).item() == -0.5  # 0.5 (3 - 4)
    assert formulas.lods(c, u, eps, 2.0, w[0]).item() == -0.25  # 0.5 (2 - 4/2 - 1/2)
    assert formulas.lods(c, u, eps, math.inf, w[0]).item() == 0.5  # 0.5 (2 - 1)


def test_cfg_limits(formulas, predictions):
    c, u, _, _ = predictions
    assert torch.equal(formulas.cfg(c, u, 0.0), u)
    torch.testing.assert_close(formulas.cfg(c, u, 1.0), c)
    # the guided prediction lies on the line from u to c, s lengths away
    torch.testing.assert_close(formulas.cfg(c, u, 7.5) - u, 7.5 * (c - u))


@pytest.mark.parametrize("s", [0.5, 1.0, 7.5, 100.0, 1e6])
def test_lods_is_sds_over_s(formulas, predictions, s):
    c, u, eps, w = predictions
    torch.testing.assert_close(
        formulas.lods(c, u, eps, s, w), formulas.sds(c, u, eps, s, w) / s, rtol=1e-9, atol=1e-9
    )


def test_lods_at_one_ignores_the_null(formulas, predictions):
    c, u, eps, w = predictions
    assert torch.equal(formulas.lods(c, u, eps, 1.0, w), formulas.lods(c, 5 * u, eps, 1.0, w))
    assert not torch.equal(formulas.lods(c, u, eps, 2.0, w), formulas.lods(c, 5 * u, eps, 2.0, w))


def test_lods_at_infinity_is_csd(formulas, predictions):
    c, u, eps, w = predictions
    csd = w.view(3, 1, 1, 1) * (c - u)
    assert torch.equal(formulas.lods(c, u, eps, math.inf, w), csd)
    # ... and is the limit: also in float32, where (cfg - eps) / s would have lost its digits
    large = formulas.lods(c.float(), u.float(), eps.float(), 1e12, w.float())
    torch.testing.assert_close(large, csd.float(), rtol=1e-5, atol=1e-6)


def test_no_gradient_where_predictions_are_the_noise(formulas, predictions):
    _, _, eps, w = predictions
    for s in (0.5, 7.5, 100.0):
        for prior in (formulas.lods, formulas.sds):
            torch.testing.assert_close(
                prior(eps, eps, eps, s, w), torch.zeros_like(eps), rtol=0, atol=1e-12
            )


def test_weights_act_row_by_row(formulas, predictions):
    c, u, eps, w = predictions
    whole = formulas.lods(c, u, eps, 7.5, w)
    for row in range(3):
        alone = formulas.lods(c[[row]], u[[row]], eps[[row]], 7.5, w[[row]])
        torch.testing.assert_close(whole[[row]], alone)


def test_weight_strategies(formulas):
    abar = torch.tensor([0.25, 0.81])
    torch.testing.assert_close(formulas.weight(abar), torch.tensor([0.75, 0.19]))
    assert torch.equal(formulas.weight(abar, "uniform"), torch.ones(2))
    torch.testing.assert_close(
        formulas.weight(abar, "fantasia3d"), torch.tensor([0.5 * 0.75, 0.9 * 0.19])
    )
    with pytest.raises(ValueError, match="weighting_strategy must be one of"):
        formulas.weight(abar, "sdss")


def test_every_parameterisation_gives_the_same_noise(formulas, predictions):
    z, _, eps, abar = predictions
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    a, s = alpha.view(3, 1, 1, 1), sigma.view(3, 1, 1, 1)
    x_t = a * z + s * eps
    outputs = {"epsilon": eps, "v_prediction": a * eps - s * z, "sample": z}
    for kind, output in outputs.items():
        torch.testing.assert_close(formulas.to_noise(output, x_t, alpha, sigma, kind), eps)
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        formulas.to_noise(z, x_t, alpha, sigma, "score")


def test_the_noise_of_a_velocity(formulas, predictions):
    z, _, eps, s = predictions
    x_t = (1 - s.view(3, 1, 1, 1)) * z + s.view(3, 1, 1, 1) * eps
    torch.testing.assert_close(formulas.to_noise(eps - z, x_t, 1 - s, s, "flow"), eps)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan])
def test_scales_that_are_refused(formulas, scale):
    with pytest.raises(ValueError, match="guidance_scale must be above 0"):
        formulas.check_scale(scale)


def test_infinite_scale_only_where_there_is_a_limit(formulas):
    assert formulas.check_scale(math.inf) == math.inf
    with pytest.raises(ValueError, match="must be finite"):
        formulas.check_scale(math.inf, finite=True)


def test_csd_and_nfsd_by_hand(formulas):
    c, u, bad, w = (torch.full((2, 1), x) for x in (2.0, 1.0, 4.0, 0.5))
    assert formulas.csd(c, u, w[:, 0]).tolist() == [[0.5], [0.5]]  # 0.5 (2 - 1)
    low = torch.tensor([True, False])
    # 0.5 (1 + 3 (2 - 1)), and 0.5 (1 - 4 + 3 (2 - 1))
    assert formulas.nfsd(c, u, bad, low, 3.0, w[:, 0]).tolist() == [[2.0], [0.0]]


def test_lods_at_infinity_is_the_same_csd(formulas, predictions):
    c, u, eps, w = predictions
    assert torch.equal(formulas.lods(c, u, eps, math.inf, w), formulas.csd(c, u, w))


def test_perp_neg_ignores_what_is_along_the_prompt(formulas, predictions):
    c, u, other, _ = predictions
    weights = torch.tensor([[-1.0, -0.5], [-2.0, -0.1], [0.0, 0.0]], dtype=c.dtype)
    along = [u + 3 * (c - u), u - 2 * (c - u)]
    torch.testing.assert_close(formulas.perp_neg(c, u, along, weights), c)
    got = formulas.perp_neg(c, u, [other, along[0]], weights)
    assert torch.equal(got[2], c[2])  # weights of an overhead view
    added, direction = got - c, c - u
    torch.testing.assert_close(
        (added * direction).flatten(1).sum(1), torch.zeros(3, dtype=c.dtype), rtol=0, atol=1e-9
    )
    # by hand, with one direction per axis: the perpendicular part of (3, 4) to (1, 0) is (0, 4)
    c, u, other = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[3.0, 4.0]]])
    assert formulas.perp_neg(c, u, [other], torch.tensor([[-0.5]])).tolist() == [[1.0, -2.0]]


def test_ddim_goes_there_and_back(formulas, predictions):
    x, _, eps, abar = predictions
    here, there = ((a.sqrt(), (1 - a).sqrt()) for a in (abar, abar.flip(0)))
    up = formulas.ddim(x, eps, here, there)
    torch.testing.assert_close(formulas.ddim(up, eps, there, here), x)
    # with the true noise of x it is the same picture with more, or less, of that noise
    z = (x - formulas.rows(here[1], x) * eps) / formulas.rows(here[0], x)
    want = formulas.rows(there[0], x) * z + formulas.rows(there[1], x) * eps
    torch.testing.assert_close(up, want)
