"""View-dependent prompts, Perp-Neg, and the embedding cache, on a tiny random text model."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import threestudio
from threestudio.models.prompt_processors.base import shift_azimuth_deg
from threestudio.models.prompt_processors.stable_diffusion_prompt_processor import (
    StableDiffusionPromptProcessor as Processor,
)
from threestudio.utils.errors import UserError

SIDE, FRONT, BACK, OVERHEAD = range(4)
VIEWS = ["side", "front", "back", "overhead"]


@pytest.fixture
def make(tiny_sd, tmp_path, monkeypatch):
    """``make(prompt=..., ...) -> processor``, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    model = tiny_sd(tokens=24)

    def build(**cfg):
        return Processor({"pretrained_model_name_or_path": model, "prompt": "a red car", **cfg})

    return build


@pytest.fixture
def messages(caplog, monkeypatch):
    monkeypatch.setattr(threestudio.logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger=threestudio.logger.name)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def cameras(*rows):
    """Elevation, azimuth, distance tensors from (elevation, azimuth) pairs."""
    e, a = torch.tensor(rows, dtype=torch.float32).T
    return e, a, torch.ones(len(rows))


def reference(model, texts):
    """Embeddings by transformers alone."""
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").eval()
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids)[0]


# --- directions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directions(tiny_sd):
    """``directions(elevation, azimuth, distance)``: the index of the view of each camera."""
    cfg = {"pretrained_model_name_or_path": tiny_sd(tokens=24), "prompt": "a red car"}
    return Processor({**cfg, "use_cache": False})().direction_indices


@pytest.mark.parametrize(
    ("azimuth", "view"),
    [
        (0, FRONT),
        (44.99, FRONT),
        (45, SIDE),  # strict
        (-44.99, FRONT),
        (-45, SIDE),
        (90, SIDE),
        (135, SIDE),
        (135.01, BACK),
        (-135, SIDE),
        (-135.01, BACK),
        (180, BACK),  # wraps to -180
        (-180, BACK),
        (315.01, FRONT),  # 360 - 44.99
        (315, SIDE),
        (360, FRONT),
        (225, SIDE),
        (224.99, BACK),
        (-360, FRONT),
        (500, BACK),
    ],
)
def test_direction_by_azimuth(directions, azimuth, view):
    for elevation, expected in ((60, view), (60.01, OVERHEAD), (-20, view)):
        assert directions(*cameras((elevation, azimuth))).tolist() == [expected]


def test_thresholds_are_options(make):
    utils = make(front_threshold=10, back_threshold=100, overhead_threshold=20)()
    index = utils.direction_indices(*cameras((0, 9), (0, 10), (0, 81), (0, -81), (21, 0)))
    assert index.tolist() == [FRONT, SIDE, BACK, BACK, OVERHEAD]
    assert utils.direction2idx == {"side": 0, "front": 1, "back": 2, "overhead": 3}


def test_azimuth_wraps_to_minus_180():
    angles = torch.tensor([-540.0, -180, 0, 179, 180, 190, 540])
    assert shift_azimuth_deg(angles).tolist() == [-180, -180, 0, 179, -180, -170, -180]


def test_view_texts(make):
    assert make().prompts_vd == [f"a red car, {v} view" for v in VIEWS]
    front = make(view_dependent_prompt_front=True)
    assert front.prompts_vd == [
        "side view of a red car",
        "front view of a red car",
        "backside view of a red car",
        "overhead view of a red car",
    ]
    manual = make(prompt_back="a blue chair", prompt_side="", negative_prompt="photo")
    assert manual.prompts_vd == [
        "a red car, side view",
        "a red car, front view",
        "a blue chair",
        "a red car, overhead view",
    ]
    assert manual.negative_prompts_vd == ["photo"] * 4


# --- embeddings ---------------------------------------------------------------------------------


def test_embeddings_are_the_models_and_the_condition_comes_first(make, tiny_sd):
    processor = make(negative_prompt="photo")
    utils = processor()
    assert utils.prompt == "a red car"
    where = cameras((0, 0), (0, 90), (0, 180), (80, 0), (0, 10))
    out = utils.get_text_embeddings(*where)
    texts = [f"a red car, {v} view" for v in ("front", "side", "back", "overhead", "front")]
    expected = reference(tiny_sd(tokens=24), texts + ["photo"] * 5)
    torch.testing.assert_close(out.cpu(), expected)
    assert out.device.type == processor.device.type and not out.requires_grad
    # the five rows differ, so that a wrong order would show
    assert (expected[0] - expected[1]).abs().max() > 0.01
    plain = utils.get_text_embeddings(*where, view_dependent_prompting=False)
    torch.testing.assert_close(
        plain.cpu(), reference(tiny_sd(tokens=24), ["a red car"] * 5 + ["photo"] * 5)
    )


def test_width_and_tokens_are_the_models(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_sd(width=48, tokens=12)
    utils = Processor({"pretrained_model_name_or_path": model, "prompt": "a house"})()
    assert utils.text_embeddings_vd.shape == (4, 12, 48)


def test_calling_it_again_is_cheap(make, monkeypatch):
    processor = make()
    monkeypatch.setattr(Processor, "encode", None)
    assert processor().text_embeddings is processor().text_embeddings


def test_all_texts_are_encoded_in_one_call(make, monkeypatch):
    calls = []
    encode = Processor.encode
    monkeypatch.setattr(
        Processor, "encode", lambda s, texts: calls.append(texts) or encode(s, texts)
    )
    make(negative_prompt="photo")
    assert len(calls) == 1 and len(calls[0]) == len(set(calls[0])) == 6


def perp_neg(utils, elevation, azimuth):
    """The definition, for one camera: positive, two negatives, two weights."""
    emb = dict(zip(VIEWS, utils.text_embeddings_vd))

    def f(abc, r):
        return abc[0] * torch.exp(torch.tensor(-abc[1] * r)).item() + abc[2]

    turn = abs((azimuth + 180) % 360 - 180)
    uncond = utils.uncond_text_embeddings_vd[0]
    if elevation > 60:
        return emb["overhead"], (uncond, uncond), (0.0, 0.0)
    if turn < 90:
        r = 1 - turn / 90
        positive = r * emb["front"] + (1 - r) * emb["side"]
        weights = -f(utils.perp_neg_f_fs, r), -f(utils.perp_neg_f_sf, 1 - r)
        return positive, (emb["front"], emb["side"]), weights
    r = 2 - turn / 90
    positive = r * emb["side"] + (1 - r) * emb["back"]
    weights = -f(utils.perp_neg_f_sb, r), -f(utils.perp_neg_f_fsb, r)
    return positive, (emb["side"], emb["front"]), weights


def test_perp_neg_is_its_definition(make):
    utils = make(
        negative_prompt="photo",
        perp_neg_f_sb=[1, 0.5, -0.6],
        perp_neg_f_fsb=[2, 0.7, 0.9],
        perp_neg_f_fs=[4, 0.4, -2.4],
        perp_neg_f_sf=[3, 0.6, -1.1],
    )()
    rows = [(0, 0), (0, 30), (0, -75), (0, 90), (10, 120), (0, -170), (0, 345), (70, 20)]
    embeddings, weights = utils.get_text_embeddings_perp_neg(*cameras(*rows))
    n = len(rows)
    assert embeddings.shape[0] == 4 * n and weights.shape == (n, 2)
    positive, uncond, negatives = embeddings.split([n, n, 2 * n])
    for i, (elevation, azimuth) in enumerate(rows):
        p, negative, w = perp_neg(utils, elevation, azimuth)
        torch.testing.assert_close(positive[i], p)
        torch.testing.assert_close(uncond[i], utils.uncond_text_embeddings_vd[0])
        torch.testing.assert_close(negatives[2 * i], negative[0])
        torch.testing.assert_close(negatives[2 * i + 1], negative[1])
        assert weights[i].tolist() == pytest.approx(w, abs=1e-6)


def test_perp_neg_weights_at_the_front_in_numbers(make):
    # the defaults: f_fs(1) = 4 exp(-1/2) - 2.426 and f_sf(0) = 4 - 2.426
    _, weights = make()().get_text_embeddings_perp_neg(*cameras((0, 0)))
    assert weights[0].tolist() == pytest.approx([-(4 * 0.60653066 - 2.426), -1.574], abs=1e-5)


def test_perp_neg_needs_views(make):
    with pytest.raises(UserError, match="view_dependent_prompting"):
        make()().get_text_embeddings_perp_neg(*cameras((0, 0)), view_dependent_prompting=False)


# --- the cache ----------------------------------------------------------------------------------


def cached():
    return sorted(Path(".threestudio_cache/text_embeddings").iterdir())


def test_a_second_run_needs_no_model(make, monkeypatch):
    first = make()()
    assert len(cached()) == 6 and all(p.suffix == ".safetensors" for p in cached())
    monkeypatch.setattr(Processor, "encode", None)
    second = make()()
    for name in ("text_embeddings", "uncond_text_embeddings", "text_embeddings_vd"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_only_what_is_missing_is_encoded(make, monkeypatch):
    make()
    calls = []
    encode = Processor.encode
    monkeypatch.setattr(
        Processor, "encode", lambda s, texts: calls.append(texts) or encode(s, texts)
    )
    make(prompt_back="a blue chair")
    assert calls == [["a blue chair"]]


@pytest.mark.parametrize("damage", ["truncated", "empty", "swapped"])
def test_a_damaged_cache_is_recomputed(make, messages, damage):
    first = make()()
    files = cached()
    if damage == "swapped":
        contents = [f.read_bytes() for f in files]
        for file, content in zip(files, contents[1:] + contents[:1]):
            file.write_bytes(content)
    else:
        for file in files:
            file.write_bytes(file.read_bytes()[:100] if damage == "truncated" else b"")
    second = make()()
    assert torch.equal(first.text_embeddings_vd, second.text_embeddings_vd)
    assert sum("unreadable" in m for m in messages()) == 6
    assert cached() == files  # mended in place, nothing left behind
    make()
    assert sum("unreadable" in m for m in messages()) == 6


def resize(files, shape, dtype=torch.float32):
    """Files of the cache with embeddings of another shape, and all else as it was."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({"embedding": torch.ones(shape, dtype=dtype)}, file, metadata)


@pytest.mark.parametrize("shape", [(24, 16), (7, 32), (32,)])
def test_a_cache_of_another_shape_is_recomputed(make, messages, shape):
    want = make()()
    resize(cached(), shape)
    again = make()()
    for name in ("text_embeddings", "text_embeddings_vd", "uncond_text_embeddings"):
        assert torch.equal(getattr(again, name), getattr(want, name))
    assert any("Recomputing a text embedding" in line for line in messages())
    assert make().embedding_shape() == (24, 32)


def test_so_is_one_where_the_shape_is_not_known_before(make, messages, monkeypatch):
    monkeypatch.setattr(Processor, "embedding_shape", lambda self: (None, None))
    want = make()()
    resize(cached()[:1], (7, 32))  # some differ from the others
    assert torch.equal(make()().text_embeddings_vd, want.text_embeddings_vd)
    resize(cached(), (7, 32))  # all differ from what is added
    back = make(prompt_back="a blue chair")()
    assert torch.equal(back.text_embeddings, want.text_embeddings)
    assert len([line for line in messages() if "Recomputing the text embeddings" in line]) == 2


def test_a_cache_of_whole_numbers_is_recomputed(make):
    want = make()()
    resize(cached(), (24, 32), torch.int64)
    assert torch.equal(make()().text_embeddings, want.text_embeddings)


def test_another_model_in_the_same_folder_is_noticed(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = {"pretrained_model_name_or_path": "model", "prompt": "a car"}
    shutil.copytree(tiny_sd(tokens=24), "model")
    first = Processor(cfg)()
    shutil.rmtree("model")
    shutil.copytree(tiny_sd(tokens=24, seed=1), "model")
    second = Processor(cfg)()
    assert not torch.equal(first.text_embeddings, second.text_embeddings)


def test_cache_can_be_switched_off(make):
    make(use_cache=False)
    assert not os.path.exists(".threestudio_cache")


def test_an_interrupted_write_leaves_no_file(make, monkeypatch):
    from threestudio.models.prompt_processors import cache

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert cached() == []


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["a file is in its place", "the disk is full"])
def test_a_cache_that_cannot_be_written_costs_nothing(make, messages, monkeypatch, why):
    want = make()().text_embeddings
    shutil.rmtree(".threestudio_cache")
    if "file" in why:
        Path(".threestudio_cache").write_text("")
    else:

        def save_file(*args):
            raise SafetensorError('Error while serializing: IoError(Os {..}: (os error 28)")')

        monkeypatch.setattr("threestudio.models.prompt_processors.cache.save_file", save_file)
    assert torch.equal(make()().text_embeddings, want)
    assert [m for m in messages() if m.startswith("text embeddings are not kept: ")]
    assert not cached() if "disk" in why else True


def one_line(info):
    text = str(info.value)
    assert "\n" not in text and len(text) < 500
    assert info.value.__suppress_context__ or info.value.__context__ is None
    return text


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt(make, prompt):
    with pytest.raises(UserError, match="prompt is empty") as info:
        make(prompt=prompt)
    one_line(info)


def test_a_long_prompt_is_truncated_with_one_warning(make, messages, tiny_sd):
    prompt = " ".join(["red car"] * 250)
    processor = make(prompt=prompt)
    (warning,) = [m for m in messages() if "token" in m]
    assert "24 tokens" in warning and "view_dependent_prompt_front" in warning
    expected = reference(tiny_sd(tokens=24), [prompt])
    torch.testing.assert_close(processor().text_embeddings.cpu(), expected)
    make(prompt=prompt)  # from the cache: warned about again
    assert len([m for m in messages() if "token" in m]) == 2


def test_only_a_prompt_that_does_not_fit_is_warned_about(make, messages):
    make(prompt="a car")
    views = {f"prompt_{view}": "a car" for view in VIEWS}
    make(prompt=" ".join("a" * 22), **views)  # with the two end tokens exactly 24
    assert messages() == []
    make(prompt=" ".join("a" * 23), **views)
    (warning,) = messages()
    assert "prompt has 25" in warning and "view_dependent" not in warning


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/nowhere", "nowhere"])
def test_missing_folder(make, name):
    with pytest.raises(UserError, match="no model folder") as info:
        make(pretrained_model_name_or_path=name)
    assert repr(name) in one_line(info)


def test_missing_hub_model(make):
    with pytest.raises(UserError, match="nobody/nothing-like-this") as info:
        make(pretrained_model_name_or_path="nobody/nothing-like-this")
    assert "pretrained_model_name_or_path" in one_line(info)


def test_a_folder_without_a_text_model(make):
    os.makedirs("model/unet")
    with pytest.raises(UserError, match="cannot load tokenizer of 'model'") as info:
        make(pretrained_model_name_or_path="model")
    one_line(info)


def test_a_broken_text_model(make, tiny_sd):
    shutil.copytree(tiny_sd(tokens=24), "model")
    weights = Path("model/text_encoder/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="text_encoder of 'model'") as info:
        make(pretrained_model_name_or_path="model")
    one_line(info)


def test_debiasing_is_refused(make):
    with pytest.raises(UserError, match="use_prompt_debiasing"):
        make(use_prompt_debiasing=True)


def test_prompt_library(make):
    with pytest.raises(UserError, match=r"prompt_library\.json"):
        make(prompt="lib:red_car")
    os.makedirs("load")
    prompts = ["a Red car on a house", "a red chair", "a blue car"]
    Path("load/prompt_library.json").write_text(json.dumps({"dreamfusion": prompts}))
    assert make(prompt="lib:red_car").prompt == prompts[0]
    with pytest.raises(UserError, match="2 prompts"):
        make(prompt="lib:car")
    with pytest.raises(UserError, match="0 prompts"):
        make(prompt="lib:green_car")


def test_dummy_processor_reads_no_text_and_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    utils = threestudio.find("dummy-prompt-processor")({})()
    out = utils.get_text_embeddings(*cameras((0, 0), (0, 90)))
    assert out.shape == (4, 1, 1) and not os.listdir(".")
