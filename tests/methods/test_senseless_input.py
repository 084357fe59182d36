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


@pytest.mark.parametrize(
    "values",
    [{"method": None}, {"model": None}, {"prompt": ["a", "b"]}, {"negative_prompt": None}],
    ids=lambda values: next(iter(values)),
)
def test_what_is_no_name_or_text_is_refused_by_name(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"^the {name} must be"):
        lods.load(**{"method": "sds", "model": "pocket", "prompt": "a red car", **values})
