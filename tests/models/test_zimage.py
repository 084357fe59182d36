"""Models shaped like Z-Image are told what diffusers tells them."""

import lods
import pytest
import torch
from lods.models.zimage import ZImageModel

from tests.stock_flows import edited, load, noisy, pipeline_of, token_counts

TEXTS = ["a red car", "a blue house and a red car " * 6]


@pytest.fixture(scope="module")
def model(tiny_flow):
    return load(tiny_flow("zimage"))


@pytest.fixture(scope="module")
def stock(tiny_flow):
    """The pipeline of diffusers, with a scheduler that takes a sigma as it is."""
    return pipeline_of("zimage", tiny_flow("zimage"))


@pytest.mark.parametrize("t", [60, 900])
def test_a_step_of_the_stock_pipeline_is_what_the_noise_means(model, stock, t):
    """Texts of two lengths, their format and layer, time, and sign at once, with guidance."""
    assert isinstance(model, ZImageModel) and not model.no_null
    x_t, times = noisy(model), torch.full((2,), t)
    alpha, sigma = (x[0].item() for x in model.schedule.alpha_sigma(times))
    want = stock(
        prompt=list(TEXTS),
        latents=x_t,
        height=16,
        width=16,
        num_inference_steps=1,
        sigmas=[sigma],
        guidance_scale=3.0,  # v_p + 3 (v_p - v_null), a scale of 4 in the words of others
        output_type="latent",
    ).images
    texts = model.text([*TEXTS, ""])
    masks = model.text_layout.unpack(texts).mask.sum(1)
    assert masks[0] < 32 < masks[1] and masks[2] < masks[0]
    with torch.no_grad():
        eps = model.predict(x_t, times, texts[:2])
        null = model.predict(x_t, times, texts[[2, 2]])
    assert (eps - null).abs().amax((1, 2, 3)).min() / alpha > 1e-3
    eps = null + 4 * (eps - null)
    got = x_t - sigma * (eps - x_t) / alpha
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_texts_are_those_of_the_pipeline(model, stock):
    want = stock.encode_prompt(list(TEXTS), do_classifier_free_guidance=False, device="cpu")[0]
    got = model.text_layout.unpack(model.text(TEXTS))
    for rows, mask, each in zip(got.tokens, got.mask, want):
        assert mask[: len(each)].all() and not mask[len(each) :].any()
        torch.testing.assert_close(rows[mask], each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_the_schedule_has_the_folders_shift(tiny_flow, shift):
    assert load(tiny_flow("zimage", shift=shift)).schedule.shift == shift


def test_pictures_of_the_cards_size_are_4096_tokens():
    from types import SimpleNamespace

    config = {"sample_size": 1024, "block_out_channels": (1, 1, 1, 1)}
    vae = SimpleNamespace(config=SimpleNamespace(get=config.get, **config))
    assert ZImageModel.image_tokens(None, vae) == 64 * 64


def test_cameras_are_rows_after_those_of_the_text(tiny_flow):
    model = load(tiny_flow("zimage", camera_tokens=2), cameras="tokens")
    angles = torch.tensor([0.0, 20.0]), torch.tensor([30.0, 200.0])
    cameras = lods.Cameras(*angles, torch.tensor([3.6, 3.5]), fovy=torch.tensor([40.0, 42.0]))
    texts, seen = model.text(TEXTS), []
    model.network.register_forward_pre_hook(lambda _, args: seen.extend(args[2]))
    with torch.no_grad():
        model.predict(noisy(model), torch.tensor([300, 700]), texts, cameras)
        rows = model.camera_tokens(cameras.numbers())
    parts = model.text_layout.unpack(texts)
    for got, tokens, mask, camera in zip(seen, parts.tokens, parts.mask, rows):
        torch.testing.assert_close(got, torch.cat([tokens[mask], camera]))


def test_a_text_that_is_cut_off_is_counted_as_too_long(model):
    counts = token_counts(model, ["car " * 507, "car " * 520, "a car"])
    rows = model.text_shape[0]
    assert counts[0] <= rows < counts[1] and counts[2] < rows


@pytest.mark.parametrize(
    "file, fields, said",
    [
        ("vae/config.json", {"sample_size": 18}, "sample_size is 18, not a multiple of 4 up to"),
        (
            "text_encoder/config.json",
            {"model_type": "llama"},
            "is a llama, and Z-Image has a",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tiny_flow, tmp_path, file, fields, said):
    folder = edited(tiny_flow("zimage"), tmp_path, file, **fields)
    with pytest.raises(ValueError, match=said) as error:
        load(folder).text(["a car"])
    assert "\n" not in str(error.value)


def test_a_model_that_is_told_pictures_is_refused(model):
    from diffusers import ZImageTransformer2DModel

    config = {**model.network.config, "siglip_feat_dim": 8}
    omni = ZImageTransformer2DModel.from_config(config)
    with pytest.raises(ValueError, match=r"told pictures beside the text .* take z-image$"):
        ZImageModel(omni, model.vae, {}, name="x")


def test_the_distilled_card_is_refused_before_it_is_downloaded():
    said = "needs a null prediction: z-image-turbo was .* take z-image$"
    with pytest.raises(ValueError, match=said):
        lods.load("sds", "z-image-turbo", "a car", device="cpu")
