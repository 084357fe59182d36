"""Every method on a tiny random model of four views: steps, one t, files, a resumed run."""

import functools

import lods
import pytest
import torch

from tests.few_steps import LEARNING, METHODS, OWN, check_resuming, images, trained
from tests.models.test_multiview import around

RESCALED = ["lods-sds", "lods-embedding", "lods-lora"]


@pytest.fixture(scope="module")
def make(tiny_multiview):
    def build(name, **settings):
        settings = {**OWN.get(name, {}), "cameras": "tokens", **settings}
        return lods.load(name, tiny_multiview(), "a red car", device="cpu", **settings)

    return build


def gradient(method, seed=0):
    """Of the pictures' latents."""
    torch.manual_seed(seed)
    z = torch.randn(8, 4, 8, 8).requires_grad_()
    losses = method(latents=z, cameras=around())
    losses.terms["loss_sds"].backward()
    return z.grad


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_over_the_views(make, name):
    x = trained(make(name), x=images(8), seen=around())
    assert (x - images(8)).abs().amax((1, 2, 3)).min() > 1e-3


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


def test_the_views_of_an_object_have_one_later_time(make):
    """Of ASD, whose distance to it is drawn."""
    method = make("lods-asd", asd_shift=0.5)
    later = method.later(torch.full((8,), 500)).reshape(2, 4)
    assert (later == later[:, :1]).all() and later[0, 0] != later[1, 0]


def test_the_spread_is_that_of_all_views(make):
    """By hand: with phi = 1 each object's clean images are scaled by one factor."""
    method, seen = make("lods-sds", weighting_strategy="latent", recon_std_rescale=1.0), []
    method.model.predict = lambda x, t, *more: seen.append((x, t)) or inner(x, t, *more)
    inner = type(method.model).predict.__get__(method.model)
    try:
        got = 8 * gradient(method)
    finally:
        del method.model.predict
    torch.manual_seed(0)
    z, (x, t) = torch.randn(8, 4, 8, 8), seen[0]
    conditions = method.prompts.conditions(around())
    with torch.no_grad():
        texts = torch.cat([conditions.prompt, conditions.null])
        eps_c, eps_u = method.model.predict(x, t, texts, around().repeat(2)).chunk(2)
    alpha, sigma = (each[:8].view(8, 1, 1, 1) for each in method.model.schedule.alpha_sigma(t))
    plain, guided = (
        (x[:8] - sigma * eps) / alpha for eps in (eps_c, eps_u + 7.5 * (eps_c - eps_u))
    )
    factor = plain.reshape(2, -1).std(1) / guided.reshape(2, -1).std(1)
    want = z - guided * factor.repeat_interleave(4).view(8, 1, 1, 1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


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
    build = functools.partial(make, name, prior_inner_steps=1)
    check_resuming(build, tmp_path / "state.pt", images(8), around())


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
