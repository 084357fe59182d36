"""What the model saw in a step, as pictures, of every method; and that looking changes nothing."""

import lods
import pytest
import torch
from lods.methods import registry

from tests.ideal_model import IdealModel

# those that edit take a source too: test_edit_methods.py
NAMES = [name for name, cls in registry.ours().items() if not cls.edits]
LEARNING = ("lods-embedding", "lods-lora", "lods-vsd")
OTHERS = {"lods-bridge": "guess under the text: source"}
OWN = {"lods-bridge": {"bridge_start": 0}, "lods-sdi": {"inversion_steps": 2}}


def make(name, **fields):
    return lods.load(
        name, IdealModel(), "a red car", max_step_percent=0.5, **OWN.get(name, {}), **fields
    )


def latents():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def picture_of(method, text):
    """What the model believes in under a text, seen from the front as latents alone are."""
    front = torch.zeros(2)
    known = method.prompts.conditions(lods.Cameras(front, front, front), method.other_texts)
    embedding = {"prompt": known.prompt, "null": known.null, **known.others}[text]
    return method.model.decode(embedding.view(2, 3, 4, 4))


def other(name):
    learned = "guess of the learned part" if name in LEARNING else "guess under the negative prompt"
    return OTHERS.get(name, learned)


@pytest.mark.parametrize("name", NAMES)
def test_the_guesses_are_the_pictures_that_an_ideal_model_believes_in(name):
    method = make(name)
    method.watch()
    assert method.seen() == {}
    method(latents=latents())
    seen = method.seen()
    assert {"noisy", "guess under the prompt", other(name), "difference"} <= set(seen)
    prompt = picture_of(method, "prompt")
    assert torch.allclose(seen["guess under the prompt"], prompt, atol=1e-3)
    # what is learned is at its start the negative prompt, or for VSD the prompt
    start = {"lods-vsd": "prompt", "lods-bridge": "source"}.get(name, "null")
    assert torch.allclose(seen[other(name)], picture_of(method, start), atol=1e-3)
    pulled = seen["difference"] - 0.5
    if name != "lods-vsd":  # where both are the same picture
        wanted = prompt - picture_of(method, start)
        assert torch.allclose(pulled, 0.5 * wanted / wanted.abs().max(), atol=1e-3)
    for image in seen.values():
        assert image.shape == (2, 3, 4, 4) and image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_looking_changes_no_bit(name):
    found = []
    for watched in (False, True):
        method = make(name)
        method.watch(watched)
        torch.manual_seed(3)
        z = latents().requires_grad_()
        losses = method(latents=z)
        losses.total.backward()
        method.seen()
        found.append([z.grad, *losses.terms.values(), torch.rand(1)])
    for one, two in zip(*found):
        assert torch.equal(one, two)


def test_the_first_steps_of_sds_are_seen_too():
    method = make("lods-embedding", sds_steps=5)
    method.watch()
    method(latents=latents())
    assert "guess under the negative prompt" in method.seen()
    method.watch(False)
    assert method.seen() == {}


def test_a_guidance_scale_can_be_set_within_its_range():
    method = make("lods-sds", guidance_scale=10.0)
    gradients = []
    for scale in (10.0, 20.0):
        method.set_guidance_scale(scale)
        torch.manual_seed(0)
        z = latents().requires_grad_()
        method(latents=z).total.backward()
        gradients.append(z.grad)
    direct = make("lods-sds", guidance_scale=20.0)
    torch.manual_seed(0)
    z = latents().requires_grad_()
    direct(latents=z).total.backward()
    assert torch.equal(gradients[1], z.grad) and not torch.equal(*gradients)
    for wrong in (0, -1, float("inf"), float("nan"), "7"):
        with pytest.raises(ValueError, match="guidance_scale"):
            method.set_guidance_scale(wrong)
    assert method.cfg.guidance_scale == 20.0
