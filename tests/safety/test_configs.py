"""A hostile config: code in YAML, growth without end, names that lead out of the folder."""

import importlib
import os
import time
from pathlib import Path

import pytest
import torch
import yaml

import threestudio
from tests.hostile import Bomb, one_line
from tests.runs import ROOT, launch
from threestudio.utils import safe_yaml
from threestudio.utils.config import ExperimentConfig, load_config, parse_overrides, safe_name
from threestudio.utils.errors import UserError


def refused(text, match, seconds=5.0, **kwargs):
    start = time.process_time()
    with pytest.raises(UserError, match=match) as caught:
        load_config(text, from_string=True, **kwargs)
    assert time.process_time() - start < 4 * seconds
    return one_line(caught)


# --- code ---


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Bomb("exploded")


def python_tags(bomb):
    call = f"touch '{bomb.marker}'"
    return [
        f'!!python/object/apply:os.system ["{call}"]',
        f'!!python/object/new:os.system ["{call}"]',
        f"!!python/object/apply:subprocess.check_call [[touch, '{bomb.marker}']]",
        "!!python/name:os.system",
        "!!python/module:os",
    ]


def test_yaml_never_calls_python(bomb, capfd):
    for i, tag in enumerate(python_tags(bomb)):
        yaml.load(f"tag: {tag}", Loader=yaml.UnsafeLoader)
        assert bomb.exploded() or i > 2, "a dud: the test would notice nothing"
        Path("evil.yaml").write_text(f"tag: {tag}")
        refused(f"tag: {tag}", "could not determine a constructor")
        capfd.readouterr()
        assert launch(["evil.yaml"], []) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert line.startswith("error: evil.yaml is not valid YAML")
        # on the command line it is a text, as a prompt may be
        assert parse_overrides([f"tag={tag}"]).tag == tag
        assert not bomb.exploded()


def test_no_resolver_evaluates_code(bomb):
    call = f"__import__('os').system('touch {bomb.marker}')"
    for name in ("eval", "oc.eval", "python", "exec"):
        with pytest.raises(UserError, match="Unsupported interpolation type") as caught:
            load_config("{}", from_string=True, tag=f'${{{name}:"{call}"}}')
        one_line(caught)
    text = f'{{description: "{call}", tag: t, data: {{n: "${{oc.decode:\'[1]\'}}"}}}}'
    cfg = load_config(text, from_string=True)
    assert cfg.description == call and cfg.data.n == [1] and not bomb.exploded()


def test_environment_variables_can_be_read(monkeypatch):
    """As users of OmegaConf expect; ``load_config`` says so."""
    monkeypatch.setenv("A_FOLDER_OF_MINE", "/data")
    cfg = load_config("{tag: t, exp_root_dir: '${oc.env:A_FOLDER_OF_MINE}'}", from_string=True)
    assert cfg.exp_root_dir == "/data" and "oc.env" in load_config.__doc__


# --- growth ---


def doubled(first, step, n):
    lines = [f"  k{i}: {step.format(f'${{data.k{i - 1}}}')}" for i in range(1, n)]
    return "\n".join(["tag: t", "data:", f"  k0: {first}", *lines])


def aliases(n):
    lines = [f"  k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, n)]
    return "\n".join(["data:", "  k0: &k0 [lol]", *lines])


def upwards(text):
    """The same with the last key first, so that nothing is resolved when it is needed."""
    tag, data, *lines = text.splitlines()
    return "\n".join([tag, data, *reversed(lines)])


BRACKETS = "'{0}{0}'"


@pytest.mark.parametrize(
    "text, match",
    [
        (aliases(10), "more than 10000 values"),
        ("data: &a {x: *a}", "inside of its own anchor"),
        ("data: {x: *a}", "not valid YAML: there is no anchor for the alias"),
        ("data: {a: &a [*b], b: &b [*a]}", "inside of its own anchor|not valid YAML"),
        ("a: " + "[" * 100_000, "deeper than 40|nesting depth"),  # the latter: libyaml itself
        ("data: " + "{a: " * 500 + "1" + "}" * 500, "deeper than 40"),
        ("data: [" + "1," * 20_000 + "1]", "more than 10000 values"),
        ("seed: 1" + ":1" * 90_000, "number of more than"),
        ("seed: 0x" + "f" * 90_000, "number of more than"),
        ("seed: " + "9" * 5000, "number of more than"),
        (doubled("lol", BRACKETS, 60), "interpolations"),
        (upwards(doubled("lol", BRACKETS, 30)), "interpolations"),
        (upwards(doubled("''", BRACKETS, 30)), "more than 2000 interpolations"),
        (doubled("[lol]", "['{0}', '{0}']", 60), "interpolations"),
        (doubled("9", "'${{mul:{0},{0}}}'", 60), "interpolations"),
        ("{tag: t, data: {k: '${mul:lol,100000000000}'}}", "two numbers"),
        ("tag: ${name}\nname: ${tag}", "[Rr]ecursive"),
        (upwards(doubled("lol", "'{0}'", 3000)), "[Rr]ecursion"),
        ("tag: " + "${" * 500 + "}" * 500, "config"),
    ],
)
def test_nothing_grows_without_end(text, match):
    refused(text, match)


def test_an_ordinary_config_is_far_from_the_bounds():
    text = doubled("a prompt", "'{0}'", 30)
    assert load_config(text, from_string=True).data.k29 == "a prompt"
    shared = "data: {a: &a {x: [1, 2]}, b: *a, c: {<<: *a, y: 3}}\ntag: t"
    assert load_config(shared, from_string=True).data.c == {"x": [1, 2], "y": 3}
    longest = "tag: t\ndescription: " + "word " * 2000
    assert len(load_config(longest, from_string=True).description) > 9000


def test_files_that_are_too_large(tmp_path, monkeypatch):
    huge = tmp_path / "huge.yaml"
    with open(huge, "wb") as file:
        file.truncate(100_000_000)
    read = []
    monkeypatch.setattr(safe_yaml, "check_yaml", lambda text, where: read.append(text))
    for path in (huge, "/dev/zero"):
        with pytest.raises(UserError, match="more than 200000 bytes") as caught:
            load_config(str(path))
        one_line(caught)
    assert not read
    monkeypatch.undo()
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="is not valid YAML") as caught:
        load_config(str(binary))
    one_line(caught)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(str(tmp_path))


# --- folders ---

NASTY = [
    "../../etc/passwd",
    "/etc/passwd",
    "~/x",
    "~root",
    "a/../../b",
    "a\\..\\b",
    "C:\\x",
    "a\x00b",
    "a\nb\r\tc",
    "\x7f\x9b2J\u202edrowssap\u200b\u2028",
    ".",
    "..",
    "...",
    ".ssh",
    "x.",
    "con",
    "NUL.txt",
    "com1",
    "-rf",
    "w" * 5000,
    "é" * 400,
    "𝐀" * 200,
    "\udcff\ud800",
    "$(touch x)`touch y`",
    "a: b? *|<>\"'",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_name_is_one_folder_anywhere(text, tmp_path):
    cfg = ExperimentConfig(name=text, tag=text, timestamp=text, exp_root_dir=str(tmp_path))
    trial = Path(cfg.trial_dir)
    assert trial.is_relative_to(tmp_path) and ".." not in trial.parts
    assert Path(os.path.normpath(trial)) == trial
    os.makedirs(trial / "save")
    for part in trial.relative_to(tmp_path).parts:
        assert part.isprintable() and len(part.encode()) <= 255
        assert part[0] != "." and part[-1] not in ". " and not set(part) & set('/\\:*?"<>|')
        assert part.split(".")[0].lower() not in ("con", "nul", "com1", "prn", "aux", "lpt1")


def test_what_is_harmless_stays(tmp_path):
    for text in ("a_red_car", "ein_Bär,_v1.5", "consul", "汉堡包", "a DSLR image"):
        assert safe_name(text) == text
    assert len({safe_name(c * n) for c in "ab" for n in (200, 201)}) == 4


@pytest.mark.parametrize("tag", [" ", "\t\n"])
def test_a_run_has_a_folder_of_its_own(tag):
    with pytest.raises(UserError, match="leaves no name") as caught:
        ExperimentConfig(tag=tag, use_timestamp=False)
    one_line(caught)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"dirpath": "/tmp"},
        {"dirpath": "outputs/../.."},
        {"dirpath": "outputsandmore"},
        {"filename": "../../x"},
        {"filename": "/tmp/x"},
        {"filename": "a\\..\\..\\x"},
    ],
)
def test_checkpoints_stay_inside(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.(dirpath|filename)") as caught:
        load_config("tag: t", from_string=True, checkpoint=checkpoint)
    one_line(caught)


def test_checkpoints_elsewhere_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = {"dirpath": "outputs/ckpts", "filename": "{epoch}/step..{step}"}
    assert load_config("tag: t", from_string=True, checkpoint=inside).checkpoint == inside
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "link").symlink_to("/")
    with pytest.raises(UserError, match="outside of exp_root_dir"):
        load_config("tag: t", from_string=True, checkpoint={"dirpath": "outputs/link/tmp"})


def files_beside(root: Path, inside: Path):
    return [p for p in root.rglob("*") if p != inside and not p.is_relative_to(inside)]


@pytest.mark.parametrize("prompt", ["../../../x/y", "/tmp/../x\ny", "~/x", "é" * 300, "a; touch z"])
def test_a_run_with_a_hostile_prompt_writes_only_into_its_folder(prompt, tmp_path, monkeypatch):
    toy = ROOT / "tests" / "toy_extension.py"
    home = tmp_path / "a" / "b" / "work"
    (home / "custom").mkdir(parents=True)
    (home / "custom" / toy.name).symlink_to(toy)
    monkeypatch.chdir(home)
    Path("toy.yaml").write_text(
        "{name: toy, tag: '${rmspace:${system.prompt},_}', data_type: toy-data, system_type: "
        "toy-system, system: {prompt: '???', optimizer: {name: SGD, args: {lr: 0.1}}}, trainer: "
        "{max_steps: 2, enable_progress_bar: false}, checkpoint: {every_n_train_steps: 2}}"
    )
    asked = ("--train", "--extensions", "custom")
    assert launch(["toy.yaml"], [f"system.prompt={prompt}"], *asked) == 0
    (trial,) = Path("outputs/toy").iterdir()
    assert (trial / "ckpts" / "last.ckpt").is_file() and (trial / "save").is_dir()
    beside = {str(p.relative_to(home)) for p in files_beside(home, home / "outputs")}
    assert beside <= {"toy.yaml", "custom", f"custom/{toy.name}"}
    assert files_beside(tmp_path, home) == [tmp_path / "a", tmp_path / "a" / "b"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../../x", "a\x00b", "x" * 300])
def test_an_exporters_file_name_stays_in_the_save_folder(name, tmp_path):
    class Saver(threestudio.systems.base.SaverMixin):
        pass

    saver = Saver()
    saver.set_save_dir(str(tmp_path / "save"))
    with pytest.raises((ValueError, OSError)) as caught:
        saver.save_json(name, {})
    one_line(caught)
    assert all(p.name == "save" for p in tmp_path.iterdir())


@pytest.mark.parametrize("prompt", [*NASTY, "汉堡包" * 40, ""])
def test_the_playgrounds_folder(lods, prompt, tmp_path, monkeypatch):

    playground = importlib.import_module("lods.playground")
    monkeypatch.chdir(tmp_path)
    folder = playground.default_folder("lora", prompt)
    assert folder.parent == Path("outputs/2d_lods_lora") and folder.name[0] not in ".-@"
    folder.mkdir(parents=True)
    assert len(list(Path("outputs").rglob("*"))) == 2


def test_text_that_is_not_unicode(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="UTF-8") as caught:
        parse_overrides(["system.prompt=\udcff"])
    one_line(caught).encode()
    cfg = {"pretrained_model_name_or_path": tiny_sd(), "prompt": "\ud800"}
    with pytest.raises(UserError, match="UTF-8") as caught:
        threestudio.find("stable-diffusion-prompt-processor")(cfg)
    one_line(caught).encode()


def test_a_prompt_of_any_characters_is_encoded(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt in ("a\x00b", "../x", "\u202e car", "🏳️‍🌈 " * 60, "'\"\\"):
        cfg = {"pretrained_model_name_or_path": tiny_sd(), "prompt": prompt}
        utils = threestudio.find("stable-diffusion-prompt-processor")(cfg)()
        assert torch.isfinite(utils.text_embeddings_vd).all()
    assert [p.name for p in tmp_path.iterdir()] == [".threestudio_cache"]
    names = {p.name for p in Path(".threestudio_cache/text_embeddings").iterdir()}
    assert all(len(n) == len("0" * 40 + ".safetensors") for n in names)


def test_a_star_is_not_an_alias_on_the_command_line():
    assert parse_overrides(["a.prompt=*star shining"]).a.prompt == "*star shining"
