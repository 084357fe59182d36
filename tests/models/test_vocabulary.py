"""Words that a small model does not know are named, and a prompt without an object is refused."""

import importlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from lods.prompts import TextSettings, check_words
from omegaconf import OmegaConf

import threestudio
from tests.runs import ROOT, launch
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension

EXTENSION = ROOT / "custom" / "threestudio-lods"
SHAPES = EXTENSION / "lods" / "models" / "pocket-shapes"
FORCE = "system.prompt_processor.allow_unknown_words=true"


@pytest.fixture(scope="module")
def module(lods):
    return importlib.import_module("lods.models.vocabulary")


@pytest.fixture(scope="module")
def shapes(module):
    return module.Vocabulary.read(SHAPES)


@pytest.fixture
def warnings(caplog, monkeypatch):
    """``warnings()``: those about words, since the last call."""
    monkeypatch.setattr(threestudio.logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger=threestudio.logger.name)

    def told():
        lines = [r.getMessage() for r in caplog.records if "know" in r.getMessage()]
        caplog.clear()
        return lines

    return told


# --- the words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A DSLR image", ["a", "dslr", "image"]),
        ("Hamburger!", ["hamburger"]),
        ("ice-cream, cone;teddy_bear", ["ice", "cream", "cone", "teddy", "bear"]),
        ("the robot's \u201ccar\u201d", ["the", "robot", "car"]),
        ("a 3d car 2024", ["a", "3d", "car", "2024"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("a \U0001f697!", ["a", "\U0001f697"]),
        ("car\U0001f697", ["car", "\U0001f697"]),
        ("\u2764\ufe0f", ["\u2764\ufe0f"]),
        ("гамбургер 汉堡包", ["гамбургер", "汉堡包"]),
        ("สวัสดี", ["สวัสดี"]),
        ("", []),
        (" ,.\n", []),
    ],
)
def test_words_are_those_that_the_tokenizer_sees(module, text, words):
    assert module.words_of(text) == words


@pytest.mark.parametrize(
    "prompt",
    [
        "a hamburger",
        "A DSLR image of a HAMBURGER!",
        "an ice cream cone, front view",
        "a teddy-bear",
        "a pink robot",  # one word is unknown, the object is not
        "a dragon on a table",
        "a bear",  # a part of a name
    ],
)
def test_a_prompt_with_a_known_object_is_taken(shapes, prompt):
    assert shapes.refusal(prompt) == ""


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        ("a DSLR image of a hamburgr", " ('hamburgr': did you mean 'hamburger'?)"),
        ("two cars", " ('cars': did you mean 'car'?)"),
        ("icecream", " ('icecream': did you mean 'ice cream cone'?)"),
        ("a boat", ""),
        ("a \U0001f697", ""),
        ("гамбургер", ""),
        ("汉堡包", ""),
        ("red", ""),  # known, and no object
        ("front view", ""),
        ("a picture", ""),
        ("?!", ""),
    ],
)
def test_a_prompt_without_one_is_refused_with_a_list_and_what_was_meant(shapes, prompt, hint):
    line = shapes.refusal(prompt)
    start = f"the prompt {prompt!r} names no object that this model knows{hint}: it knows the "
    assert line.startswith(f"{start}objects hamburger, snowman, ") and "\n" not in line
    assert line.endswith(f", penguin; to try it all the same, add {FORCE}")
    assert all(name in line for name in shapes.objects)


def test_unknown_words_are_named_once_with_all_that_are_known(shapes):
    line = shapes.warning(["a pink robot", "a pink robot, side view", "grren"], "a pink robot")
    assert line.startswith(
        "this model does not know 'pink', 'grren' and reads them letter by letter "
        "('grren': did you mean 'green'?). It knows the objects hamburger, "
    )
    assert "; colors red, orange, " in line and "; views side, front, back, overhead; " in line
    assert shapes.warning(["a red car", "A blue 3D render, overhead view."], "a red car") == ""
    many = " ".join(f"w{chr(97 + i)}q" for i in range(9))
    assert "'weq' and 4 more words and" in shapes.warning([many])


def test_a_part_of_a_name_is_told_what_it_is_a_part_of(shapes):
    assert shapes.warning(["a cone"], "a cone").startswith(
        "'cone' alone is no object that it knows: write 'ice cream cone', 'traffic cone'. It knows"
    )
    assert shapes.warning(["a teddy bear cone"], "a teddy bear cone") == ""


def test_a_color_is_said_to_change_little_where_the_model_has_not_seen_it(module):
    known = module.Vocabulary.read(EXTENSION / "lods" / "models" / "pocket")
    line = known.warning(["a red cactus"], "a red cactus")
    assert line.startswith(
        "the model has seen 'cactus' in its own colours only: 'red' may change little. "
        "Those that it has seen in colours: "
    )
    assert "backpack" in line and "cactus" not in line.partition("Those")[2]
    for prompt in ("a cactus", "a red backpack", "a cactus, a red backpack", "red"):
        assert known.warning([prompt], prompt) == ""
    both = known.warning(["a pink red cactus"], "a pink red cactus")
    assert "'pink'" in both and "'red' may change little" in both


def test_a_model_that_has_seen_all_objects_in_all_colors_says_nothing_of_them(shapes):
    assert "colored objects" not in shapes.groups
    assert shapes.warning(["a red penguin"], "a red penguin") == ""


def test_the_embedded_model_says_what_it_was_trained_with():
    from pocket.latents import vocabulary

    file = EXTENSION / "lods" / "models" / "pocket" / "vocabulary.json"
    assert json.loads(file.read_text()) == vocabulary()


def test_a_long_list_is_cut(module):
    objects = tuple(f"thing{i}" for i in range(100))
    line = module.Vocabulary({"objects": objects}).refusal("a boat")
    assert "thing59 and 40 more (see vocabulary.json); to try" in line


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"objects": "car"}', '{"objects": [1]}', '{"objects": [" "]}', "{"]
)
def test_a_file_of_something_else_is_one_line(module, tmp_path, text):
    (tmp_path / "vocabulary.json").write_text(text)
    with pytest.raises(ValueError, match=r"vocabulary\.json is not an object of lists of words"):
        module.Vocabulary.read(tmp_path)


# --- the prompt processor -----------------------------------------------------------------------


@pytest.fixture
def make(lods, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"pretrained_model_name_or_path": "pocket-shapes"}
    return lambda **cfg: threestudio.find("lods-prompt-processor")({**options, **cfg})


def test_every_run_is_told_also_when_the_cache_has_the_embeddings(make, warnings):
    for _ in range(2):
        make(prompt="a pink robot", negative_prompt="ugly")
        (line,) = warnings()
        assert "does not know 'pink', 'ugly' and" in line
    assert list(Path(".threestudio_cache").rglob("*.safetensors"))
    make(prompt="a red robot")
    assert warnings() == []


def test_the_processor_refuses_and_can_be_forced(make, warnings):
    with pytest.raises(ValueError, match="the prompt 'a boat' names no object"):
        make(prompt="a boat")
    with pytest.raises(ValueError, match="the prompt is empty"):
        make(prompt=" ")
    make(prompt="a boat", allow_unknown_words=True)
    assert "does not know 'boat'" in warnings()[0]


def test_texts_for_renders_need_no_object_and_are_looked_at_alone(make, warnings):
    processor = make(prompt="a pink car", source_prompt="a 3d render", nfsd_negative_prompt="ugly")
    warnings()
    processor.other_text("source")
    assert warnings() == []
    processor.other_text("nfsd_negative")
    (line,) = warnings()
    assert "does not know 'ugly' and" in line


def test_another_model_brings_its_own_list_and_large_models_none(make, tiny_sd, tmp_path, warnings):
    words = {"objects": ["zorgl"], "views": ["a", "side", "front", "back", "overhead", "view"]}
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd(), folder)
    make(pretrained_model_name_or_path=str(folder), prompt="a zorgl \U0001f697, гамбургер")
    assert warnings() == []
    (folder / "vocabulary.json").write_text(json.dumps(words))
    make(pretrained_model_name_or_path=str(folder), prompt="a zorgl")
    with pytest.raises(ValueError, match="it knows the objects zorgl; to try"):
        make(pretrained_model_name_or_path=str(folder), prompt="a hamburger")
    assert warnings() == []


# --- before anything is loaded ------------------------------------------------------------------


@pytest.fixture
def ask(lods, tmp_path, monkeypatch):
    """``ask(prompt, **config)`` raises what the preflight says."""
    monkeypatch.chdir(tmp_path)
    check = load_extension(EXTENSION, submodule="preflight").preflight

    def run(prompt, kind="lods-prompt-processor", model="pocket-shapes", mode="train", **cfg):
        options = {"prompt": prompt, "pretrained_model_name_or_path": model}
        options |= cfg.pop("options", {})
        system = {"prompt_processor_type": kind, "prompt_processor": options}
        cfg = {"system_type": "lods-gs-system", "system": system, "resume": None, **cfg}
        check(OmegaConf.create(cfg), mode)

    return run


@pytest.mark.parametrize("model", ["pocket-shapes", str(SHAPES), f"{SHAPES}/../pocket-shapes"])
def test_it_is_refused_by_every_name_of_the_model(ask, model):
    with pytest.raises(ValueError, match="the prompt 'a boat' names no object"):
        ask("a boat", model=model)
    with pytest.raises(ValueError, match="the prompt is empty"):
        ask("", model=model)
    ask("a boat", model=model, options={"allow_unknown_words": True})
    ask("a red car", model=model)


def test_the_hosts_own_processor_is_looked_at_too(ask, capsys):
    kind = "stable-diffusion-prompt-processor"
    with pytest.raises(ValueError, match=f"=lods-prompt-processor {FORCE}$"):
        ask("a boat", kind=kind, model=str(SHAPES), system_type="dreamfusion-system")
    assert capsys.readouterr().err == ""
    ask("a pink car", kind=kind, model=str(SHAPES))
    assert capsys.readouterr().err.startswith("warning: this model does not know 'pink' and")


def test_what_is_trained_or_unknown_is_let_through(ask, tiny_sd):
    ask("a boat", resume="last.ckpt")
    ask("a boat", resume="last.ckpt", mode="export")
    ask("a boat", model=tiny_sd())
    ask("lib:boat")
    ask("a boat", kind="another-prompt-processor")
    ask("a boat", kind=None, system_type="another-system")


@pytest.mark.parametrize("prompt", [None, True, 3, 1e3, ["a car"], {"a": "car"}])
def test_a_prompt_that_yaml_reads_as_something_else_is_one_line(ask, prompt):
    with pytest.raises(ValueError, match=r"is .*, which is not a text in YAML: write it in quotes"):
        ask(prompt)


@pytest.mark.parametrize(
    ("system_type", "key", "value", "overlay"),
    [
        ("lods-gs-system", "geometry", {"pos_encoding_config": {}}, "pocket.yaml"),
        ("lods-gs-system", "renderer", {"num_samples_per_ray": 96}, "pocket.yaml"),
        ("lods-ngp-system", "geometry", {"init_type": "ball"}, "pocket-ngp.yaml"),
        ("lods-ngp-system", "strategy", {"name": "none"}, "pocket-ngp.yaml"),
        ("lods-ngp-system", "geometry", {"free_vertices": True}, "pocket-ngp.yaml"),
        ("lods-mesh-system", "strategy", {"name": "none"}, "pocket-mesh.yaml"),
        ("lods-mesh-system", "geometry", {"ball": {"n_points": 60}}, "pocket-mesh.yaml"),
        ("lods-mesh-system", "renderer", {"num_samples_per_ray": 96}, "pocket-mesh.yaml"),
        ("lods-gs-system", "geometry", {"texture_size": 64}, "pocket.yaml"),
    ],
)
def test_an_overlay_of_the_other_kind_is_one_line(ask, system_type, key, value, overlay):
    system = {"prompt_processor": {"prompt": "a car"}, key: value}
    with pytest.raises(ValueError, match=rf"^system\.{key}.* take the overlay configs/{overlay},"):
        ask("", system_type=system_type, system=system)
    ask("", system_type=system_type, system={**system, "geometry_type": "another-geometry"})
    ask("", system_type="another-system", system=system)


def test_launch_refuses_it_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    files = [str(ROOT / "configs" / f"{n}.yaml") for n in ("lods-gs-embedding", "pocket-shapes")]
    words = ["system.prompt_processor.prompt=a hamburgr", "use_timestamp=false"]
    words.append(f"system.prompt_processor.pretrained_model_name_or_path={SHAPES}")
    assert launch(files, words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "did you mean 'hamburger'" in err
    assert not list(tmp_path.iterdir())


def test_the_playground_refuses_it_before_the_model_is_loaded(lods, tmp_path, monkeypatch, capsys):
    playground = importlib.import_module("lods.playground")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr("lods.models.load", lambda *args, **settings: pytest.fail("loaded"))
    assert playground.main("lora", ["--model", "pocket-shapes", "--prompt", "a boat"]) == 2
    assert "to try it all the same, add --allow-unknown-words" in capsys.readouterr().err
    check_words("pocket-shapes", "a boat", TextSettings(allow_unknown_words=True))


def test_evaluate_refuses_it_before_a_run_begins(lods):
    from evaluation.command import check_prompts
    from evaluation.grid import TRUE, load_grid

    run = load_grid(ROOT / "evaluation" / "grids" / "quick.yaml").runs[0]
    boat = replace(run, prompt="a boat")
    with pytest.raises(UserError, match="the prompt 'a boat' names no object"):
        check_prompts([run, boat])
    forced = replace(boat, overrides=(*boat.overrides, FORCE))
    check_prompts([run, forced, replace(boat, method=TRUE)])
