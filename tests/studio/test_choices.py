"""What the form offers, and what it may ask for."""

from pathlib import Path

import lods.studio
import pytest
from lods import host
from lods.methods import registry
from lods.studio.choices import METHODS, REPRESENTATIONS, Refused, as_data, read_form
from lods.studio.meshes import Meshes

from tests.studio.toy import FORM
from threestudio.utils.config import load_config


def test_the_form_offers_every_method_of_the_library_that_begins_with_nothing():
    ours = {name for name, cls in registry.ours().items() if not cls.edits}
    assert set(METHODS) == ours


def test_the_words_of_the_embedded_model_are_hints():
    data = as_data()
    [model] = [each for each in data["models"] if each["name"] == data["defaults"]["model"]]
    assert "hamburger" in model["words"]["objects"] and "red" in model["words"]["colors"]
    assert {"red", "hamburger", "a"} <= set(model["known"])


@pytest.mark.parametrize("on", REPRESENTATIONS)
@pytest.mark.parametrize("quality", ["draft", "good", "best"])
def test_every_quality_that_is_offered_is_a_config_that_loads(on, quality, tmp_path):
    data = as_data()
    for model in data["models"]:
        if quality in model["qualities"][on] and model["words"]:
            form = FORM | {"on": on, "quality": quality, "model": model["name"]}
            named = {"mesh": "0" * 16 + "-box.stl"} if on == "mesh" else {}
            kept = Meshes(tmp_path)
            if named:
                kept.folder.mkdir(exist_ok=True)
                (kept.folder / named["mesh"]).write_bytes(b"any")
            request, _ = read_form(form | named, kept)
            words = request.words(tmp_path)
            end = words.index("--train")
            files = [str(host.home() / "configs" / f"{n}.yaml") for n in words[1:end]]
            cfg = load_config(*files, cli_args=words[end + 1 :])
            assert cfg.trainer.max_steps == model["steps"][on][quality] > 0


def test_a_draft_takes_fewer_steps_than_the_usual_settings(tmp_path):
    steps = {}
    for quality in ("draft", "good"):
        words = read_form(FORM | {"quality": quality})[0].words(tmp_path)
        end = words.index("--train")
        files = [str(host.home() / "configs" / f"{n}.yaml") for n in words[1:end]]
        steps[quality] = load_config(*files, cli_args=words[end + 1 :]).trainer.max_steps
    assert steps["draft"] < steps["good"]


PROMPTS = (
    "a red car, 'quoted' \"twice\"",
    '"a red car"',
    "'a red car'",
    "a car = {b: [1, 2]} # &x *y !z",
    "--gpu 9 car",
    "null car",
    "car: yes | no > maybe % @ `",
    "\\n\\ a car",
    "  a  car ",
    "une voiture, 車 car 🚗",
    "system.seed=3 car",
    "<script>alert(1)</script> car",
    "$HOME $(id) ; car",
    '"car',
    "{car}",
    "[car]",
    "~car",
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_in_the_config_as_it_was_written(prompt, tmp_path):
    words = read_form(FORM | {"prompt": prompt, "any_words": True})[0].words(tmp_path)
    base = "system:\n  prompt_processor:\n    prompt: ???\n"
    [word] = [word for word in words if word.startswith("system.prompt_processor.prompt=")]
    assert load_config(base, cli_args=[word], from_string=True).system.prompt_processor.prompt == (
        prompt.strip()
    )


@pytest.mark.parametrize(
    "prompt", ["", "  ", "a ${seed} car", "a\ncar", "a\0car", "\ud800 car", "???", "x" * 301, 7]
)
def test_a_prompt_that_no_config_could_hold_is_refused(prompt):
    with pytest.raises(Refused) as refused:
        read_form(FORM | {"prompt": prompt, "any_words": True})
    assert "\n" not in str(refused.value)


def test_a_prompt_without_an_object_of_the_model_is_refused_unless_it_is_wanted():
    with pytest.raises(ValueError, match="names no object that this model knows") as refused:
        read_form(FORM | {"prompt": "a tiger"})
    # the page has the objects beside the prompt, and a tick of this name
    page = (Path(lods.studio.__file__).parent / "assets" / "index.html").read_text()
    assert "“take any words”" in str(refused.value) and "hamburger" not in str(refused.value)
    assert "> take any words" in page and "<summary>More choices</summary>" in page
    request, _ = read_form(FORM | {"prompt": "a tiger", "any_words": True})
    assert "system.prompt_processor.allow_unknown_words=true" in request.overrides


@pytest.mark.parametrize(
    "change",
    [
        {"on": "mesh"},
        {"on": "points"},
        {"on": ["gaussians"]},
        {"method": "lods-"},
        {"method": None},
        {"model": "../../etc"},
        {"model": "someone/model"},
        {"quality": "finest"},
        {"quality": {}},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 1.5},
        {"seed": True},
        {"any_words": 1},
        {"overrides": ["a=b"]},
        {"gpu": "0"},
    ],
)
def test_a_form_with_anything_else_is_refused(change):
    with pytest.raises(Refused):
        read_form(FORM | change)


@pytest.mark.parametrize("form", [None, [], "x", 3, {}])
def test_what_is_no_form_is_refused(form):
    with pytest.raises(Refused):
        read_form(form)
