"""Every method on every model family: two steps, files, a resumed run, exports.

``benchmarks/model_methods.py`` runs these and makes the table of docs/model-methods.md of what they
note, so that a cell says no more than was asserted here.
"""

import copy

import lods
import pytest
import torch
from safetensors import safe_open

from tests.conftest import made_once
from tests.families import FAMILIES
from tests.few_steps import METHODS, OWN, source_of

# one fast case for each family; those of sd and sd3 have tests of their own
QUICK = [("flux", "lods-embedding"), ("flux2", "lods-embedding"), ("sana", "lods-embedding")]
QUICK += [("sana", "lods-lora"), ("pixart", "lods-lora")]
CELLS = [
    pytest.param(family, name, marks=[] if (family, name) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for name in METHODS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    makers = {
        name: made_once(tmp_path_factory, name, family.make) for name, family in FAMILIES.items()
    }
    return lambda name: makers[name](**FAMILIES[name].options)


class Run:
    """A method, the pictures that it is given, and what moves both."""

    def __init__(self, folder, name, **more):
        settings = {**OWN.get(name, {}), **more}
        self.method = lods.load(name, folder, "a red car", device="cpu", **settings)
        size = self.method.model.image_size
        pictures = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.start = pictures
        self.pictures = pictures.clone().requires_grad_()
        eye = torch.eye(4).expand(2, 4, 4)
        fovy = torch.full((2,), 40.0)
        self.cameras = lods.Cameras(*torch.zeros(3, 2), c2w=eye, mvp=eye, fovy=fovy)
        self.optimizer = torch.optim.Adam([*self.method.parameters(), self.pictures], lr=0.01)

    def step(self, number):
        torch.manual_seed(number)
        self.method.step(number)
        self.optimizer.zero_grad()
        losses = self.method(self.pictures, self.cameras, **source_of(self.method))
        losses.total.backward()
        assert losses.total.isfinite() and losses.numbers["grad_norm"] > 0
        self.optimizer.step()

    def state(self):
        method, optimizer = self.method.state_dict(), self.optimizer.state_dict()
        return {"method": method, "optimizer": optimizer, "pictures": self.pictures.detach()}

    def take(self, state):
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            self.pictures.copy_(state["pictures"])


@pytest.mark.parametrize("family, name", CELLS)
def test_a_method_on_a_family(folders, tmp_path, record_property, family, name):
    folder = folders(family)
    run, whole = Run(folder, name), Run(folder, name)
    whole.take(copy.deepcopy(run.state()))  # a LoRA starts at random
    did = ["ran"]
    for number in range(2):
        run.step(number)
        whole.step(number)
    assert (run.pictures.detach() - run.start).abs().max() > 1e-3

    torch.save(run.state(), tmp_path / "state.pt")
    again = Run(folder, name)
    again.take(torch.load(tmp_path / "state.pt", weights_only=True))
    again.step(2)
    whole.step(2)
    assert torch.equal(again.pictures, whole.pictures)
    for key, value in whole.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[key], value), key
    did.append("resumed")

    method = run.method
    if path := method.save(tmp_path / "learned.safetensors"):
        with safe_open(path, "pt") as file:
            assert float(file.metadata()["moved"]) > 0
        other = Run(folder, name).method
        other.load(path)
        learned = dict(method.named_parameters())
        for key, value in other.named_parameters():
            if "camera" not in key:  # which is not in a LoRA's file
                torch.testing.assert_close(value, learned[key], rtol=1e-5, atol=1e-6)
        did.append("saved")
    if lora := getattr(method, "lora", None):
        with torch.no_grad():
            for key, value in lora.named_parameters():
                if "lora_B" in key:
                    value.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        method.save(path)
        check_export(FAMILIES[family], folder, method, path)
        did.append("exported")
    record_property("cell", f"{family} {name} {' '.join(did)}")


def check_export(family, folder, method, path):
    """Stock diffusers' network with the file predicts what ours does with the LoRA."""
    model = method.model
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *model.latent_shape, generator=generator)
    t = torch.tensor([100, 900])
    texts = model.text(["a car", ""])
    stock = lods.models.load(folder, "cpu")
    stock.network = family.network_with_lora(folder, path)
    with torch.no_grad():
        plain = model.predict(x_t, t, texts)
        with method.lora.strength(method.cfg.lora_scale):
            want = model.predict(x_t, t, texts)
        got = stock.predict(x_t, t, texts)
    assert (want - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_change_nothing(folders, family):
    pictures = []
    for settings in ({}, {"enable_gradient_checkpointing": True}):
        torch.manual_seed(0)
        run = Run(folders(family), "lods-lora", **settings)
        replaced = [each for each in run.method.model.network.modules() if "forward" in vars(each)]
        assert bool(replaced) == bool(settings)
        for number in range(2):
            run.step(number)
        pictures.append(run.pictures.detach())
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)
