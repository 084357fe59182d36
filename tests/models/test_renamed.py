"""The name of a model that has become another's does not bring another model without a word."""

import importlib

import lods
import pytest
import torch

from tests.ideal_model import IdealModel
from tests.runs import ROOT, launch, small_run

PATH = "custom/threestudio-lods/lods/models/pocket"
CARD = """
{name}:
  folder: {name}
  overlay: {name}
  revision: null
  prediction_type: v_prediction
  text_width: 96
  text_tokens: 16
  latent_channels: {channels}
  scaling_factor: 1.0
  image_size: 64
  memory_gb: 1
  memory_measured: false
"""


@pytest.fixture
def cards(lods, tmp_path, monkeypatch):
    """``cards(pocket=8)``: the module of the cards, with these models of the package and no others,
    each by the channels of its latents."""
    module = importlib.import_module("lods.models.cards")
    shipped = module.CARDS.parent / module.EMBEDDED

    def make(**channels):
        channels = {"pocket-shapes": 4, **channels}
        folder = tmp_path / "models"
        folder.mkdir()
        text = (CARD.format(name=name, channels=n) for name, n in channels.items())
        (folder / "cards.yaml").write_text("".join(text))
        for name in channels:
            (folder / name).mkdir()
            for part in shipped.iterdir():
                (folder / name / part.name).symlink_to(part)
        monkeypatch.setattr(module, "CARDS", folder / "cards.yaml")
        module.all_cards.cache_clear()
        return module

    yield make
    monkeypatch.undo()
    module.all_cards.cache_clear()


@pytest.fixture
def renamed(lods):
    return importlib.import_module("lods.models.renamed")


@pytest.mark.parametrize("name", ["pocket", PATH, f"/home/me/{PATH}/"])
def test_a_run_of_before_is_not_continued_with_the_model_that_has_its_name_now(
    cards, renamed, name, tmp_path, monkeypatch
):
    cards(pocket=8)
    monkeypatch.chdir(tmp_path)  # where the path that configs give is no folder
    with pytest.raises(ValueError) as caught:
        renamed.refuse_another({"a.key": name, "another": "sd15", "a.third": name}, None)
    line = str(caught.value)
    assert "\n" not in line and name in line
    assert line.endswith("add a.key=pocket-shapes a.third=pocket-shapes")


@pytest.mark.parametrize("name", ["pocket-shapes", f"{PATH}-shapes", "sd15", "a/folder", ""])
def test_with_any_other_name_it_is_continued(cards, renamed, name):
    cards(pocket=8)
    renamed.refuse_another({"a.key": name}, None)


def test_a_run_of_now_is_continued_with_its_model(cards, renamed, tmp_path, monkeypatch):
    cards(pocket=8)
    monkeypatch.chdir(tmp_path)
    names = ["pocket", PATH, "pocket-shapes", "sd15"]
    noted = renamed.notes(names)
    assert [noted[name]["latent_channels"] for name in names[:3]] == [8, 8, 4]
    assert "sd15" not in noted  # whose name means the same everywhere
    renamed.refuse_another({name: name for name in names}, noted)
    renamed.refuse_another({"a.key": "pocket"}, {})  # which it had not, but is asked for now


def test_a_model_that_has_gone_is_said_to_be_gone(cards, renamed):
    cards(pocket=8)
    noted = {"pocket": {**renamed.notes(["pocket"])["pocket"], "latent_channels": 16}}
    with pytest.raises(ValueError, match="no longer part of this package"):
        renamed.refuse_another({"a.key": "pocket"}, noted)


@pytest.mark.parametrize("name", ["pocket", PATH])
def test_while_no_model_has_the_name_its_successor_is_named(cards, name, tmp_path, monkeypatch):
    module = cards()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"up to version 0\.2 is 'pocket-shapes' now"):
        module.refuse_early(name)


def test_the_command_refuses_another_model_and_its_advice_works(
    cards, tmp_path, monkeypatch, capsys
):
    cards(pocket=8)
    monkeypatch.chdir(tmp_path)
    files = [str(ROOT / f"configs/{name}.yaml") for name in ("lods-gs-embedding", "pocket-shapes")]
    more = ["system.geometry.ball.n_points=60", "checkpoint.every_n_train_steps=1"]
    assert launch(files, [*small_run("pocket-shapes"), *more, "trainer.max_steps=1"]) == 0
    run = tmp_path / "outputs/lods-gs-embedding/t"
    checkpoint = run / "ckpts/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    assert content["lods_models"]["pocket-shapes"]["latent_channels"] == 4
    del content["lods_models"]  # as a checkpoint of version 0.2, whose run called the model pocket
    torch.save(content, checkpoint)
    parsed = run / "configs/parsed.yaml"
    parsed.write_text(parsed.read_text().replace("pocket-shapes", "pocket"))
    capsys.readouterr()
    again = [f"resume={checkpoint}", "trainer.max_steps=2"]
    assert launch([str(parsed)], again) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    advice = line.partition(" add ")[2].split()
    assert len(advice) == 2
    assert launch([str(parsed)], [*again, *advice]) == 0
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 2 and "pocket-shapes" in content["lods_models"]


@pytest.mark.parametrize(
    ("learned_on", "latents", "warned"),
    [("pocket-shapes", None, False), ("pocket", None, True), ("pocket", "2x8x8", False)],
)
def test_a_learned_part_of_before_is_of_the_model_of_then(
    tmp_path, monkeypatch, learned_on, latents, warned
):
    """Files of version 0.2 say "pocket" and nothing of latents."""
    said = []
    monkeypatch.setattr("lods.methods.learning.log.warn", said.append)
    method = lods.load("lods-embedding", IdealModel(learned_on), "a red car")
    note = {"model": "pocket"} | ({"latents": method._latents} if latents else {})
    monkeypatch.setattr(method, "read_learned", lambda path: note)
    method.load(tmp_path / "embedding.safetensors")
    assert bool(said) == warned


def test_a_learned_part_of_a_model_with_other_latents_is_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lods.methods.learning.log.warn", said.append)
    method = lods.load("lods-embedding", IdealModel("pocket"), "a red car")
    note = {"model": "pocket", "latents": "999x1x1"}
    monkeypatch.setattr(method, "read_learned", lambda path: note)
    method.load(tmp_path / "embedding.safetensors")
    assert len(said) == 1 and "was learned on" in said[0]
