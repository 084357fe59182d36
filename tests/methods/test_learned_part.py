"""The learned part: where it starts, how it learns, and what a resumed run finds of it."""

import io

import pytest
import torch
from lods.methods.conditions import Conditions
from lods.models.unet import UNetModel

from tests.guidance_oracles import random_prompt, side_view
from tests.methods.guidances import ALL, EMBEDDING, LEARNING, LORA, SDS, VSD, images, make, total

__all__ = ["make"]  # a fixture


def test_only_what_is_learned_is_in_the_state(make):
    assert not make(SDS).state_dict()
    assert set(make(EMBEDDING).state_dict()) == {"learnable_embedding", "initialized"}
    guidance = make(LORA)
    unet = {n for n, _ in guidance.model.unet.named_modules()}
    for key in guidance.state_dict():
        head, path, part, weight = key.split(".", 1)[0], *key.split(".", 1)[1].rsplit(".", 2)
        assert (head, weight) == ("lora", "weight") and part in ("lora_A", "lora_B")
        assert path in unet  # the key names the layer that it belongs to


def test_embedding_starts_as_the_negative_prompt_once(make):
    prompt, other = random_prompt(0), random_prompt(1)
    guidance = make(EMBEDDING)
    shape = guidance.learnable_embedding.shape  # known before any prompt
    guidance.initialize(prompt)
    null = prompt.uncond_text_embeddings[0]
    assert torch.equal(guidance.learnable_embedding, null) and null.shape == shape
    with torch.no_grad():
        guidance.learnable_embedding.add_(1)
    guidance.initialize(other)
    assert torch.equal(guidance.learnable_embedding, null + 1)

    loaded, fresh = make(EMBEDDING), make(EMBEDDING)
    loaded.load_state_dict(guidance.state_dict())
    for module in (loaded, fresh):
        module(images(), other, *side_view(2))
    assert torch.equal(loaded.learnable_embedding, null + 1)  # goes on with what was learned
    assert torch.equal(fresh.learnable_embedding, other.uncond_text_embeddings[0])


@pytest.mark.parametrize(
    "prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*ALL, "inner"])
def test_two_and_two_steps_are_four(make, name, prediction_type):
    def start():
        torch.manual_seed(4)
        fields = {"prior_inner_steps": 2} if name == "inner" else {}
        fields["inversion_steps"] = 3
        guidance = make(VSD if name == "inner" else name, prediction_type, **fields)
        particle = torch.rand(2, 12, 12, 3).requires_grad_()
        groups = [{"params": [particle], "lr": 0.1}]
        if learned := list(guidance.parameters()):
            groups.append({"params": learned, "lr": 0.01})
        return guidance, particle, torch.optim.AdamW(groups)

    def train(guidance, particle, optimizer, steps):
        for step in steps:
            guidance.do_update_step(0, step)
            optimizer.zero_grad()
            total(guidance(particle, random_prompt(), *side_view(2))).backward()
            optimizer.step()

    whole = start()
    train(*whole, range(4))
    first = start()
    train(*first, range(2))
    file = io.BytesIO()
    torch.save(
        [first[0].state_dict(), first[1], first[2].state_dict(), torch.get_rng_state()], file
    )
    file.seek(0)
    state, particle, optimizer_state, rng = torch.load(file, weights_only=True)
    guidance, resumed, optimizer = start()
    torch.manual_seed(99)
    guidance.load_state_dict(state)
    with torch.no_grad():
        resumed.copy_(particle)
    optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(rng)
    train(guidance, resumed, optimizer, range(2, 4))
    assert torch.equal(resumed, whole[1]) and not torch.equal(resumed, first[1])
    for (key, one), other in zip(guidance.state_dict().items(), whole[0].state_dict().values()):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", LEARNING)
def test_learning_lowers_the_loss(make, name):
    guidance, prompt = make(name), random_prompt()
    guidance.initialize(prompt)
    z, texts = torch.randn(2, 4, 8, 8), prompt.get_text_embeddings(*side_view(2)).chunk(2)
    conditions = Conditions(*texts)
    learned = list(guidance.parameters())
    optimizer = torch.optim.Adam(learned, lr=0.1)
    values = []
    for _ in range(12):
        torch.manual_seed(0)  # always the same (t, noise), so that the loss must fall
        (loss,) = guidance.learn(z, conditions).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.97 * values[0]


@pytest.mark.parametrize("name", LEARNING)
def test_gradient_scale_of_half_precision_cancels(make, name, monkeypatch):
    """float16 needs its gradients enlarged inside the UNet; nothing of that may be seen outside."""
    plain = make(name)
    load = UNetModel.from_pretrained

    def scaled_load(*args, **kwargs):
        model = load(*args, **kwargs)
        model.grad_scale = 64.0
        return model

    monkeypatch.setattr(UNetModel, "from_pretrained", scaled_load)
    scaled = make(name)
    seen = []
    scaled.model.unet.conv_out.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0])
    )
    plain.model.unet.conv_out.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0])
    )
    scaled.load_state_dict(plain.state_dict())
    grads = []

    def differentiate(guidance):
        torch.manual_seed(5)
        guidance.zero_grad()
        total(guidance(images(), random_prompt(), *side_view(2))).backward()
        grads.append([p.grad.clone() for p in guidance.parameters()])

    differentiate(plain)
    differentiate(scaled)
    torch.testing.assert_close(seen[1], 64 * seen[0])
    torch.testing.assert_close(grads[0], grads[1])
    # a GradScaler enlarges them already, and both factors together overflow in float16
    scaled.loss_is_scaled()
    differentiate(scaled)
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(grads[0], grads[2])
    # but not those of updates inside of a step, which the trainer does not see
    inside = make(name, prior_inner_steps=1)
    inside.loss_is_scaled()
    assert inside.model.grad_scale == 64
