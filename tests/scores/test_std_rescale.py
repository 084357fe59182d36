"""The rescaling of the guided image: closed forms of the gradient."""

import pytest
import torch
from lods import scores

ALPHA, SIGMA = torch.tensor([0.9, 0.9, 0.3, 0.3]), torch.tensor([0.4, 0.4, 0.95, 0.95])
W = SIGMA / ALPHA  # the weight with which s g is the gradient of 1/2 |z - z'|^2


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    z, eps, eps_c, eps_u = (
        torch.randn(4, 3, 5, 5, generator=g, dtype=torch.float64) for _ in range(4)
    )
    x_t = scores.rows(ALPHA, z) * z + scores.rows(SIGMA, z) * eps
    return z, eps, eps_c, eps_u, x_t


def clean(x_t, eps):
    return (x_t - scores.rows(SIGMA, x_t) * eps) / scores.rows(ALPHA, x_t)


def more(case, s, phi, views=2):
    _, _, eps_c, eps_u, x_t = case
    return scores.std_rescale(x_t, eps_c, eps_u, ALPHA, SIGMA, s, phi, W, views)


@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("s", [1.0, 7.5, 50.0])
def test_it_is_the_gradient_of_the_square_to_the_rescaled_image(case, s, phi):
    z, eps, eps_c, eps_u, x_t = case
    guided, plain = clean(x_t, scores.cfg(eps_c, eps_u, s)), clean(x_t, eps_c)
    wanted = torch.empty_like(z)
    for views in ([0, 1], [2, 3]):
        factor = plain[views].std() / guided[views].std()
        target = (phi * factor + 1 - phi) * guided[views]
        wanted[views] = z[views] - target
    found = scores.sds(eps_c, eps_u, eps, s, W) + s * more(case, s, phi)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    lods = scores.lods(eps_c, eps_u, eps, s, W) + more(case, s, phi)
    torch.testing.assert_close(lods, wanted / s, atol=1e-5, rtol=1e-5)


def test_without_guidance_or_with_no_part_nothing_is_added(case):
    assert more(case, 7.5, 0.0).abs().max() == 0
    torch.testing.assert_close(more(case, 1.0, 0.7), torch.zeros_like(case[0]), atol=1e-6, rtol=0)


def test_an_infinite_scale_is_the_limit_of_large_ones(case):
    found = more(case, float("inf"), 0.5)
    torch.testing.assert_close(found, more(case, 1e6, 0.5), atol=1e-4, rtol=1e-4)
    difference = scores.csd(case[2], case[3], W)
    torch.testing.assert_close(difference + found, 0.5 * difference, atol=1e-5, rtol=1e-5)


def test_the_spread_is_that_of_all_views_of_an_object(case):
    assert (more(case, 7.5, 0.5, 2) - more(case, 7.5, 0.5, 1)).abs().max() > 1e-3
    alone = scores.std_rescale(
        case[4][2:], case[2][2:], case[3][2:], ALPHA[2:], SIGMA[2:], 7.5, 0.5, W[2:], 2
    )
    torch.testing.assert_close(alone, more(case, 7.5, 0.5, 2)[2:])
