"""Metrics of an object against its true views."""

import math

import numpy as np
import pytest
import torch

from evaluation import truth_metrics as metrics

VIEWS, SIZE = 8, 16


@pytest.fixture
def true():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(VIEWS, SIZE, SIZE, 3, generator=generator)


@pytest.fixture
def opacity():
    mask = torch.zeros(VIEWS, SIZE, SIZE)
    for view in range(VIEWS):
        mask[view, : 4 + view, : 10 - view] = 1.0
    return mask


def test_the_truth_against_itself_is_perfect(true, opacity):
    found = metrics.against(true, opacity, true, opacity, True)
    wanted = {"psnr": 100, "ssim": 1, "gmsd": 0, "iou": 1, "turn": 0, "sharpness": 1}
    wanted |= {"turned_psnr": 100, "turned_iou": 1, "half_transparent": 0, "janus_rate": 0}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def test_psnr_is_that_of_the_squared_error(true):
    table = metrics.psnr_table(true + 0.1, true)
    np.testing.assert_allclose(np.diag(table), 20, atol=1e-4)
    other = -10 * math.log10(float(((true[2] + 0.1 - true[5]) ** 2).mean()))
    assert table[2, 5] == pytest.approx(other, abs=1e-4)


def test_a_turned_object_is_found_after_the_best_turn(true, opacity):
    found = metrics.against(true.roll(-3, 0), opacity.roll(-3, 0), true, opacity, False)
    assert found["turn"] == 3 * 360 / VIEWS
    assert found["turned_psnr"] == pytest.approx(100) and found["turned_iou"] == 1
    assert found["turned_ssim"] == pytest.approx(1, abs=1e-5) and found["psnr"] < 20
    assert math.isnan(found["janus_rate"])


def test_the_iou_of_two_silhouettes():
    one, two = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    one[0, :2], two[0, 1:3] = True, True  # 4 of 12; both are empty in the second view
    assert metrics.iou(one, two) == pytest.approx((4 / 12 + 1) / 2)


def test_sharpness_is_linear_in_the_contrast(true):
    assert metrics.sharpness(0.3 * true + 0.2, true) == pytest.approx(0.3, abs=1e-5)


def test_the_gradient_of_a_ramp():
    ramp = torch.arange(8.0).repeat(8, 1)[None, ..., None].repeat(1, 1, 1, 3) / 10
    # both neighbours are two pixels apart
    assert metrics.gradients(ramp)[0, 1:-1, 1:-1] == pytest.approx(0.2, abs=1e-6)


def test_structure_counts_for_gmsd_and_brightness_does_not(true):
    assert metrics.gmsd(true + 0.2, true) == pytest.approx(0, abs=1e-5)
    assert metrics.gmsd(true.flip(2), true) > 0.05


def test_two_faces_are_seen_from_behind():
    faces = torch.rand(VIEWS, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))
    twice = faces[[0, 1, 2, 1, 0, 1, 2, 7]]  # of 8 views 45 degrees apart: a face at 0 and at 180
    rate = metrics.janus_rate(metrics.psnr_table(twice, faces))
    assert rate == pytest.approx(1 / 3)  # behind are 135, 180 and 225 degrees, and 180 is a face


def test_haze_counts_beyond_that_of_the_truth(true, opacity):
    hazy = opacity.clone()
    hazy[:, -1] = 0.3
    found = metrics.against(true, hazy, true, opacity, False)
    assert found["half_transparent"] == pytest.approx(1 / SIZE)


def test_a_picture_may_have_any_background(true, opacity):
    """It is compared with its own true view, and with the nearest, as they would be before it."""
    over_white = true * opacity[..., None] + (1 - opacity[..., None])
    blue = torch.tensor([0.1, 0.2, 0.9])
    over_blue = over_white - (1 - opacity[..., None]) * (1 - blue)
    shown = np.array([3, 5])
    found = metrics.pictures(over_blue[[3, 5]], over_white, opacity, shown)
    assert found["psnr"] == pytest.approx(found["nearest_psnr"]) and found["psnr"] > 90
    assert found["sharpness"] == pytest.approx(1, abs=1e-4)
    assert found["saturation"] == pytest.approx(1, abs=1e-4)
    wrong = metrics.pictures(over_blue[[3, 5]], over_white, opacity, shown - 1)
    assert wrong["psnr"] < 30 and wrong["nearest_psnr"] > 90


def test_saturation_is_linear_in_the_chroma(true):
    grey = true.mean(-1, keepdim=True)
    assert metrics.saturation(grey + 0.4 * (true - grey), true) == pytest.approx(0.4, abs=1e-5)
    assert metrics.saturation(grey.expand_as(true), true) == pytest.approx(0, abs=1e-6)


def test_clipped_is_the_share_at_the_ends_of_the_range(true, opacity):
    inside = opacity > 0.5
    middle = true.clamp(0.1, 0.9)
    spoilt = middle.clone()
    spoilt[..., 0] = 1.0  # one of three channels
    assert metrics.clipped(middle, inside) == 0
    assert metrics.clipped(spoilt, inside) == pytest.approx(1 / 3)
    assert metrics.clipped(spoilt, inside & False) == 0
    found = metrics.against(spoilt, opacity, spoilt, opacity, False)
    assert found["clipped"] == 0
    assert metrics.against(spoilt, opacity, middle, opacity, False)["clipped"] > 0.3
