"""Every method on a tiny random model of each newer family of flows: steps, files, a resumed run,
exports that stock diffusers takes."""

import copy

import lods
import pytest
import torch
from safetensors import safe_open

from tests.few_steps import LEARNING, METHODS, OWN, cameras, images, trained
from tests.tiny_flows import FAMILIES, PIPELINES


def of_each(names, quick=""):
    return [
        pytest.param(family, name, marks=[] if name == quick else pytest.mark.slow)
        for family in FAMILIES
        for name in names
    ]


@pytest.fixture(scope="module")
def make(tiny_flow):
    def build(family, name, **settings):
        settings = {**OWN.get(name, {}), **settings}
        return lods.load(name, tiny_flow(family), "a red car", device="cpu", **settings)

    return build


@pytest.mark.parametrize("family, name", of_each(METHODS, "lods-embedding"))
def test_every_method_runs_and_moves_the_pictures(make, family, name):
    assert (trained(make(family, name)) - images()).abs().max() > 1e-3


@pytest.mark.parametrize("family, name", of_each(LEARNING))
def test_two_steps_and_a_resumed_one_are_three_steps(make, family, name, tmp_path):
    def run(method, steps):
        for step in steps:
            torch.manual_seed(step)
            method.step(step)
            method(images(), cameras())
        return method.state_dict()

    whole, first, second = (make(family, name, prior_inner_steps=1) for _ in range(3))
    start = copy.deepcopy(first.state_dict())
    whole.load_state_dict(start)
    wanted = run(whole, range(3))
    torch.save(run(first, range(2)), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    got = run(second, [2])
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(wanted[key], start[key]) for key in start)


@pytest.mark.parametrize("family, name", of_each(LEARNING))
def test_a_learned_part_is_taken_back(make, family, name, tmp_path):
    method = make(family, name)
    trained(method)
    path = method.save(tmp_path / "learned.safetensors")
    with safe_open(path, "pt") as file:
        assert float(file.metadata()["moved"]) > 0
    again = make(family, name)
    again.load(path)
    one = dict(method.named_parameters())
    for key, value in again.named_parameters():
        if "camera" not in key:
            torch.testing.assert_close(value, one[key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_takes_the_lora(make, family, tmp_path):
    import diffusers

    method = make(family, "lods-lora", lora_scale=0.7)
    with torch.no_grad():
        for key, value in method.lora.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    method.save(tmp_path / "lora.safetensors")
    model = method.model
    x_t, t = torch.randn(2, *model.latent_shape), torch.tensor([100, 900])
    texts = model.text(["a car", ""])
    plain = lods.models.load(model.name, "cpu")
    with torch.no_grad():
        want = method.predict_learned(x_t, t, texts)
        assert (want - plain.predict(x_t, t, texts)).abs().max() > 3e-3
        pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(model.name)
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        plain.network = pipeline.transformer
        got = plain.predict(x_t, t, texts)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_change_nothing(make, family):
    def run(**settings):
        torch.manual_seed(0)
        method = make(family, "lods-lora", **settings)
        replaced = [block for block in method.model.network.modules() if "forward" in vars(block)]
        assert bool(replaced) == bool(settings)
        return trained(method)

    torch.testing.assert_close(run(enable_gradient_checkpointing=True), run(), rtol=1e-3, atol=1e-3)
