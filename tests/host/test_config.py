"""Configs: merging, overrides, missing values, folders, schedules and structured parsing."""

import math
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from threestudio.utils.config import (
    C_max,
    ExperimentConfig,
    config_to_primitive,
    dump_config,
    load_config,
    parse_overrides,
    parse_structured,
    safe_name,
)
from threestudio.utils.errors import UserError
from threestudio.utils.misc import C
from threestudio.utils.typing import *

BASE = """
name: lab
tag: ${rmspace:${system.prompt_processor.prompt},_}
data_type: some-data
data: {width: 64}
system_type: some-system
system:
  prompt_processor:
    prompt: ???
trainer: {max_steps: 20}
checkpoint: {every_n_train_steps: '${trainer.max_steps}'}
"""
PROMPT = "system.prompt_processor.prompt=a red car"


def load(*extra_yamls, args=(PROMPT,), **kwargs):
    return load_config(BASE, *extra_yamls, cli_args=args, from_string=True, **kwargs)


# --- merging ---


def test_later_files_then_overrides_then_keywords_win():
    second = "data: {width: 32, height: 8}\ntrainer: {max_steps: 30}"
    cfg = load(second, args=[PROMPT, "data.height=[8,16]", "n_gpus=4"], n_gpus=1)
    assert cfg.data == {"width": 32, "height": [8, 16]}
    assert cfg.checkpoint.every_n_train_steps == 30
    assert cfg.n_gpus == 1


def test_files_are_read_from_disk_and_survive_a_round_trip(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE)
    cfg = load_config(str(tmp_path / "a.yaml"), cli_args=[PROMPT])
    dump_config(tmp_path / "parsed.yaml", cfg)
    again = load_config(str(tmp_path / "parsed.yaml"))
    assert again == cfg and again.trial_dir == cfg.trial_dir
    assert config_to_primitive(again)["trainer"] == {"max_steps": 20}


@pytest.mark.parametrize(
    "raw, value",
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("1.e-3", 1e-3),
        ("true", True),
        ("null", None),
        ("", ""),
        ("[8,16]", [8, 16]),
        ("{a: 1}", {"a": 1}),
        ("a cat: asleep #1", "a cat: asleep #1"),
        ("@home, [again", "@home, [again"),
        ("'12'", "12"),
    ],
)
def test_override_values(raw, value):
    parsed = config_to_primitive(parse_overrides([f"x.y={raw}"]))
    assert parsed == {"x": {"y": value}} and type(parsed["x"]["y"]) is type(value)


# --- one-line errors ---


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], 'system.prompt_processor.prompt is missing: add system.prompt_processor.prompt="..."'),
        ([PROMPT, "--data.width=3"], "without dashes, as 'data.width=3'"),
        ([PROMPT, "--fast"], "unknown option '--fast'"),
        ([PROMPT, "fast"], "cannot read 'fast'"),
        ([PROMPT, "systm.x=1"], "no field 'systm': did you mean 'system'?"),
        ([PROMPT, "seed=abc"], "seed must be a whole number"),
        ([PROMPT, "data.width=${nothing.here}"], "at data.width"),
        ([PROMPT, "data.width=${broken"], "cannot read 'data.width=${broken'"),
        (["system.prompt_processor.prompt=", "use_timestamp=false"], "tag is empty"),
    ],
)
def test_mistakes_are_named_in_one_line(args, expected):
    with pytest.raises(UserError) as caught:
        load(args=args)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_missing_value_is_named():
    with pytest.raises(
        UserError, match=r"data\.path, system\.prompt_processor\.prompt are missing"
    ):
        load("data:\n  path: ???", args=[])


def test_files_that_are_absent_or_no_yaml(tmp_path):
    (tmp_path / "lods-gs-lora.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"not found: did you mean '.*lods-gs-lora\.yaml'"):
        load_config(str(tmp_path / "lods-gs-lara.yaml"))
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(str(tmp_path / "lods-gs-lora.yaml"))
    with pytest.raises(UserError, match="not a YAML mapping"):
        load_config("[1, 2]", from_string=True)


# --- folders ---


@pytest.mark.parametrize(
    "prompt", ["../../x/y", "/etc/passwd", "word " * 500, "é" * 400, "a\\b\x00c", "..", "a: b?"]
)
def test_a_prompt_never_leaves_its_folder(prompt, tmp_path):
    node = {"system": {"prompt_processor": {"prompt": prompt}}, "exp_root_dir": str(tmp_path)}
    cfg = load(args=[], **node)
    assert os.path.dirname(os.path.normpath(cfg.trial_dir)) == str(tmp_path / "lab")
    assert len(cfg.trial_name.encode()) < 200
    assert not (tmp_path / "lab").exists(), "a config creates nothing"
    os.makedirs(cfg.trial_dir)


def test_long_names_stay_apart_and_short_ones_stay():
    assert safe_name("w" * 500) != safe_name("w" * 501)
    assert safe_name("a_red_car") == "a_red_car"


def test_experiment_names_may_be_nested_but_not_climb():
    assert ExperimentConfig(name="a/b", tag="t", use_timestamp=False).exp_dir == "outputs/a/b"
    assert ExperimentConfig(name="../b", tag="t", use_timestamp=False).exp_dir == "outputs/__/b"


@pytest.mark.parametrize(
    "text", ["trainer", "trainer:", "system:", "checkpoint:", "n_gpus:", "seed:", "exp_root_dir:"]
)
def test_a_value_that_is_left_out(text):
    with pytest.raises(
        UserError, match=rf"the config: {text.strip(':')} is empty: give it a value"
    ):
        load_config(text, from_string=True)


@pytest.mark.parametrize("value", ["3", "[1]", "all"])
def test_a_mapping_is_one(value):
    with pytest.raises(UserError, match="trainer takes a mapping, not "):
        load_config(f"trainer: {value}", from_string=True)


def test_timestamp():
    assert load().trial_name.startswith("a_red_car@20")
    assert load(n_gpus=2).trial_name == "a_red_car"
    assert load(timestamp="@then").trial_name == "a_red_car@then"
    # it is the number of processes that counts
    assert load(args=[PROMPT, "trainer.devices=1"], n_gpus=2).trial_name.startswith("a_red_car@20")
    for more in ("trainer.devices=2", "trainer.num_nodes=2"):
        assert load(args=[PROMPT, more], n_gpus=2).trial_name == "a_red_car"
    # of devices there are no more than are visible, but for processes on the CPU
    two = [PROMPT, "trainer.devices=2"]
    assert load(args=two).trial_name.startswith("a_red_car@20")
    assert load(args=[*two, "trainer.accelerator=cpu"]).trial_name == "a_red_car"
    for value in ("many", ".inf", "null", "[2]", "²", "--3"):
        for key in ("devices", "num_nodes"):
            with pytest.raises(UserError, match=rf"^trainer\.{key}"):
                load(args=[PROMPT, f"trainer.{key}={value}"])


# --- resolvers ---


@pytest.mark.parametrize(
    "expression, value",
    [
        ("${calc_exp_lr_decay_rate:0.25,2}", 0.5),
        ("${add:1,2}", 3),
        ("${sub:1,2}", -1),
        ("${mul:3,2}", 6),
        ("${div:3,2}", 1.5),
        ("${idiv:3,2}", 1),
        ("${basename:a/b.ckpt}", "b.ckpt"),
        ("${rmspace:a b c,-}", "a-b-c"),
        ("${tuple2:3}", [3.0, 3.0]),
        ("${gt0:0}", False),
        ("${not:false}", True),
        ("${cmaxgt0:[0,0.,1.,10]}", True),
        ("${cmaxgt0:[0.,0.,10]}", False),
        ("${cmaxgt0:0.5}", True),
        ("${cmaxgt0orcmaxgt0:0,${l}}", True),
        ("${cmaxgt0orcmaxgt0:0,0}", False),
    ],
)
def test_resolvers(expression, value):
    cfg = OmegaConf.create({"l": [0, 0.0, 0.0, 10, 3.0, 20], "x": expression})
    assert config_to_primitive(cfg)["x"] == value


# --- schedules ---


@given(
    start=st.integers(0, 50),
    length=st.integers(1, 50),
    v0=st.floats(-5, 5),
    v1=st.floats(-5, 5),
    step=st.integers(0, 120),
)
def test_linear_schedule_is_the_clamped_line(start, length, v0, v1, step):
    r = min(max((step - start) / length, 0), 1)
    expected = v0 + r * (v1 - v0)
    value = [start, v0, v1, start + length]
    assert C(value, 0, step) == pytest.approx(expected, abs=1e-9)
    assert C(OmegaConf.create(value), 0, step) == C(value, 0, step)
    if start == 0:
        assert C(value[1:], 0, step) == C(value, 0, step)


def test_piecewise_schedule():
    value = [0, 0.0, 1.0, 10, 2.0, 20]
    assert [C(value, 0, s) for s in (0, 5, 10, 15, 20, 25)] == [0, 0.5, 1, 1.5, 2, 2]
    longer = [0, 0.0, 1.0, 10, 1.0, 20, 5.0, 24]
    assert [C(longer, 0, s) for s in (14, 22, 99)] == [1, 3, 5]


def test_schedule_forms():
    assert C(3, 0, 7) == 3
    assert [C([5, 0.98, 0.5, 5], 0, s) for s in (4, 5)] == [0.98, 0.5]  # a jump
    assert [C([10000, 0.98, 0.5, 10001], 0, s) for s in (10000, 10001)] == [0.98, 0.5]
    assert C([0, 0.0, 1.0, 10.0], 5, 900) == 0.5  # a float at the end counts epochs
    assert C([0, 1.0, 100.0, 10], 0, 5, interpolation="exp") == pytest.approx(10)
    assert C([0, -1.0, -100.0, 10], 0, 5, interpolation="exp") == pytest.approx(-10)
    assert C_max([0, 0.0, 3.0, 10, 1.0, 20]) == 3 and C_max([2.0, 1.0, 5]) == 2 and C_max(4) == 4


@pytest.mark.parametrize("value", [[1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6], [0, "a", 1, 3]])
def test_malformed_schedules_are_explained(value):
    with pytest.raises(ValueError, match="the schedule"):
        C(value, 0, 0)


def test_what_is_no_schedule():
    with pytest.raises(TypeError, match="must be a number or a list"):
        C("fast", 0, 0)
    with pytest.raises(ValueError, match="unknown interpolation 'cubic'"):
        C([0, 1.0, 2.0, 10], 0, 5, interpolation="cubic")
    with pytest.raises(ValueError, match="one sign"):
        C([0, 0.0, 2.0, 10], 0, 5, interpolation="exp")


# --- structured parsing ---


@dataclass
class Fields:
    percent: float = 0.5
    threshold: Union[float, str] = 0.0
    scale: Optional[float] = None
    pair: Tuple[float, float] = (1.0, 2.0)
    steps: int = 3
    label: str = ""
    free: dict = field(default_factory=dict)


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_parse_structured_accepts_what_is_meant(wrap):
    cfg = parse_structured(
        Fields,
        wrap({"percent": [50, 0.98, 0.5, 51], "threshold": 10, "scale": [1.0, 2.0, 9], "steps": 4}),
    )
    assert list(cfg.percent) == [50, 0.98, 0.5, 51]
    assert [type(v) for v in cfg.percent] == [int, float, float, int]  # the last one is a clock
    assert cfg.threshold == 10 and isinstance(cfg.threshold, float)
    assert C(cfg.scale, 0, 9) == 2
    assert parse_structured(Fields, wrap({"threshold": "auto"})).threshold == "auto"
    assert parse_structured(Fields, wrap({"percent": 1})).percent == 1.0
    nested = parse_structured(Fields, wrap({"free": {"any": {"key": 1}}}))
    assert nested.free.any.key == 1 and not hasattr(nested.free, "params")
    assert nested.get("nope") is None
    cfg.label = "assigned later"
    assert cfg.label == "assigned later"


def test_parse_structured_defaults():
    assert math.isclose(parse_structured(Fields).percent, 0.5)
    assert tuple(parse_structured(Fields, {}).pair) == (1.0, 2.0)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"percents": 1}, "Fields has no field 'percents': did you mean 'percent'?"),
        ({"zzz": 1}, "its fields are free, label"),
        ({"steps": 1.5}, "Fields, field 'steps'"),
        ({"percent": "half"}, "Fields, field 'percent'"),
        ({"percent": None}, "Fields: percent is empty: give it a value"),
        (OmegaConf.create({"label": "???"}), 'label is missing: add label="..."'),
    ],
)
def test_parse_structured_explains(values, expected):
    with pytest.raises(UserError) as caught:
        parse_structured(Fields, values)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_unknown_keys_carry_their_full_path():
    cfg = OmegaConf.create({"system": {"geometry": {"label": "???"}, "other": {"stepz": 1}}})
    with pytest.raises(UserError, match=r"system\.geometry\.label is missing"):
        parse_structured(Fields, cfg.system.geometry)
    with pytest.raises(UserError, match=r"'system\.other\.stepz': did you mean 'steps'"):
        parse_structured(Fields, cfg.system.other)


def test_an_override_finds_keys_with_dots_in_them():
    text = "system: {optimizer: {params: {geometry.means: {lr: 1}, geometry: {lr: 2}}}}\ntag: t"
    cfg = load_config(
        text,
        from_string=True,
        cli_args=[
            "system.optimizer.params.geometry.means.lr=0.5",
            "system.optimizer.params.geometry.lr=3",
            "system.optimizer.params.other.lr=4",
            "system.optimizer.params.geometry.means.eps=6",
        ],
    )
    assert cfg.system.optimizer.params == {
        "geometry.means": {"lr": 0.5, "eps": 6},
        "geometry": {"lr": 3},
        "other": {"lr": 4},
    }
