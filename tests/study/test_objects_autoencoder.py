"""The autoencoder of the pocket world: its start, its loss, its whitening."""

import pytest
import torch
from torch import nn

from pocket import autoencoder


def test_whitened_latents_have_mean_0_and_deviation_1_and_pictures_stay():
    torch.manual_seed(0)
    vae = autoencoder.build((16, 16), 4, 16).eval()
    nn.init.normal_(vae.quant_conv.weight)  # deviations that differ from place to place
    pictures = torch.rand(20, 3, 16, 16) * 2 - 1
    before = autoencoder.reconstruct(vae, pictures)
    autoencoder.whiten(vae, pictures)
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
    assert posterior.mean.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert posterior.mean.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=1e-4)
    assert posterior.std.unique().tolist() == pytest.approx([autoencoder.POSTERIOR_STD])
    assert torch.allclose(autoencoder.reconstruct(vae, pictures), before, atol=1e-4)


def test_a_new_autoencoder_carries_each_colour_in_a_channel_of_its_own():
    vae = autoencoder.build((16, 16), 4, 16).eval()
    encoder = vae.encoder
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        h = encoder.conv_in(x)
        for block in encoder.down_blocks:
            h = block(h)
    assert torch.allclose(h[:, :3], nn.functional.avg_pool2d(x, 2), atol=1e-6)


def test_the_loss_of_the_autoencoder_is_the_formula_of_its_docstring():
    """An error of 0.4 in red on four by four of 8 x 8 pixels, at a place that 4 x 4 blocks have."""
    x, made = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    made[:, 0, 4:, 4:] = 0.4
    share = 1 / 4 / 3  # of the values, those that differ
    fine = 0.4 * share + 2 * 0.16 * share + 0.5 * (2 * 4 * 0.4 / (3 * 8 * 7))
    colours = (0.4 * 2 / 3 + 2 * 0.4 / 3) * share + 2 * 0.16 * (4 + 1 + 1) / 9 * share
    small = 2 * (0.4 * share)
    worst = 0.4  # of 12 values, one
    expected = fine + 0.5 * colours + 2 * small + worst
    assert float(autoencoder.distance(made, x)) == pytest.approx(expected, rel=1e-5)


def test_a_small_spot_costs_more_than_the_grain_of_as_large_an_error():
    """Equal sums of |e| and e^2: a spot of 4 x 4 pixels, and as many pixels of either sign."""
    x, spot, grain = (torch.zeros(1, 3, 32, 32) for _ in range(3))
    spot[..., 8:12, 8:12] = 0.5
    sign = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]).repeat(2, 2)
    grain[..., 8:12, 8:12] = sign
    extra = autoencoder.distance(spot, x) + 0.5 * autoencoder.gradients(grain)
    extra -= autoencoder.distance(grain, x) + 0.5 * autoencoder.gradients(spot)
    # of the 192 values of the averages over 4 x 4 pixels, two count once more, and three are 0.5
    assert float(extra) == pytest.approx(2 * 2 * 0.5 * 16 / 32**2 + 0.5, rel=1e-5)
