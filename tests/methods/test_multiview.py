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
