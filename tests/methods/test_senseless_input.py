"""What a method of the library is given is checked, with one line for a mistake."""

import lods
import numpy as np
import pytest
import torch


@pytest.fixture
def method(tiny_sd):
    return lods.load("lods-sds", tiny_sd(sample_size=4), "a red car")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        np.zeros((1, 3, 8, 8), np.float32),
        torch.zeros(0, 3, 8, 8),
        torch.zeros(1, 3, 0, 0),
    ],
    ids=["uint8", "numpy", "no rows", "no pixels"],
)
def test_images_of_another_kind_are_refused(method, images):
    with pytest.raises(ValueError, match=r"tensors of floats|is empty"):
        method(images)


def test_a_negative_step_is_refused(method):
    with pytest.raises(ValueError, match="count from 0"):
        method.step(-1)


@pytest.mark.parametrize("step", ["1", None, 1.5, float("nan")])
def test_a_step_that_is_no_whole_number_is_refused(method, step):
    with pytest.raises(ValueError, match="a step is a whole number"):
        method.step(step)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"azimuth": [0.0, 0.0]}, "azimuth of the cameras is a tensor, not a list"),
        ({"elevation": torch.zeros(1)}, r"elevation .* shape \(1,\), which for 2 images must be"),
        ({"distance": torch.zeros(2, 1)}, r"distance .* must be \(2,\)"),
        ({"c2w": torch.eye(4)[None]}, r"c2w .* must be \(2, 4, 4\)"),
        ({"fovy": torch.tensor([40.0])}, r"fovy .* shape \(1,\), which for 2 images must be"),
        ({"fovy": 40.0}, "fovy of the cameras is a tensor, not a float"),
    ],
)
def test_cameras_are_one_for_each_image(method, changes, said):
    parts = {name: torch.zeros(2) for name in ("elevation", "azimuth", "distance")}
    with pytest.raises(ValueError, match=said):
        method(torch.zeros(2, 3, 8, 8), lods.Cameras(**{**parts, **changes}))


def test_images_that_are_not_finite_are_refused(method):
    with pytest.raises(ValueError, match="hold nan or inf"):
        method(torch.full((1, 3, 8, 8), float("nan")))


def test_images_of_another_range_are_warned_about_once(method, caplog):
    for _ in range(2):
        method(torch.full((1, 3, 8, 8), 255.0))
    assert sum("made for 0..1" in record.getMessage() for record in caplog.records) == 1


def test_a_device_is_for_a_model_that_is_loaded(method):
    with pytest.raises(ValueError, match="device is a setting of a model that is loaded here"):
        lods.load("sds", method.model, "a red car", device="cpu")


@pytest.mark.parametrize(
    "values",
    [{"method": None}, {"model": None}, {"prompt": ["a", "b"]}, {"negative_prompt": None}],
    ids=lambda values: next(iter(values)),
)
def test_what_is_no_name_or_text_is_refused_by_name(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"^the {name} must be"):
        lods.load(**{"method": "sds", "model": "pocket-shapes", "prompt": "a red car", **values})
