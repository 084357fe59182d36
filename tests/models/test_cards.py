"""Model cards: which repository a name leads to, offline too, and models shaped like each card."""

import importlib
import inspect
import itertools
import os
import socket
import threading
import time
from pathlib import Path

import lods
import numpy as np
import pytest
import torch
from lods.models.unet import UNetModel, _pooled_width
from omegaconf import OmegaConf

import threestudio
from tests.runs import ROOT, SMALL_FIELD, launch, read, small_run, two_and_two
from tests.tiny_models import KINDS
from threestudio import find

SD15, OLD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"
FOLDER = ROOT / "custom" / "threestudio-lods" / "lods" / "models" / "pocket-shapes"


@pytest.fixture(scope="module")
def cards(lods):
    return importlib.import_module("lods.models.cards")


@pytest.fixture
def hub(cards, tmp_path, monkeypatch):
    """An empty local cache of the hub, in an empty folder, and no HF_HUB_OFFLINE. ``hub(id, ...)``
    enters a repository with these files; returns its snapshot."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def enter(repo, *files, commit="c" * 40, ref="main"):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        for file in files or ("unet/config.json",):
            path = folder / "snapshots" / commit / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return folder / "snapshots" / commit

    return enter


# -- which repository ------------------------------------------------------------------------------


def test_the_cards_are_whole(cards):
    known = cards.all_cards()
    flows = ["pocket-flow", "sd3-medium", "sd35-medium", "sd35-large", "sd35-large-turbo"]
    flows += ["openflux1", "flux1-dev", "flux1-schnell"]
    flows += ["flux2-klein-base-4b", "flux2-klein-base-9b", "flux2-klein-4b"]
    flows += ["z-image", "z-image-turbo", "qwen-image"]
    flows += ["sana-1600m", "sana-1600m-512", "sana-600m-512"]
    diffusions = ["sd15", "sd21-base", "sd21", "sdxl", "pocket-shapes", "pocket"]
    several = ["mvdream-sd21", "mvadapter-sd21"]
    assert list(known) == [*diffusions, flows[0], *several, *flows[1:], "pixart-sigma"]
    assert [name for name, card in known.items() if card.prediction_type == "flow"] == flows
    for name, card in known.items():
        assert bool(card.ids) != bool(card.folder), name
        assert all(repo.count("/") == 1 for repo in card.ids + card.aliases)
        assert not card.memory_measured and card.memory_gb > 0
    ids = [repo for card in known.values() for repo in card.ids + card.aliases]
    assert len(ids) == len(set(ids)) == 26
    for card in known.values():
        assert card.instead is None or known[card.instead].instead is None
        assert bool(card.base) == bool(card.file) and (card.base is None or card.base in known)
    assert cards.find_card(cards.DEFAULT_MODEL) is known["sd21-base"]


def test_each_model_of_the_package_has_overlays_and_settings_of_its_own(cards):
    playground = importlib.import_module("lods.playground")
    own = [card for card in cards.all_cards().values() if card.folder]
    assert cards.EMBEDDED in [card.name for card in own]
    assert inspect.signature(lods.load).parameters["model"].default == cards.EMBEDDED
    for card in own:
        assert {(card.name, kind) for kind in ("lora", "embedding")} <= set(playground.SETTINGS)
        for end in ("", "-ngp"):
            overlay = OmegaConf.load(ROOT / f"configs/{card.overlay}{end}.yaml")
            name = overlay.system.prompt_processor.pretrained_model_name_or_path
            assert cards.canonical(name) == card.overlay
            width = OmegaConf.to_container(overlay.data)["width"]
            assert np.max(width) == card.image_size


def test_an_adapter_is_its_base_and_its_file(cards, hub):
    adapter, base = (cards.all_cards()[name] for name in ("mvadapter-sd21", "sd21-base"))
    assert not cards.is_here("mvadapter-sd21") and cards.views_of("mvadapter-sd21") == 6
    hub(base.ids[0])
    assert not cards.is_here("mvadapter-sd21") and cards.is_here("sd21-base")
    with pytest.raises(ValueError, match=r"huanngzh/mv-adapter, with .*base, is neither") as error:
        cards.resolve("mvadapter-sd21")
    download = f"hf download huanngzh/mv-adapter {adapter.file}, and hf download {base.ids[0]}"
    assert download == adapter.download and download in str(error.value)
    assert "\n" not in str(error.value)
    hub(adapter.ids[0], adapter.file)
    for name in ("mvadapter-sd21", adapter.ids[0]):
        found = cards.resolve(name)
        assert found == cards.Location(base.ids[0], None, adapter) and cards.is_here(name)
        assert cards.has_view_adapter(found) and cards.views_of(name) == 6
        assert cards.canonical(name) == adapter.ids[0]
    assert not cards.has_view_adapter(cards.resolve("sd21-base"))


@pytest.mark.parametrize("name", ["sd15", SD15, OLD15])
def test_one_card_by_three_names(cards, hub, name):
    hub(SD15)
    assert cards.resolve(name) == cards.Location(SD15, None, cards.all_cards()["sd15"])
    assert cards.canonical(name) == SD15


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_an_old_copy_is_used_if_there_is_no_new_one(cards, hub, file):
    hub(OLD15, file)
    assert cards.resolve("sd15").path == OLD15
    hub(SD15, file)
    assert cards.resolve(OLD15).path == SD15


def test_other_names_go_through(cards, hub, tmp_path):
    for name in ("nobody/model", "./nowhere", "", str(tmp_path)):
        assert cards.resolve(name) == (name, None, None) and cards.canonical(name) == name


def test_a_model_folder_wins_and_another_folder_does_not(cards, hub):
    os.makedirs("sd15")
    os.makedirs("pocket-shapes")
    hub(SD15)
    assert cards.resolve("sd15").path == SD15
    assert Path(cards.resolve("pocket-shapes").path) == FOLDER
    os.makedirs("sd15/unet")
    os.makedirs(f"{OLD15}/unet")
    assert cards.resolve("sd15") == ("sd15", None, None)
    assert cards.resolve(OLD15) == (OLD15, None, None)


def test_the_model_of_shapes_is_found_from_everywhere(cards, tmp_path, monkeypatch):
    for folder in (ROOT, tmp_path):  # in the first there is a folder of that name
        monkeypatch.chdir(folder)
        assert Path(cards.resolve("pocket-shapes").path) == FOLDER


def two_mirrors(cards, monkeypatch, **more):
    card = cards.Card(
        "two", "epsilon", 24, 16, 4, 0.7, 16, 8, False, ids=("a/one", "b/two"), **more
    )
    monkeypatch.setattr(cards, "all_cards", lambda: {"two": card})
    return card


def test_mirrors_are_asked_in_order(cards, hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import HfHubHTTPError

    card = two_mirrors(cards, monkeypatch, revision="v1")
    monkeypatch.setattr(cards, "_no_connection", lambda url: "")
    asked, there = [], set()

    def model_info(self, repo, revision, timeout):
        asked.append((repo, revision))
        if repo not in there:
            raise Missing("404 not there\nmore")

    class Missing(HfHubHTTPError):
        def __init__(self, text):
            Exception.__init__(self, text)

        __str__ = Exception.__str__

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(ValueError, match=r"a/one, b/two .*404 not there") as caught:
        cards.resolve("two")
    assert "\n" not in str(caught.value)
    assert asked == [("a/one", "v1"), ("b/two", "v1")]
    there.add("b/two")
    assert cards.resolve("two") == ("b/two", "v1", card)
    there.add("a/one")
    assert cards.resolve("b/two") == ("a/one", "v1", card)
    hub("b/two")  # another revision than the card's
    assert cards.resolve("two").path == "a/one"
    hub("b/two", ref="v1")
    assert cards.resolve("two").path == "b/two"


def test_a_revision_reaches_the_text_model(cards, hub, monkeypatch):
    """The base class knows of none: it is given the folder of that revision."""
    two_mirrors(cards, monkeypatch, revision="v1")
    hub("a/one", "text_encoder/config.json", commit="d" * 40)
    pinned = hub("a/one", "text_encoder/config.json", ref="v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prompt = importlib.import_module("lods.threestudio.prompt")
    assert Path(prompt._text_model(cards.resolve("two"))) == pinned
    with pytest.raises(ValueError, match=r"a/one at revision v2 is neither"):
        prompt._text_model(cards.Location("a/one", "v2"))


# -- no network ------------------------------------------------------------------------------------


def refusal(cards, name):
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        cards.resolve(name)
    assert time.perf_counter() - start < 2
    return str(caught.value)


@pytest.mark.parametrize("network", ["switched off", "no name", "silent", "refused"])
def test_without_a_network_one_line_in_two_seconds(cards, hub, monkeypatch, network):
    import huggingface_hub  # noqa: F401  (importing is not timed)
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: pytest.fail("asked all the same"))
    told = threading.Event()
    if network == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif network == "silent":

        def silent(*args):
            told.wait(20)
            raise OSError

        monkeypatch.setattr(socket, "create_connection", silent)
    elif network == "refused":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    for name in ("sdxl", OLD15):
        said = refusal(cards, name)
        tried = cards.find_card(name).ids[0]
        assert "\n" not in said and said.count(tried) == 2  # what was tried, and the command
        assert f"hf download {tried};" in said and "downloaded diffusers folder" in said
        assert "configs/pocket.yaml" in said
        assert ("HF_HUB_OFFLINE is set" if network == "switched off" else "no network: ") in said
    told.set()


def test_a_proxy_is_what_must_answer(cards, hub, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert "proxy.invalid" in cards._no_connection("https://hub.invalid")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert cards._no_connection("https://hub.invalid") == ""


def test_the_command_says_it_in_one_line(hub, capsys):
    files = [str(ROOT / "configs" / "lods-gs-lora.yaml")]
    assert launch(files, [*small_run("sdxl"), "system.geometry.init_type=ball"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "hf download" in line]
    assert len(said) == 1 and "stabilityai/stable-diffusion-xl-base-1.0" in said[0]
    assert launch(files, [*small_run("sdlx"), "system.geometry.init_type=ball"]) == 2
    assert "one of sd15, sd21-base, sd21, sdxl, pocket-shapes, pocket" in capsys.readouterr().err


# -- the model and its card ------------------------------------------------------------------------


def frozen(name, **options):
    return UNetModel.from_pretrained(name, **options)


def test_the_model_of_shapes_is_as_its_card_says(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    monkeypatch.chdir(tmp_path)
    frozen("pocket-shapes")
    assert said == []


def test_another_model_than_the_card_says_is_one_warning(cards, tiny_sd, monkeypatch):
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    right = {"text_width": 64, "text_tokens": 16, "image_size": 32, "scaling_factor": 0.7}
    fields = {"latent_channels": 4, "memory_gb": 1, "memory_measured": False, **right}

    def load(**wrong):
        card = cards.Card(
            "x", **{"prediction_type": "epsilon", **fields, **wrong}, folder=tiny_sd(kind="sdxl")
        )
        monkeypatch.setattr(cards, "all_cards", lambda: {"x": card})
        frozen("x")

    load()
    assert said == []
    load(prediction_type="v_prediction", text_tokens=77, scaling_factor=0.13025)
    [line] = said
    for words in ("prediction_type is epsilon (card: v_", "tokens is 16 (card: 77)", "0.13025"):
        assert words in line
    assert "text_width" not in line and "image_size" not in line


def test_a_small_gpu_is_told(cards):
    card = cards.all_cards()["sdxl"]
    assert card.memory_note(23.6) == ""
    assert "24 GB and more (estimated, not measured)" in card.memory_note(15.7)


# -- SDXL ------------------------------------------------------------------------------------------


@pytest.fixture
def xl(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_sd(kind="sdxl")


def processor(model, **fields):
    return find("lods-prompt-processor")(
        {"pretrained_model_name_or_path": model, "prompt": "a red car", **fields}
    )


@pytest.mark.parametrize("negative", ["", "a blue house"])
@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_embeddings_are_diffusers(xl, tmp_path, negative, zeros):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(xl)
    assert pipeline.tokenizer.pad_token_id != pipeline.tokenizer_2.pad_token_id
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    pipeline.save_pretrained(tmp_path / "xl")
    ours = processor(str(tmp_path / "xl"), negative_prompt=negative)()
    views = [("a red car", ours.text_embeddings[0])] + list(
        zip(ours.prompts_vd, ours.text_embeddings_vd)
    )
    for text, got in views:
        with torch.no_grad():
            prompt, null, pooled, null_pooled = pipeline.encode_prompt(
                text, device="cpu", negative_prompt=negative or None
            )
        for row, tokens, pool in (
            (got, prompt, pooled),
            (ours.uncond_text_embeddings[0], null, null_pooled),
        ):
            assert row.shape == (17, 64)
            torch.testing.assert_close(row[:-1], tokens[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(row[-1, :40], pool[0], rtol=1e-5, atol=1e-5)
            assert not row[-1, 40:].any()
    assert bool(ours.uncond_text_embeddings.any()) == bool(negative or not zeros)


def test_sdxl_embeddings_are_kept_until_an_encoder_changes(xl, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(xl, tmp_path / "xl")
    kind, calls = find("lods-prompt-processor"), []
    encode = kind.encode
    monkeypatch.setattr(kind, "encode", lambda self, t: calls.append(t) or encode(self, t))
    first = processor(str(tmp_path / "xl")).text_embeddings
    assert torch.equal(processor(str(tmp_path / "xl")).text_embeddings, first) and len(calls) == 1
    path = tmp_path / "xl" / "text_encoder_2" / "model.safetensors"
    os.utime(path, (1, 1))
    processor(str(tmp_path / "xl"))
    assert len(calls) == 2
    index = tmp_path / "xl" / "model_index.json"
    text = index.read_text()
    assert "force_zeros_for_empty_prompt" in text
    index.write_text(text.replace('empty_prompt": true', 'empty_prompt": false'))
    processor(str(tmp_path / "xl"))
    assert len(calls) == 3


def test_a_long_prompt_for_sdxl_is_cut_and_said(xl, monkeypatch):
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    processor(xl, prompt="a red car on the house", use_cache=False)  # 6 words, 2 marks, 2 of view
    assert not [line for line in said if "dropped" in line]
    words = " ".join(["car"] * 15)  # with the two marks one more than the 16 that there are
    views = {f"prompt_{view}": "a car" for view in ("side", "front", "back", "overhead")}
    processor(xl, prompt=words, use_cache=False, **views)
    assert [line for line in said if "dropped" in line]


def test_sdxls_noise_is_a_direct_call_of_its_unet(xl):
    model = frozen(xl)
    assert (model.text_width, model.pooled_width, model.pooled_rows) == (64, 40, 1)
    torch.manual_seed(0)
    x, t, rows = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 17, 64)

    def direct(size, pooled):
        ids = torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=torch.float32)
        return model.unet(
            x,
            t,
            encoder_hidden_states=rows[:, :16],
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        ).sample

    with torch.no_grad():
        got = model.predict(x, t, rows)
        assert torch.equal(got, direct(32, rows[:, 16, :40]))
        for other in (direct(1024, rows[:, 16, :40]), direct(32, rows[:, 15, :40])):
            assert (got - other).abs().max() > 1e-4


@pytest.mark.parametrize("kind, vae", [("sdxl", torch.float32), ("sd15", torch.bfloat16)])
def test_only_sdxls_vae_stays_in_float32(tiny_sd, kind, vae):
    model = frozen(tiny_sd(kind=kind), dtype=torch.bfloat16)
    assert model.unet.dtype == torch.bfloat16 and model.vae_dtype == vae
    assert {p.dtype for p in model.vae.parameters()} == {vae}
    latents = model.encode(torch.rand(1, 3, 32, 32))
    assert latents.dtype == model.decode(latents).dtype == torch.float32


def test_a_vae_that_may_be_half_stays_half(xl, tmp_path):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    vae = AutoencoderKL.from_pretrained(xl, subfolder="vae", torch_dtype=torch.bfloat16)
    vae.register_to_config(force_upcast=False)
    unet = UNet2DConditionModel.from_pretrained(xl, subfolder="unet", torch_dtype=torch.bfloat16)
    made = UNetModel(unet, vae, DDPMScheduler.from_pretrained(xl, subfolder="scheduler"))
    assert made.vae_dtype == made.vae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"addition_embed_type": "text", "encoder_hid_dim": None}, "addition_embed_type 'text'"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"projection_class_embeddings_input_dim": 48}, "leaves no pooled"),
    ],
)
def test_other_conditions_are_refused(xl, fields, text):
    config = frozen(xl).unet.config
    assert _pooled_width(config) == 40
    changed = type(config)({**config, **fields})
    with pytest.raises(ValueError, match=text):
        _pooled_width(changed)


def test_the_plain_prompt_processor_is_not_enough_for_sdxl(xl):
    guidance = find("lods-sds-guidance")({"pretrained_model_name_or_path": xl})
    plain = find("stable-diffusion-prompt-processor")(
        {"pretrained_model_name_or_path": xl, "prompt": "a car"}
    )
    with pytest.raises(ValueError, match="prompt_processor_type=lods-prompt-processor"):
        guidance.initialize(plain())


@pytest.mark.parametrize("model", ["xl", "pocket-shapes"])
def test_upstreams_hook_writes_where_upstream_reads(xl, tmp_path, monkeypatch, model):
    """threestudio 0.2.3 calls ``spawn_func(model, prompts, folder)``, in this process if ``spawn``
    is false, and reads md5("<model>-<prompt>").pt."""
    import hashlib

    model = {"xl": xl, "pocket-shapes": str(FOLDER)}[model]
    wanted = processor(model)
    hosts = find("lods-prompt-processor").__mro__[1]
    monkeypatch.setattr(hosts, "spawn_func", staticmethod(lambda *a: None), raising=False)
    made = processor(model)
    assert made.cfg.spawn is False
    monkeypatch.delattr(hosts, "load_part")  # which upstream has not
    made.spawn_func(model, ["a red car", ""], str(tmp_path))
    for text, kind in (("a red car", "text_embeddings"), ("", "uncond_text_embeddings")):
        name = hashlib.md5(f"{model}-{text}".encode()).hexdigest()
        got = read(tmp_path / f"{name}.pt")
        torch.testing.assert_close(got, getattr(wanted, kind)[0], rtol=1e-5, atol=1e-5)


# -- models shaped like each card, through everything ----------------------------------------------

SCALES = {
    "gs": ["system.geometry.init_type=ball", "system.geometry.ball={n_points: 60, radius: 0.6}"],
    "ngp": [*SMALL_FIELD, "system.exporter.texture_size=16"],
}
SHAPES = {"sd15": (16, 24), "sd21-base": (16, 32), "sd21": (16, 32), "sdxl": (17, 64)}
SHAPES["sd3"] = (16 + 256 + 1, 56)  # CLIP's rows, T5's, and the pooled vector
KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step")


# each kind once; with both guidances and both backbones, with the slow ones
QUICK = {("gs", "embedding")}


@pytest.mark.parametrize(
    "kind, backbone, learned",
    [
        pytest.param(*how, marks=[] if how[1:] in QUICK else pytest.mark.slow)
        for how in itertools.product((*KINDS, "sd3"), SCALES, ("embedding", "lora"))
    ],
)
def test_each_kind_trains_resumes_and_exports(
    tiny_sd, tiny_sd3, tmp_path, monkeypatch, kind, backbone, learned
):
    monkeypatch.chdir(tmp_path)
    name = f"lods-{backbone}-{learned}"
    files = [str(ROOT / "configs" / f"{name}.yaml")]
    model = tiny_sd3(t5=56) if kind == "sd3" else tiny_sd(kind=kind)
    run = files, [*small_run(model), *SCALES[backbone], "data.n_test_views=1", "data.batch_size=1"]
    start, whole = two_and_two(run, KEYS)
    state = {k: v for k, v in whole["state_dict"].items() if k.startswith("guidance.")}
    assert any(not torch.equal(start["state_dict"][k], v) for k, v in state.items())
    if learned == "embedding":
        assert state["guidance.learnable_embedding"].shape == SHAPES[kind]
    assert launch(files, run[1]) == 0
    save = Path("outputs") / name / "t" / "save"
    exported = {path.name for path in (save / "it2-export").iterdir()}
    assert "prior.safetensors" in exported and len(exported) > 1
