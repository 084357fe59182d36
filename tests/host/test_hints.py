"""Texts of a command line stay texts, and a mistake in it is one line with the remedy."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.runs import ROOT
from threestudio.run.arguments import Program, find_config, parse_args, split_config_words
from threestudio.run.preflight import preflight, read_config
from threestudio.utils.config import config_to_primitive, load_config, parse_overrides
from threestudio.utils.errors import UserError
from threestudio.utils.hints import full_key, unquoted

GS = [str(ROOT / f"configs/{name}.yaml") for name in ("lods-gs-embedding", "pocket-shapes")]
NGP = [str(ROOT / f"configs/{name}.yaml") for name in ("lods-ngp-embedding", "pocket-shapes-ngp")]
KEY = "system.prompt_processor.prompt"
CAR = f"{KEY}=a car"


def refusal(files, *words, mode="train"):
    with pytest.raises(UserError) as caught:
        read_config(files, words, mode)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- prompts ------------------------------------------------------------------------------------

TYPED = [
    *("null", "~", "&x", "true", "yes", "123", "1e3", "007", ".inf", "[a", "[a]", "{a", "#x", "*a"),
    *("@x", "%x", "-", "|", "??", "a: b", "{a: 1}", "- a", "a # b", "> x", "!!python/x y", "it's"),
    *("x=1", "a $ {x}", "'", '"a'),
]


@pytest.mark.parametrize("prompt", TYPED)
def test_a_prompt_stays_the_text_that_was_typed(prompt, tmp_path):
    cfg = load_config(*GS, cli_args=[f"{KEY}={prompt}"])
    assert cfg.system.prompt_processor.prompt == prompt
    assert cfg.tag == prompt.replace(" ", "_")
    # and in the config that the run keeps for a relaunch
    OmegaConf.save(cfg, tmp_path / "parsed.yaml")
    again = load_config(str(tmp_path / "parsed.yaml"))
    assert again.system.prompt_processor.prompt == prompt


@pytest.mark.parametrize("key", ["x.negative_prompt", "x.prompt_back", "x.source_prompt"])
def test_so_do_the_other_texts_but_null_takes_them_away(key):
    name = key[2:]
    for typed, value in (("123", "123"), ("[a]", "[a]"), ("&x", "&x"), ("null", None), ("", "")):
        assert config_to_primitive(parse_overrides([f"{key}={typed}"])) == {"x": {name: value}}


def test_a_tag_is_a_text_and_quotes_are_yamls():
    assert parse_overrides(["tag=007"]).tag == "007"
    assert parse_overrides(["tag='a b'"]).tag == "a b"
    assert config_to_primitive(parse_overrides(["x.prompt_mask_ids=[1]"]))["x"] == {
        "prompt_mask_ids": [1]
    }
    assert config_to_primitive(parse_overrides(["x.y=#1", "x.z=&a"])) == {
        "x": {"y": "#1", "z": "&a"}
    }


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("a ${x} car", f"config: there is no key 'x' (asked for at {KEY}): '${{' begins"),
        ("a ${ car", f"cannot read '{KEY}=a ${{ car': '${{' begins a reference"),
        ("${", f"cannot read '{KEY}=${{': '${{' begins a reference to another key"),
        (r"\${x}", "config: there is no key 'x' (asked for at tag): '${' begins a reference"),
    ],
)
def test_a_reference_in_a_prompt_is_one_line(prompt, start):
    assert refusal(GS, f"{KEY}={prompt}").startswith(start)


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("a ${x} car", f"config: there is no key 'x' (asked for at {KEY}): '${{' begins"),
        ("a ${ car", "{file}, a.system.prompt: '${{' begins a reference to another key"),
    ],
)
def test_so_is_one_in_a_file(tmp_path, prompt, start):
    file = tmp_path / "mine.yaml"
    file.write_text(f"system: {{prompt_processor: {{prompt: '{prompt}'}}}}")
    line = refusal([*GS, str(file)])
    assert KEY in line and "'${' begins a reference to another key of the config" in line
    assert line.startswith(("config: ", f"{file}, "))


# --- what to write instead ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            [f"{KEY}=a", "DSLR", "image", "of", "a", "hamburger"],
            f"cannot read 'DSLR': put the value in quotes: {KEY}=\"a DSLR image of a hamburger\"",
        ),
        (
            [f"{KEY}=a", "red", "car", "seed=3"],
            f"cannot read 'red': put the value in quotes: {KEY}=\"a red car\"",
        ),
        (["DSLR"], "cannot read 'DSLR': options of a config are written key=value"),
        (
            ["--prompt", "a red car"],
            f"unknown option '--prompt': write it without dashes, as {KEY}=\"a red car\"",
        ),
        (
            ["--prompt=a $1 car"],
            f"unknown option '--prompt': write it without dashes, as {KEY}=\"a \\$1 car\"",
        ),
        (
            ["--promt"],
            f"unknown option '--promt': write it without dashes, as {KEY}=\"...\"",
        ),
        (
            [CAR, "--max-steps", "100"],
            "unknown option '--max-steps': write it without dashes, as 'trainer.max_steps=100'",
        ),
        ([CAR, "--seed=3"], "unknown option '--seed': write it without dashes, as 'seed=3'"),
        ([CAR, "--zzz"], "unknown option '--zzz': options of a config are written key=value"),
        (["prompt=a car"], f"the config has no field 'prompt': did you mean '{KEY}'?"),
        ([CAR, "sistem.loss.x=1"], "the config has no field 'sistem': did you mean 'system'?"),
    ],
)
def test_a_mistake_on_the_command_line_says_what_to_write(words, line):
    assert refusal(GS, *words) == line


def test_a_misspelt_section_of_a_file_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("systm: {loss: {lambda_sds: 1.0}}")
    line = refusal([*GS, str(file)], CAR)
    assert line == "the config has no field 'systm': did you mean 'system'?"
    assert len(refusal(GS, CAR, "zzz.x=1")) < 200


def test_words_after_config_are_files_until_a_value_comes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("red").write_text("")
    Path("a=b.yaml").write_text("")
    for words, files, overrides in (
        (["a", "b.yaml"], ["a", "b.yaml"], []),
        (["a=b.yaml", "x=1"], ["a=b.yaml"], ["x=1"]),
        (["a.yaml", "p=a", "red", "car"], ["a.yaml"], ["p=a", "red", "car"]),
        (["a.yaml", "p=a", "b.yaml", "q=c.yaml"], ["a.yaml", "b.yaml"], ["p=a", "q=c.yaml"]),
    ):
        assert split_config_words(words) == (files, overrides)


def test_the_nearest_key_is_the_one_that_is_missing_or_least_deep():
    base = OmegaConf.create(
        {"a": {"b": {"prompt": "${a.prompt}"}, "prompt": "x", "steps": 1}, "c": {"d": {"steps": 2}}}
    )
    assert full_key("prompt", base) == "a.prompt" and full_key("steps", base) == "a.steps"
    base.a.b.prompt = "???"
    assert full_key("prompt", base) == "a.b.prompt"
    assert full_key("step", base) == "a.steps" and full_key("seed", base, ["seed"]) == "seed"
    assert full_key("zzz", base) == "" and full_key("zzz", None) == ""
    assert unquoted([], ["x"]) == "" and unquoted(["--x=1"], ["y"]) == ""


# --- overlays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "kind"), [(GS, "gs"), (NGP, "ngp")])
@pytest.mark.parametrize("mode", ["train", "test"])
def test_an_overlay_alone_is_told_the_full_configs_that_fit_it(files, kind, mode):
    line = refusal([files[1]], CAR, mode=mode).replace(f"{ROOT}/", "")
    overlay = files[1].replace(f"{ROOT}/", "")
    assert line == (
        f"{overlay} is an overlay, which comes after a full config: --config configs/"
        f"lods-{kind}-embedding.yaml {overlay} (or configs/lods-{kind}-lora.yaml)"
    )


def test_where_there_is_no_full_config_none_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("data_type: [")
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 1}")
    line = refusal([str(tmp_path / "mine.yaml")])
    assert line == "the config has no data_type: there is nothing to run"
    assert refusal(GS, CAR, "data_type=") == line


@pytest.mark.parametrize(("full", "overlay"), [(GS[0], NGP[1]), (NGP[0], GS[1])])
def test_an_overlay_of_the_other_representation_is_one_line(full, overlay, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="take the overlay configs/pocket") as caught:
        preflight([full, overlay], [CAR], "train", [ROOT / "custom"])
    assert len(str(caught.value)) < 200


# --- extensions that failed to load -------------------------------------------------------------


def test_an_unknown_name_is_short_however_many_extensions_failed(monkeypatch):
    import threestudio
    from threestudio.utils import extensions

    errors = {f"h-ext-{i}": ImportError(f"first line\nno module {'x' * 2000}") for i in range(5)}
    monkeypatch.setattr(extensions, "failed", errors)
    with pytest.raises(UserError) as caught:
        threestudio.find("lods-gs-sistem")
    line = str(caught.value)
    assert "did you mean 'lods-gs-system'?" in line and len(line) < 400
    assert "(extension 'h-ext-0' failed to load: ImportError: no module xxx" in line
    assert "(so did 3 others)" in line


def test_a_misspelt_section_is_named_where_its_value_is_missing():
    line = refusal(GS, "system.promt_processor.prompt=a red car")
    assert "'system.promt_processor.prompt': did you mean 'system.prompt_processor.prompt'?" in line


def test_spaces_around_the_sign_are_named(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--train", "--config", "a.yaml", "trainer.max_steps", "=", "60"])
    assert "without spaces around the sign" in capsys.readouterr().err


def test_shipped_configs_are_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/pocket.yaml", Program()) == str(ROOT / "configs/pocket.yaml")
