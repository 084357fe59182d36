"""What the autoencoder loses of a picture, put back where an edit left its structure."""

import pytest
import torch
from lods.edits.details import DARK, LUMINANCE, with_details


def picture(seed: int, low: float = 0.1, high: float = 0.9) -> torch.Tensor:
    """(3, 32, 32) of random greys."""
    grey = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (low + (high - low) * grey).expand(3, -1, -1)


def plain(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb)[:, None, None].expand(3, 32, 32)


def test_an_edit_that_changed_nothing_gives_the_source():
    source, lost = picture(0), picture(1)
    assert torch.allclose(with_details(source, lost, lost), source, atol=1e-6)


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_part_weighs_the_details(part):
    source, lost = picture(0), picture(1)
    expected = lost + part * (source - lost)
    assert torch.allclose(with_details(source, lost, lost, part), expected, atol=1e-6)


def test_another_structure_gets_no_details_of_the_old_one():
    source, lost = picture(0), picture(1)
    assert torch.equal(with_details(source, lost, 1 - lost), 1 - lost)


def test_a_fold_keeps_its_shade_in_another_colour():
    """A line of 80 % of the luminance around it stays one, whatever the colours."""
    red, blue = plain(0.8, 0.1, 0.1), plain(0.1, 0.1, 0.7)
    source = red.clone()
    source[:, :, 16] *= 0.8
    found = with_details(source, red, blue)
    y = (torch.tensor(LUMINANCE)[:, None] * red[:, 0, :1]).sum()
    assert torch.allclose(found[:, 4, 16], blue[:, 4, 16] * (1 - 0.2 * y / (y + DARK)), atol=1e-5)
    assert torch.equal(found[:, :, :10], blue[:, :, :10])


def test_a_button_comes_back_in_its_colour_where_colours_stayed():
    white = plain(0.9, 0.9, 0.9)
    source = white.clone()
    source[:, 10, 10] = torch.tensor([0.1, 0.2, 0.6])
    assert torch.allclose(
        with_details(source, white, white * 0.995)[:, 10, 10], source[:, 10, 10], atol=0.01
    )
