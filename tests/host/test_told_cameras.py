"""Runs whose model is told cameras: what comes out of a batch, and what is refused, and when."""

import math
from types import SimpleNamespace

import pytest
import torch
from lods import preflight
from lods.commands import doctor
from lods.commands.job import Request
from lods.models import cards
from omegaconf import OmegaConf
from PIL import Image

import threestudio
from tests.guidance_oracles import PerpNegPrompt, random_prompt
from tests.hostile import one_line
from tests.runs import ROOT, launch, small_run, two_and_two
from threestudio.data.cameras import camera_batch, sample_cameras
from threestudio.utils.errors import UserError

CONFIG = [str(ROOT / "configs" / "lods-gs-lora.yaml")]
SIZES = {"height": 8, "width": 12}
KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step")


@pytest.fixture
def told(tiny_sd):
    return tiny_sd(sample_size=4, camera_tokens=2)


@pytest.fixture
def make(told):
    def build(short="sds", model=None, **fields):
        fields = {"cameras": "tokens", **fields}
        kind = threestudio.find(f"lods-{short}-guidance")
        return kind({"pretrained_model_name_or_path": model or told, **fields})

    return build


def seen_cameras(guidance, monkeypatch, batch, **changes):
    """The cameras that the method is given for a batch, without what ``changes`` sets to None."""
    seen = []
    monkeypatch.setattr(
        guidance.method,
        "losses",
        lambda z, given: seen.append(given) or SimpleNamespace(terms={}, numbers={}),
    )
    batch = {k: v for k, v in {**batch, **changes}.items() if v is not None}
    rows = torch.rand(len(batch["elevation"]), 8, 8, 3)
    guidance(rows, random_prompt(), **batch)
    return seen[0].cameras


def random_batch(n=4, fovy_range=(36, 44)):
    ranges = {"elevation_range": (-10, 45), "azimuth_range": (-180, 180)}
    ranges |= {"camera_distance_range": (3.2, 4.0), "fovy_range": fovy_range}
    cameras = sample_cameras(torch.Generator().manual_seed(0), n, **ranges)
    return camera_batch(**cameras, **SIZES)


# --- from a batch ---------------------------------------------------------------------------------


def test_the_radians_of_a_batch_become_degrees(make, monkeypatch):
    batch = random_batch()
    cameras = seen_cameras(make(), monkeypatch, batch)
    torch.testing.assert_close(cameras.fovy, batch["fovy"] * (180 / math.pi))
    assert cameras.fovy.min() >= 36 and cameras.fovy.max() <= 44
    assert torch.equal(cameras.azimuth, batch["azimuth"])
    assert torch.equal(cameras.distance, batch["camera_distances"])


def test_a_batch_without_a_field_of_view_has_it_in_its_matrices(make, monkeypatch):
    batch = random_batch()
    cameras = seen_cameras(make(), monkeypatch, batch, fovy=None)
    torch.testing.assert_close(cameras.fovy, torch.rad2deg(batch["fovy"]), rtol=1e-4, atol=1e-3)
    up = batch["mvp_mtx"].clone()  # of a renderer whose image rows go up
    flip = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    cameras = seen_cameras(make(), monkeypatch, batch, fovy=None, mvp_mtx=flip @ up)
    torch.testing.assert_close(cameras.fovy, torch.rad2deg(batch["fovy"]), rtol=1e-4, atol=1e-3)


def test_one_field_of_view_may_be_that_of_all(make, monkeypatch):
    for one in (0.7, torch.tensor(0.7), torch.tensor([0.7])):
        cameras = seen_cameras(make(), monkeypatch, random_batch(), fovy=one)
        torch.testing.assert_close(cameras.fovy, torch.full((4,), math.degrees(0.7)))


@pytest.mark.parametrize("left", [{}, {"c2w": None}, {"mvp_mtx": None}])
def test_a_batch_without_any_is_one_line(make, monkeypatch, left):
    left = left or {"c2w": None, "mvp_mtx": None}
    with pytest.raises(ValueError, match=r"neither fovy .* nor c2w and mvp_mtx") as caught:
        seen_cameras(make(), monkeypatch, random_batch(), fovy=None, **left)
    one_line(caught)
    words = make(cameras="words")  # which does not look at them
    odd = {"c2w": torch.zeros(4, 3, 4), "mvp_mtx": torch.zeros(4, 16)}
    for given in ({"fovy": None, **left}, {"fovy": None, **odd}, {"fovy": torch.zeros(2, 5)}):
        assert seen_cameras(words, monkeypatch, random_batch(), **given).fovy is None


def test_both_data_modules_give_the_degrees_of_their_configs(make, monkeypatch, tmp_path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "toy_rgba.png")
    random = {**SIZES, "batch_size": 2, "fovy_range": (37, 37)}
    image = {**SIZES, "image_path": str(tmp_path / "toy_rgba.png"), "default_fovy_deg": 37.0}
    for name, config in (("random-camera", random), ("single-image", image)):
        data = threestudio.find(f"{name}-datamodule")(config)
        data.setup()
        batch = next(iter(data.train_dataloader()))
        given = {k: v for k, v in batch.items() if not k.startswith(("rays", "rgb"))}
        cameras = seen_cameras(make(), monkeypatch, given)
        torch.testing.assert_close(cameras.fovy, torch.full_like(cameras.fovy, 37.0))
        torch.testing.assert_close(
            cameras.fovy,
            seen_cameras(make(), monkeypatch, given, fovy=None).fovy,
            rtol=1e-4,
            atol=0,
        )


def test_a_step_of_the_host_is_told_them(make):
    guidance, found = make("lora"), []
    for change in ({}, {}, {"fovy": torch.full((4,), 0.65)}):
        rows = torch.rand(4, 8, 8, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(0)
        out = guidance(rows, random_prompt(), **{**random_batch(), **change})
        out["loss_sds"].backward()
        found.append(rows.grad)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


# --- words for the view ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cameras", "asked", "words"),
    [("words", None, True), ("words", False, False), ("tokens", None, False), ("both", None, True)],
)
def test_the_prompt_has_words_for_the_view_unless_tokens_are_in_their_place(
    make, cameras, asked, words
):
    guidance, prompt = make(cameras=cameras, view_dependent_prompting=asked), random_prompt()
    conditions = guidance.prompts_of(prompt).conditions(
        cameras_of_two := SimpleNamespace(views=(torch.zeros(2),) * 3)
    )
    front = prompt.text_embeddings[0] + float(words)
    assert torch.equal(conditions.prompt[0], front) and conditions.cameras is cameras_of_two


@pytest.mark.parametrize(("cameras", "asked"), [("tokens", True), ("both", False)])
def test_a_contradiction_is_refused_before_anything_loads(make, monkeypatch, cameras, asked):
    monkeypatch.setattr("lods.models.latent.load_weights", lambda *a: pytest.fail("loaded"))
    line = f"cameras={cameras} goes with prompts that have"
    with pytest.raises((ValueError, UserError), match=line) as caught:
        make(cameras=cameras, view_dependent_prompting=asked)
    one_line(caught)


def test_a_contradiction_in_a_configuration_ends_a_run_in_one_line(
    told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = ["system.guidance.cameras=tokens", "system.guidance.view_dependent_prompting=true"]
    assert launch(CONFIG, [*small_run(told), *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: system.guidance.cameras=tokens goes with prompts that have no")


def test_perp_neg_needs_words_for_the_view(make):
    prompt = PerpNegPrompt(random_prompt(), torch.zeros(2, 16, 32), torch.zeros(2))
    with pytest.raises(ValueError, match="use_perp_neg needs prompts with words") as caught:
        make().initialize(prompt)
    one_line(caught)
    make(cameras="both").initialize(prompt)


def system(model, perp_neg=False, guidance_type="lods-lora-guidance", **guidance):
    guidance = {"pretrained_model_name_or_path": model, **guidance}
    parts = {"guidance": guidance, "prompt_processor": {"use_perp_neg": perp_neg}}
    return OmegaConf.create({"guidance_type": guidance_type, **parts})


def test_what_cannot_be_told_is_refused_before_torch_is_imported(told, tiny_sd):
    check, plain = preflight.check_cameras, tiny_sd()
    lora = "pretrained_model_name_or_path_lora"
    for model, cameras in ((told, "tokens"), (told, "both"), (told, "words"), (plain, "words")):
        check(system(model, cameras=cameras))
        check(system(model))
    for model, more in ((plain, {}), (told, {lora: plain})):
        with pytest.raises(ValueError, match=f"{plain!r} has no folder camera_encoder") as caught:
            check(system(model, cameras="tokens", **more))
        assert "set system.guidance.cameras=words" in one_line(caught)
    check(system(plain, cameras="tokens", guidance_type="other-guidance"))
    check(system("someone/on-the-hub", cameras="tokens"))  # which the run finds out
    for words in ({"cameras": "tokens"}, {"view_dependent_prompting": False}):
        with pytest.raises(ValueError, match="use_perp_neg needs prompts with words"):
            check(system(told, perp_neg=True, **words))
    check(system(told, perp_neg=True, cameras="both"))


def test_a_model_without_an_encoder_ends_a_run_in_one_line(tiny_sd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch(CONFIG, [*small_run(tiny_sd()), "system.guidance.cameras=tokens"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: system.guidance.cameras=tokens needs a model with an encoder")


# --- commands -------------------------------------------------------------------------------------


def test_make_tells_cameras_to_a_model_that_understands_them(told, tiny_sd, tmp_path):
    for model, cameras in ((told, "tokens"), (tiny_sd(), "words"), ("sd15", "words")):
        for small in (True, False):
            request = Request("a car", "gaussians", "lods-sds", model, small)
            assert f"system.guidance.cameras={cameras}" in request.words(tmp_path)
    mine = Request(
        "a car", "gaussians", "lods-sds", told, True, 0, None, ("system.guidance.cameras=both",)
    )
    words = [w for w in mine.words(tmp_path) if w.startswith("system.guidance.cameras=")]
    assert words[-1] == "system.guidance.cameras=both"  # the last one counts


def test_doctor_tells_which_models_understand_cameras(monkeypatch):
    monkeypatch.setattr(cards, "has_camera_encoder", lambda name: name == "pocket-shapes")
    monkeypatch.setattr(cards, "is_here", lambda name: name in ("pocket-shapes", "sd15"))
    states = dict(doctor._models())
    assert "understands cameras" in states["pocket-shapes"] and states["sd15"].startswith("ready")
    assert "understands" not in states["sd15"]
    assert all(doctor.Finding("models", n, states[n]).ready for n in ("pocket-shapes", "sd15"))


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["embedding", "lora", "vsd"])
def test_four_steps_with_cameras_are_two_and_two(told, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    ball = ["system.geometry.init_type=ball", "system.geometry.ball={n_points: 60, radius: 0.6}"]
    more = [f"system.guidance_type=lods-{method}-guidance", "system.guidance.cameras=tokens"]
    files = [*CONFIG, str(ROOT / "configs" / "pocket-shapes.yaml")]
    reference = "system.renderer.backend=torch"
    run = files, [*small_run(told), *ball, *more, reference]
    start, whole = two_and_two(run, KEYS)
    learned = [k for k in whole["state_dict"] if k.startswith("guidance.") and "initial" not in k]
    assert learned and not any("camera_tokens" in key for key in learned)
    assert any(not torch.equal(start["state_dict"][k], whole["state_dict"][k]) for k in learned)
