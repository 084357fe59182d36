"""Models shaped like FLUX.1 are told what diffusers tells them."""

import lods
import pytest
import torch
from lods.models.flow import pack, unpack
from lods.models.flux import GUIDANCE, FluxModel

from tests.stock_flows import edited, latents_and_plain, load, noisy, pipeline_of, token_counts

TEXTS = ["a red car", "a blue house"]


@pytest.fixture(scope="module")
def model(tiny_flow):
    return load(tiny_flow("flux"))


def step_of_pipeline(pipeline, model, x_t, t, **how):
    """The latents after one step from timestep ``t`` to no noise."""
    packed = pipeline._pack_latents(x_t, *x_t.shape)
    u = (t + 0.5) / model.schedule.steps
    size = model.image_size
    given = {"height": size, "width": size, "num_inference_steps": 1, "sigmas": [u]}
    out = pipeline(latents=packed, output_type="latent", **given, **how).images
    return pipeline._unpack_latents(out, size, size, pipeline.vae_scale_factor)


def denoised(model, x_t, t, v):
    return x_t - model.schedule.alpha_sigma(torch.tensor([t]))[1] * v


def velocity(model, x_t, t, texts):
    with torch.no_grad():
        eps = model.predict(x_t, torch.full((len(x_t),), t), texts)
    return (eps - x_t) / model.schedule.alpha_sigma(torch.tensor([t]))[0]


@pytest.mark.parametrize("t", [60, 900])
def test_a_step_of_the_stock_pipeline_is_what_the_noise_means(model, t):
    """Texts, packing, ids, time, shift and sign at once, with true guidance."""
    assert isinstance(model, FluxModel) and not model.no_null
    x_t, embedded = noisy(model), model.text([*TEXTS, ""])
    want = step_of_pipeline(
        pipeline_of("flux", model.name, unshifted=False),
        model,
        x_t,
        t,
        prompt=TEXTS,
        negative_prompt=["", ""],
        true_cfg_scale=4.0,
    )
    v = velocity(model, x_t, t, embedded[:2])
    null = velocity(model, x_t, t, embedded[[2, 2]])
    assert (v - null).abs().max() > 1e-2
    got = denoised(model, x_t, t, null + 4 * (v - null))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_model_that_is_told_a_guidance_scale_has_no_null(tiny_flow):
    folder = tiny_flow("flux", guided=True)
    model = load(folder)
    with pytest.raises(ValueError, match=r"SDS needs a null.*guidance_embeds.*take openflux1$"):
        lods.methods.find("sds")(model)
    x_t = noisy(model)
    how = {"prompt": TEXTS, "guidance_scale": GUIDANCE}
    want = step_of_pipeline(pipeline_of("flux", folder, unshifted=False), model, x_t, 500, **how)
    got = denoised(model, x_t, 500, velocity(model, x_t, 500, model.text(TEXTS)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("card", ["flux1-dev", "flux1-schnell"])
def test_a_distilled_card_is_refused_before_it_is_downloaded(card):
    with pytest.raises(ValueError, match=f"needs a null prediction: {card} was .* take openflux1"):
        lods.load("sds", card, "a car", device="cpu")


def test_packed_latents_are_those_of_diffusers():
    from diffusers import FluxPipeline

    z = torch.randn(2, 3, 6, 4)
    packed = pack(z)
    assert torch.equal(packed, FluxPipeline._pack_latents(z, 2, 3, 6, 4))
    assert torch.equal(unpack(packed, 6), z)


def test_pictures_go_through_the_vae_with_its_shift(model):
    got, plain = latents_and_plain(model)
    torch.testing.assert_close(got, (plain - 0.1) * 0.7)


def test_a_tiny_autoencoder_has_the_size_of_the_models_own(tiny_flow, tmp_path):
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    vae.save_pretrained(tmp_path)
    model = load(tiny_flow("flux"), model_vae=str(tmp_path))
    assert type(model.vae) is AutoencoderTiny and model.image_size == 16
    with torch.no_grad():
        assert model.encode(torch.rand(1, 3, 16, 16)).shape == (1, *model.latent_shape)
    with pytest.raises(ValueError, match="AutoencoderTiny, has patch_size None"):
        load(tiny_flow("flux2"), model_vae=str(tmp_path))


def test_a_text_that_t5_cuts_off_is_counted_as_too_long(model):
    counts = token_counts(model, ["car " * 510, "car " * 511, "a car"])
    rows = model.text_shape[0]
    assert counts[0] == rows and counts[1] == rows + 1 and counts[2] < rows


def test_cameras_are_rows_after_those_of_the_text(tiny_flow):
    model = load(tiny_flow("flux", camera_tokens=2), cameras="tokens")
    cameras = lods.Cameras(
        torch.tensor([0.0, 20.0]),
        torch.tensor([30.0, 200.0]),
        torch.tensor([3.6, 3.5]),
        fovy=torch.tensor([40.0, 42.0]),
    )
    x_t, t, texts, seen = noisy(model), torch.tensor([300, 700]), model.text(TEXTS), []
    model.network.register_forward_pre_hook(
        lambda _, args, given: seen.append(given), with_kwargs=True
    )
    with torch.no_grad():
        model.predict(x_t, t, texts, cameras)
        rows = model.camera_tokens(cameras.numbers())
    want = torch.cat([model.text_layout.unpack(texts).tokens, rows], dim=1)
    torch.testing.assert_close(seen[0]["encoder_hidden_states"], want)
    assert seen[0]["txt_ids"].shape == (512 + rows.shape[1], 3)


@pytest.mark.parametrize("size", [[16, 16], 18, 10**6, 0])
def test_a_vae_of_a_size_that_cannot_be_is_refused(tiny_flow, tmp_path, size):
    folder = edited(tiny_flow("flux"), tmp_path, "vae/config.json", sample_size=size)
    with pytest.raises(ValueError, match=r"sample_size is .*, not a multiple of 4 up to") as e:
        load(folder)
    assert "\n" not in str(e.value)
