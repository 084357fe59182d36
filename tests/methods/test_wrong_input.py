"""What a method is given by mistake: one line says what is meant, and nothing else is done."""

import dataclasses

import lods
import numpy as np
import pytest
import torch
from lods.methods.learning import LearningMethod

from tests.ideal_model import IdealModel

IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.fixture(scope="module")
def sds():
    return lods.load("sds", IdealModel(), "a red car")


def test_no_latents_at_all(sds):
    with pytest.raises(ValueError, match=r"a batch of shape \(0, 3, 4, 4\) is empty"):
        sds(latents=IMAGES[:0])


def test_numbers_of_numpy_and_torch_are_numbers():
    given = {"guidance_scale": np.float32(5), "max_step_percent": [0.9, 0.5, np.int64(50)]}
    method = lods.load("sds", IdealModel(), "a red car", **given)
    method.step(torch.tensor(25))
    assert (type(method.cfg.guidance_scale), method.cfg.guidance_scale) == (float, 5.0)
    assert (method.now, method.max_step) == (25, 700)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"prompt": "a car \ud800"}, "prompt holds half of a surrogate pair"),
        ({"model": "sd15", "device": "gpu"}, "there is no device 'gpu'"),
        ({"model": "sd15", "device": "cuda:99"}, "there is no device 'cuda:99' that torch sees"),
    ],
)
def test_arguments_of_load_that_make_no_sense(given, said):
    with pytest.raises(ValueError) as caught:
        lods.load(**{"method": "sds", "model": IdealModel(), "prompt": "a red car", **given})
    assert said in str(caught.value)


@dataclasses.dataclass
class Clashing(lods.Method.Config):
    weights_dtype: str = "mine"


class Undecorated(lods.Method.Config):
    mine: float = 1.0


@pytest.mark.parametrize(
    "name, parts, said",
    [
        ("", {}, "'' is no name of a method"),
        ("a:b", {}, "'a:b' is no name of a method"),
        ("mine-guidance", {}, "does not end in -guidance"),
        ("lora", {}, "'lora' is a short name of 'lods-lora'"),
        ("mine", {"Config": Undecorated}, "must be a @dataclass that extends lods.Method.Config"),
        ("mine", {"Config": Clashing}, "has a setting 'weights_dtype', which is one of the"),
    ],
)
def test_methods_that_cannot_be_registered(registered, name, parts, said):
    with pytest.raises(ValueError) as caught:
        lods.register(name)(type("Mine", (lods.Method,), parts))
    assert said in str(caught.value)


def test_what_is_no_method_cannot_be_registered():
    with pytest.raises(ValueError, match=r"'mine' is no subclass of lods\.Method"):
        lods.register("mine")(object)


@pytest.mark.parametrize("raw", [None, IMAGES[:1]])
def test_a_gradient_of_another_shape_is_not_stretched(raw):
    mine = type("Mine", (lods.Method,), {"gradient": lambda self, *args: raw})
    method = mine(IdealModel())
    method.start(lods.load("sds", IdealModel(), "a red car").prompts)
    with pytest.raises(ValueError, match=r"gradient of Mine must be a tensor \(2, 3, 4, 4\)"):
        method(latents=IMAGES)


class Shift(LearningMethod):
    """Learns a number that the noise is shifted by."""

    def create_learned(self):
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def learning_losses(self, latents, conditions):
        return {"loss_shift": (self.shift - 1) ** 2}

    def gradient(self, x_t, t, eps, conditions):
        return eps


def test_inner_steps_learn_within_no_grad():
    method = Shift(IdealModel(), prior_inner_steps=2)
    method.start(lods.load("sds", IdealModel(), "a red car").prompts)
    with torch.no_grad():
        method(latents=IMAGES)
    assert method.shift > 0
