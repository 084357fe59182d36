"""Models shaped like Stable Diffusion 3 are told what diffusers tells them."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace
from typing import Any

import lods
import pytest
import torch
from lods.models.cards import Location
from lods.models.sd3 import SD3Model, has_t5

from tests.stock_flows import edited, latents_and_plain, load, noisy, token_counts
from threestudio import find

TEXTS = ["a red car", "", "a blue house on the horse"]
CAMERA = [torch.tensor([x, y]) for x, y in ((0.0, 20.0), (30.0, 200.0), (3.6, 3.5))]


def cameras():
    return lods.Cameras(*CAMERA, fovy=torch.tensor([40.0, 42.0]))


@pytest.mark.parametrize("t5", [0, 56])
def test_texts_are_embedded_as_in_diffusers(tiny_sd3, t5):
    from diffusers import StableDiffusion3Pipeline

    folder = tiny_sd3(t5=t5)
    model, none = load(folder), {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **none)
    assert model.text_shape == (16 + 256 + 1, t5 or 48)
    got = model.text(TEXTS)
    assert got.shape == (3, *model.text_shape) and got.dtype == torch.float32
    with torch.no_grad():
        rows, _, pooled, _ = pipeline.encode_prompt(
            TEXTS, TEXTS, TEXTS, device="cpu", do_classifier_free_guidance=False
        )
    parts = model.text_layout.unpack(got)
    torch.testing.assert_close(parts.tokens, rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert bool(parts.tokens[:, 16:].any()) == bool(t5)


@pytest.mark.parametrize("t5, limit", [(0, 16), (56, 256)])
def test_a_text_is_counted_as_cut_where_its_longest_reader_cuts_it(tiny_sd3, t5, limit):
    from transformers import AutoTokenizer

    folder = tiny_sd3(t5=t5)
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder=f"tokenizer_{3 if t5 else 2}")
    fit = limit - len(tokenizer("").input_ids)
    model = load(folder)
    counts = token_counts(model, [" ".join(["car"] * n) for n in (0, fit, fit + 1)])
    rows = model.text_shape[0]
    assert counts == [rows - fit, rows, rows + 1]


def test_both_encoders_of_clip_read_as_many_tokens_as_the_first(tiny_sd3, tmp_path):
    """As the pipeline has it, whatever the second tokenizer says."""
    folder = tiny_sd3()
    other = edited(folder, tmp_path, "tokenizer_2/tokenizer_config.json", model_max_length=12)
    assert torch.equal(load(other).text(TEXTS), load(folder).text(TEXTS))


def test_embeddings_of_another_width_are_others(tiny_sd3, tmp_path):
    folder = tiny_sd3()
    other = edited(folder, tmp_path, "transformer/config.json", joint_attention_dim=64)
    one, two = (SD3Model.text_plan(Location(str(path))) for path in (folder, other))
    assert one.note != two.note


def test_text_encoders_wider_than_the_transformer_are_refused(tiny_sd3, tmp_path):
    folder = edited(tiny_sd3(), tmp_path, "transformer/config.json", joint_attention_dim=36)
    model: Any = SimpleNamespace(name=str(folder), text_plan=SD3Model.text_plan)
    with pytest.raises(ValueError, match="rows of 40, and the transformer takes 36"):
        token_counts(model, TEXTS)


def test_a_shift_that_depends_on_the_size_counts_the_patches(tiny_sd3, tmp_path):
    fields = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    file = "scheduler/scheduler_config.json"
    model = load(edited(tiny_sd3(), tmp_path, file, base_shift=0.5, max_shift=1.1, **fields))
    patches = model.network.pos_embed(noisy(model)).shape[1]
    assert patches == 16
    shift = math.exp(0.5 + (1.1 - 0.5) * (patches - 4) / (64 - 4))
    u = 500.5 / 1000
    sigma = model.schedule.alpha_sigma(torch.tensor([500]))[1].item()
    assert sigma == pytest.approx(shift * u / (1 + (shift - 1) * u), rel=1e-5)


@pytest.mark.parametrize("dual", [False, True])
def test_the_noise_is_of_a_direct_call_of_the_transformer(tiny_sd3, dual):
    model = load(tiny_sd3(dual=dual))
    assert isinstance(model, SD3Model) and model.prediction_type == "flow"
    x_t, t, texts = noisy(model), torch.tensor([20, 980]), model.text(TEXTS[:2])
    s = 3 * (t + 0.5) / 1000 / (1 + 2 * (t + 0.5) / 1000)
    with torch.no_grad():
        v = model.network(
            hidden_states=x_t,
            encoder_hidden_states=texts[:, :-1],
            pooled_projections=texts[:, -1, :40],
            timestep=1000 * s,
        ).sample
        got = model.predict(x_t, t, texts)
    torch.testing.assert_close(got, x_t + (1 - s).view(2, 1, 1, 1) * v, rtol=1e-4, atol=1e-5)
    assert v.abs().max() > 1e-2


def test_the_denoised_latents_are_a_step_of_diffusers_scheduler(tiny_sd3):
    """x - s v, as the scheduler's last step makes it, is what our noise means."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = load(tiny_sd3())
    x_t, t, texts = noisy(model, 1), torch.tensor([400]), model.text(TEXTS[:1])
    alpha, sigma = model.schedule.alpha_sigma(t)
    with torch.no_grad():
        eps = model.predict(x_t, t, texts)
        v = model.call(x_t, t, model.text_layout.unpack(texts))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[sigma.item()])
    want = scheduler.step(v, scheduler.timesteps[0], x_t).prev_sample
    torch.testing.assert_close((x_t - sigma * eps) / alpha, want, rtol=1e-3, atol=1e-4)


def test_pictures_go_through_the_vae_with_its_shift(tiny_sd3):
    got, plain = latents_and_plain(load(tiny_sd3()))
    torch.testing.assert_close(got, (plain - 0.1) * 0.7)


@pytest.mark.parametrize("told", ["words", "tokens", "both"])
def test_cameras_are_rows_after_those_of_the_text(tiny_sd3, told):
    model = load(tiny_sd3(camera_tokens=2), cameras=told)
    x_t, t, texts = noisy(model), torch.tensor([300, 700]), model.text(TEXTS[:2])
    seen = []
    model.network.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.predict(x_t, t, texts, cameras())
        rows = model.camera_tokens(cameras().numbers())
    tokens = texts[:, :-1]
    want = tokens if told == "words" else torch.cat([tokens, rows], dim=1)
    torch.testing.assert_close(seen[0], want)
    if told != "words":
        with pytest.raises(ValueError, match=f"cameras={told}"):
            model.predict(x_t, t, texts)


def test_the_prompt_processor_of_a_run_embeds_the_same(tiny_sd3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny_sd3(t5=56)
    fields = {"pretrained_model_name_or_path": folder, "prompt": TEXTS[0]}
    made = find("lods-prompt-processor")(fields)
    model = load(folder)
    torch.testing.assert_close(made.text_embeddings, model.text(TEXTS[:1]))
    torch.testing.assert_close(made().uncond_text_embeddings, model.text([""]))


def copied(tiny_sd3, tmp_path, **options):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd3(**options), folder)
    return folder


def test_a_folder_without_its_t5_is_refused_and_one_that_names_none_is_not(tiny_sd3, tmp_path):
    folder = copied(tiny_sd3, tmp_path, t5=56)
    shutil.rmtree(folder / "text_encoder_3")
    model = load(str(folder))
    with pytest.raises(ValueError, match="no text_encoder_3, the T5 that its model_index") as error:
        model.text(["a car"])
    assert "\n" not in str(error.value)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert not load(str(folder)).text(["a car"])[:, 16:-1].any()


def test_a_scheduler_of_another_kind_is_refused(tiny_sd3, tmp_path):
    folder = copied(tiny_sd3, tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"shift": "three"}))
    with pytest.raises(ValueError, match=r"the scheduler of .* does not serve: its shift"):
        load(str(folder))
    path.write_text(json.dumps(config | {"_class_name": "DDPMScheduler"}))
    with pytest.raises(ValueError, match="is a DDPMScheduler; a flow has a FlowMatch"):
        load(str(folder))


def test_a_network_that_no_family_serves_is_refused(tiny_sd3, tmp_path):
    folder = copied(tiny_sd3, tmp_path)
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace("SD3Transformer2DModel", "NewTransformerModel"))
    said = r"the transformer of .* is a NewTransformerModel; known are a Flux2Trans"
    with pytest.raises(ValueError, match=said) as error:
        load(str(folder))
    assert "UNet" not in str(error.value)


def test_a_distilled_model_is_refused_with_what_to_take_instead(tiny_sd3, monkeypatch):
    from lods.models import cards

    folder, card = tiny_sd3(), cards.all_cards()["sd35-large-turbo"]
    monkeypatch.setattr("lods.models.latent.resolve", lambda name: Location(folder, None, card))
    model = SD3Model.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"SDS needs a null prediction.*take sd35-large$"):
        lods.methods.find("sds")(model)


def test_a_distilled_card_is_refused_before_it_is_downloaded():
    with pytest.raises(ValueError, match=r"needs a null prediction: sd35-large-turbo was .* take"):
        lods.load("sds", "sd35-large-turbo", "a car", device="cpu")


def test_the_model_that_is_embedded_as_a_flow_is_loaded(tmp_path):
    """A folder as pocket/flow.py writes it, with the camera's words, its tokens, and both."""
    from pocket import flow
    from tests.tiny_models import write_pocket_flow

    folder = write_pocket_flow(tmp_path / "flow")
    assert has_t5(lods.models.cards.resolve(str(folder)))
    for told in ("words", "tokens", "both"):
        model = load(str(folder), cameras=told)
        assert model.text_width == model.text_layout.pooled == sum(flow.WIDTHS)
        texts = model.text(["a car", "a house"])
        assert not texts[:, 16:-1].any() and texts[:, :16].any()  # the silent encoder's
        assert texts.shape[1] == 16 + 16 + 1  # of which there are no more than it says
        given = None if told == "words" else cameras()
        x_t, t = noisy(model), torch.tensor([100, 900])
        eps = model.predict(x_t, t, texts, given)
        assert eps.isfinite().all() and (eps - x_t).abs().max() > 1e-2
        if given is not None:
            turned = model.predict(x_t, t, texts, dataclasses.replace(given, azimuth=-CAMERA[1]))
            assert not torch.allclose(turned, eps)
