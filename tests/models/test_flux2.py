"""Models shaped like FLUX.2 [klein] base are told what diffusers tells them."""

import lods
import pytest
import torch
from lods.models.flux2 import Flux2Model, shift_of

from tests.stock_flows import edited, latents_and_plain, load, noisy, pipeline_of

TEXTS = ["a red car", "a blue house"]


@pytest.fixture(scope="module")
def model(tiny_flow):
    return load(tiny_flow("flux2"))


@pytest.fixture(scope="module")
def stock(tiny_flow):
    """The pipeline of diffusers, with a scheduler that takes a sigma as it is."""
    return pipeline_of("flux2", tiny_flow("flux2"))


@pytest.mark.parametrize("t", [60, 900])
def test_a_step_of_the_stock_pipeline_is_what_the_noise_means(model, stock, t):
    """Texts, packing, ids, time, sign, and the VAE's statistics at once, with guidance."""
    assert isinstance(model, Flux2Model) and not model.no_null
    assert model.latent_shape == (16, 4, 4) and model.image_size == 16
    x_t, times = noisy(model), torch.full((2,), t)
    alpha, sigma = (x[0].item() for x in model.schedule.alpha_sigma(times))
    want = stock(
        prompt=TEXTS,
        latents=x_t,
        height=16,
        width=16,
        num_inference_steps=1,
        sigmas=[sigma],
        guidance_scale=4.0,
        output_type="latent",
    ).images
    texts = model.text([*TEXTS, ""])
    with torch.no_grad():
        eps = model.predict(x_t, times, texts[:2])
        null = model.predict(x_t, times, texts[[2, 2]])
    assert (eps - null).abs().max() / alpha > 1e-3
    eps = null + 4 * (eps - null)
    got = model.to_vae(x_t - sigma * (eps - x_t) / alpha)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", [16, 1024, 4096, 5000])
def test_the_shift_is_that_of_the_pipeline_at_its_steps(tokens):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    assert shift_of(tokens) == pytest.approx(compute_empirical_mu(tokens, 50), rel=1e-6)


def test_the_schedule_has_that_shift(model):
    assert model.schedule.shift == pytest.approx(torch.tensor(shift_of(16)).exp().item())


def test_latents_are_the_vaes_over_its_statistics_and_back(model):
    got, plain = latents_and_plain(model)
    statistics = model.vae.bn.running_mean, model.vae.bn.running_var
    c, y, x = 3, 1, 2  # one number of all, by hand
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        channel = 4 * c + 2 * dy + dx
        mean, variance = (each[channel] for each in statistics)
        one = (plain[1, c, 2 * y + dy, 2 * x + dx] - mean) / (variance + 1e-4).sqrt()
        torch.testing.assert_close(got[1, channel, y, x], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.to_vae(got), plain, rtol=1e-4, atol=1e-5)


def test_a_distilled_folder_is_refused_with_what_to_take(tiny_flow):
    model = load(tiny_flow("flux2", distilled=True))
    with pytest.raises(ValueError, match=r"SDS needs a null.*is_distilled.*flux2-klein-base-4b$"):
        lods.methods.find("sds")(model)


def test_a_transformer_that_is_told_a_guidance_scale_is_refused(tiny_flow):
    with pytest.raises(ValueError, match=r"guidance_embeds.*: take flux2-klein-base-4b$"):
        load(tiny_flow("flux2", guided=True))


@pytest.mark.parametrize("field, value", [("model_type", "mistral3"), ("num_hidden_layers", 20)])
def test_another_language_model_is_refused(tiny_flow, tmp_path, field, value):
    layers = value if field == "num_hidden_layers" else 28
    more = {field: value, "layer_types": ["full_attention"] * layers}
    folder = edited(tiny_flow("flux2"), tmp_path, "text_encoder/config.json", **more)
    with pytest.raises(ValueError, match=r"is a mistral3, and FLUX|has 20 layers") as error:
        load(folder).text(["a car"])
    assert "\n" not in str(error.value)


def test_a_distilled_card_is_refused_before_it_is_downloaded():
    with pytest.raises(ValueError, match=r"null prediction: flux2-klein-4b was .* take flux2"):
        lods.load("sds", "flux2-klein-4b", "a car", device="cpu")
