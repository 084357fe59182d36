"""Methods that share a model: each keeps a learned part of its own."""

import copy
import gc
import pickle

import lods
import pytest
import torch


@pytest.fixture
def model():
    return lods.models.load("pocket-shapes", "cpu")


def gradients(method):
    """Of the learned part, at a fixed latent and with fixed noise."""
    torch.manual_seed(0)
    latents = torch.randn(1, *method.model.latent_shape)
    return torch.autograd.grad(method(latents=latents).total, list(method.parameters()))


def test_a_lora_is_left_alone_by_another_on_the_same_model(model):
    one = lods.load("lods-lora", model, "a penguin")
    before = gradients(one)
    other = lods.load("lods-lora", model, "a penguin", lora_rank=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert all(map(torch.equal, before, gradients(one)))
    assert any(gradient.any() for gradient in gradients(other))


def test_a_lora_that_is_no_longer_used_is_taken_out_of_the_model(model):
    unet = model.lora_network()
    lods.load("lods-lora", model, "a penguin")  # and forgotten
    kept = lods.load("lods-lora", model, "a penguin")
    assert len(unet.peft_config) == 1
    layer = next(part for part in unet.modules() if hasattr(part, "lora_A"))
    assert list(layer.lora_A) == list(unet.peft_config) and kept.lora is not None


def test_a_lora_that_has_diverged_leaves_other_methods_alone(model):
    latents = torch.zeros(1, *model.latent_shape)
    others = [lods.load(name, model, "a penguin") for name in ("lods-sds", "lods-lora")]
    diverged = lods.load("lods-lora", model, "a penguin")
    with torch.no_grad():
        for parameter in diverged.parameters():
            parameter.fill_(float("nan"))
    for method in others:
        losses = method(latents=latents)
        assert losses.terms["loss_sds"] > 0 and losses.total.isfinite()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_method_keeps_its_lora_when_the_original_is_gone(model, copied):
    original = lods.load("lods-lora", model, "a penguin")
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(std=0.1)
    before = gradients(original)
    duplicate = copied(original)
    del original
    gc.collect()
    lods.load("lods-lora", duplicate.model, "a penguin")  # takes out what is no longer used
    assert all(map(torch.equal, before, gradients(duplicate)))
