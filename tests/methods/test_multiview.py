"""Every method on a tiny random model of four views: steps, one t, files, a resumed run."""

import copy

import lods
import pytest
import torch

from tests.models.test_multiview import around

METHODS = [name for name in lods.methods.names() if name.startswith("lods-")]
LEARNING = ["lods-embedding", "lods-lora", "lods-vsd"]
RESCALED = ["lods-sds", "lods-embedding", "lods-lora"]
OWN = {"lods-bridge": {"bridge_start": 0}, "lods-ucm": {"ucm_random_steps": 0}}


@pytest.fixture(scope="module")
def make(tiny_multiview):
    def build(name, **settings):
        settings = {**OWN.get(name, {}), "cameras": "tokens", **settings}
        return lods.load(name, tiny_multiview(), "a red car", device="cpu", **settings)

    return build


def images(rows=8):
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradient(method, seed=0):
    """Of the pictures' latents."""
    torch.manual_seed(seed)
    z = torch.randn(8, 4, 8, 8).requires_grad_()
    losses = method(latents=z, cameras=around())
    losses.terms["loss_sds"].backward()
    return z.grad


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_over_the_views(make, name):
    method, x = make(name), images().requires_grad_()
    optimizer = torch.optim.Adam([*method.parameters(), x], lr=0.01)
    for step in range(2):
        torch.manual_seed(step)
        method.step(step)
        optimizer.zero_grad()
        losses = method(x, around())
        losses.total.backward()
        assert losses.total.isfinite() and losses.numbers["grad_norm"] > 0
        optimizer.step()
    assert (x.detach() - images()).abs().amax((1, 2, 3)).min() > 1e-3


def test_all_views_have_one_t_and_each_its_noise(make):
    method = make("lods-embedding", lora_n_timestamp_samples=3)
    seen, inner = [], method.model.predict

    def predict(x_t, t, texts, cameras=None):
        seen.append(t)
        return inner(x_t, t, texts, cameras)

    method.model.predict = predict
    try:
        gradient(method)
    finally:
        del method.model.predict
    learned, distilled = seen
    assert len(distilled.unique()) == 1
    groups = learned.reshape(6, 4)
    assert (groups == groups[:, :1]).all() and len(learned.unique()) > 1


@pytest.mark.parametrize("name", RESCALED)
def test_no_rescaling_is_the_plain_gradient(make, name):
    plain, phi0, phi1 = (
        gradient(make(name, weighting_strategy="latent", **more))
        for more in ({}, {"recon_std_rescale": 0.0}, {"recon_std_rescale": 1.0})
    )
    assert torch.equal(plain, phi0)
    assert (plain - phi1).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("name", LEARNING)
def test_two_steps_and_a_resumed_one_are_three_steps(make, name, tmp_path):
    def run(method, steps):
        for step in steps:
            torch.manual_seed(step)
            method.step(step)
            method(images(), around())
        return method.state_dict()

    whole, first, second = (make(name, prior_inner_steps=1) for _ in range(3))
    start = copy.deepcopy(first.state_dict())
    whole.load_state_dict(start)
    wanted = run(whole, range(3))
    torch.save(run(first, range(2)), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    got = run(second, [2])
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(wanted[key], start[key]) for key in start)


def test_a_lora_goes_to_a_file_and_back(make, tmp_path):
    one, two = make("lods-lora"), make("lods-lora")
    for value in one.parameters():
        torch.nn.init.normal_(value, std=0.1)
    one.save(tmp_path / "lora.safetensors")
    two.load(tmp_path / "lora.safetensors")
    for a, b in zip(one.state_dict().values(), two.state_dict().values()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "rows, cameras, message",
    [(6, 6, "6 pictures are no multiple of 4"), (8, None, "sees 4 views at once")],
)
def test_other_batches_are_refused_before_anything_is_encoded(make, rows, cameras, message):
    method = make("lods-sds")
    with pytest.raises(ValueError, match=message):
        method(latents=torch.randn(rows, 4, 8, 8), cameras=cameras and around(cameras))
