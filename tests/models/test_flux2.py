"""Models shaped like FLUX.2 [klein] base are told what diffusers tells them."""

import json
import shutil

import lods
import pytest
import torch
from lods.models.flux2 import Flux2Model, shift_of

TEXTS = ["a red car", "a blue house"]


def load(folder, **settings):
    return lods.models.load(str(folder), "cpu", **settings)


@pytest.fixture(scope="module")
def model(tiny_flow):
    return load(tiny_flow("flux2"))


@pytest.fixture(scope="module")
def stock(tiny_flow):
    """The pipeline of diffusers, with a scheduler that takes a sigma as it is."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(
        tiny_flow("flux2"), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noisy(model, rows=2):
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))


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
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.manual_seed(0)
        got = model.encode(images)
        torch.manual_seed(0)
        plain = model.vae.encode(images * 2 - 1).latent_dist.sample()
        c, y, x = 3, 1, 2  # one number of all, by hand
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            channel = 4 * c + 2 * dy + dx
            mean, variance = (
                s[channel] for s in (model.vae.bn.running_mean, model.vae.bn.running_var)
            )
            one = (plain[1, c, 2 * y + dy, 2 * x + dx] - mean) / (variance + 1e-4).sqrt()
            torch.testing.assert_close(got[1, channel, y, x], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.to_vae(got), plain, rtol=1e-4, atol=1e-5)
        want = (model.vae.decode(plain).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(model.decode(got), want, rtol=1e-4, atol=1e-4)


def test_a_distilled_folder_is_refused_with_what_to_take(tiny_flow):
    model = load(tiny_flow("flux2", distilled=True))
    with pytest.raises(ValueError, match=r"SDS needs a null.*is_distilled.*flux2-klein-base-4b$"):
        lods.methods.find("sds")(model)


def test_a_transformer_that_is_told_a_guidance_scale_is_refused(tiny_flow):
    with pytest.raises(ValueError, match=r"guidance_embeds.*: take flux2-klein-base-4b$"):
        load(tiny_flow("flux2", guided=True))


@pytest.mark.parametrize("field, value", [("model_type", "mistral3"), ("num_hidden_layers", 20)])
def test_another_language_model_is_refused(tiny_flow, tmp_path, field, value):
    folder = tmp_path / "model"
    shutil.copytree(tiny_flow("flux2"), folder)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text()) | {field: value}
    config["layer_types"] = config.get("layer_types", [])[: config["num_hidden_layers"]]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is a mistral3, and FLUX|has 20 layers") as error:
        load(folder).text(["a car"])
    assert "\n" not in str(error.value)


def test_a_distilled_card_is_refused_before_it_is_downloaded():
    with pytest.raises(ValueError, match=r"null prediction: flux2-klein-4b was .* take flux2"):
        lods.load("sds", "flux2-klein-4b", "a car", device="cpu")
