"""Models that are told cameras: what the network gets, and what is refused."""

import json

import lods
import pytest
import torch
from lods.cameras import Cameras
from lods.models import families
from lods.models.camera_tokens import CameraTokens

from tests.hostile import one_line
from tests.tiny_models import make_tiny_sd, write_camera_encoder

TOKENS = 2


@pytest.fixture(scope="module", params=[None, "sdxl"])
def folder(request, tmp_path_factory):
    return str(make_tiny_sd(tmp_path_factory.mktemp("model"), request.param, camera_tokens=TOKENS))


def cameras(n=2, **changes):
    numbers = {
        "elevation": torch.linspace(-10, 70, n),
        "azimuth": torch.linspace(-150, 130, n),
        "distance": torch.linspace(3.3, 3.9, n),
        "fovy": torch.linspace(37, 43, n),
    }
    return Cameras(**{**numbers, **changes})


def inputs(model, n=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, *model.latent_shape, generator=generator)
    return x_t, torch.tensor([300, 800])[:n], model.text(["a red car", "a house"][:n])


def seen_by_the_unet(model, *given):
    """The text rows that the UNet is called with, and what comes out."""
    seen = []
    hook = model.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        out = model.predict(*given)
    hook.remove()
    (rows,) = seen
    return rows, out


@pytest.mark.parametrize("told", ["tokens", "both"])
def test_the_rows_of_the_cameras_come_after_those_of_the_tokens(folder, told):
    model = lods.models.load(folder, "cpu", cameras=told)
    x_t, t, texts = inputs(model)
    rows, _ = seen_by_the_unet(model, x_t, t, texts, cameras())
    tokens = texts[:, : texts.shape[1] - model.pooled_rows]
    assert torch.equal(rows[:, :-TOKENS], tokens)
    wanted = CameraTokens.load(folder)(cameras().numbers())
    assert torch.equal(rows[:, -TOKENS:], wanted)
    assert model.text_shape == tuple(texts.shape[1:])  # without the cameras


def test_by_words_the_network_is_what_it_was_without_an_encoder(folder):
    model = lods.models.load(folder, "cpu")
    x_t, t, texts = inputs(model)
    rows, alone = seen_by_the_unet(model, x_t, t, texts)
    assert rows.shape[1] == texts.shape[1] - model.pooled_rows
    assert torch.equal(seen_by_the_unet(model, x_t, t, texts, cameras())[1], alone)
    told = lods.models.load(folder, "cpu", cameras="tokens")
    assert (seen_by_the_unet(told, x_t, t, texts, cameras())[1] - alone).abs().max() > 1e-2


def test_each_row_has_a_camera_of_its_own(folder):
    model = lods.models.load(folder, "cpu", cameras="tokens")
    x_t, t, texts = inputs(model)
    _, both = seen_by_the_unet(model, x_t, t, texts, cameras())
    for i in range(2):
        one = Cameras(**{k: v[[i]] for k, v in vars(cameras()).items() if v is not None})
        _, alone = seen_by_the_unet(model, x_t[[i]], t[[i]], texts[[i]], one)
        torch.testing.assert_close(alone, both[[i]], rtol=1e-4, atol=1e-5)


def test_the_encoder_is_frozen_and_gradients_go_through_texts_and_latents(folder):
    model = lods.models.load(folder, "cpu", cameras="tokens")
    x_t, t, texts = inputs(model)
    x_t.requires_grad_(), texts.requires_grad_()
    model.predict(x_t, t, texts, cameras()).square().sum().backward()
    assert x_t.grad.any() and texts.grad.any()
    assert not any(p.requires_grad for p in model.camera_tokens.parameters())


def test_without_cameras_it_is_one_line(folder):
    model = lods.models.load(folder, "cpu", cameras="tokens")
    with pytest.raises(ValueError, match="cameras=tokens the model is told the camera") as caught:
        model.predict(*inputs(model))
    one_line(caught)
    with pytest.raises(ValueError, match=r"fovy=\.\.\.\), one a row, in degrees") as caught:
        model.predict(*inputs(model), cameras(fovy=None))
    one_line(caught)
    with pytest.raises(ValueError, match="there are 3 cameras for 2 pictures"):
        model.predict(*inputs(model), cameras(3))


@pytest.mark.parametrize("told", ["tokens", "both"])
def test_a_model_without_an_encoder_is_refused_before_its_weights_load(tiny_sd, monkeypatch, told):
    monkeypatch.setattr("lods.models.latent.load_weights", lambda *a: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="has no folder camera_encoder: set cameras=words") as info:
        lods.models.load(tiny_sd(), "cpu", cameras=told)
    assert f"cameras={told} needs a model with an encoder of cameras" in one_line(info)


def test_another_word_for_what_it_is_told_is_refused(folder):
    with pytest.raises(ValueError, match="cameras must be one of words, tokens, both, not 'token'"):
        lods.models.load(folder, "cpu", cameras="token")


def test_rows_of_another_width_are_refused(tmp_path):
    folder = make_tiny_sd(tmp_path)
    write_camera_encoder(folder, 24)
    with pytest.raises(ValueError, match="rows of 24 numbers, and the UNet takes 32") as caught:
        lods.models.load(str(folder), "cpu")
    one_line(caught)


def test_a_damaged_encoder_is_refused_with_the_model(tmp_path):
    folder = make_tiny_sd(tmp_path, camera_tokens=1)
    (folder / "camera_encoder" / "config.json").write_text(json.dumps({"width": 32}))
    with pytest.raises(ValueError, match="does not describe an encoder of cameras") as caught:
        lods.models.load(str(folder), "cpu")
    one_line(caught)


def test_another_model_for_the_lora_needs_an_encoder_too(folder, tiny_sd):
    model = lods.models.load(folder, "cpu", cameras="tokens")
    assert model.sibling(folder).cameras == "tokens"
    with pytest.raises(ValueError, match=f"{tiny_sd()!r} has no folder camera_encoder"):
        model.sibling(tiny_sd())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"fovy": torch.deg2rad(torch.linspace(37, 43, 2))}, "fovy is 0.646"),
        ({"distance": torch.tensor([3.6, 1.5])}, "distance is 1.5"),
        ({"distance": torch.tensor([3.6, float("nan")])}, "distance is nan"),
    ],
)
def test_a_camera_that_it_has_not_been_trained_with_is_said_once(
    folder, monkeypatch, changes, said
):
    told = []
    monkeypatch.setattr("lods.models.latent.log.warn", told.append)
    model = lods.models.load(folder, "cpu", cameras="tokens")
    for _ in range(2):
        model.predict(*inputs(model), cameras(**changes))
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


def test_stock_diffusers_loads_the_folder_and_ignores_the_encoder(tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = make_tiny_sd(tmp_path, camera_tokens=TOKENS)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    model = lods.models.load(str(folder), "cpu")
    x_t, t, texts = inputs(model)
    with torch.no_grad():
        wanted = pipeline.unet(x_t, t, texts).sample
    torch.testing.assert_close(seen_by_the_unet(model, x_t, t, texts)[1], wanted)


def test_a_family_from_outside_that_is_not_told_cameras_is_not_asked_to_be(monkeypatch):
    from tests.ideal_model import IdealModel

    monkeypatch.setitem(families.FAMILIES, "mine", lambda name, device, s: IdealModel(name, device))
    with pytest.raises(ValueError, match="cameras=words, and cameras=tokens is wanted") as caught:
        lods.models.load("mine", "cpu", cameras="tokens")
    one_line(caught)
    assert lods.models.load("mine", "cpu").cameras == "words"
