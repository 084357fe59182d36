"""Values of another kind than a key takes, and misspelt keys where nothing would read them: one
line that names the key."""

import pytest
import torch
from omegaconf import OmegaConf

from tests.host.test_hints import CAR, GS, refusal
from tests.runs import ROOT
from threestudio.run.preflight import preflight, read_config
from threestudio.systems.base import BaseLift3DSystem
from threestudio.systems.utils import parse_optimizer
from threestudio.utils.config import load_config, parse_structured
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.misc import choose_device


@pytest.mark.parametrize(
    "word, said",
    [
        ("data.fovy_range={a: 1}", "data.fovy_range takes a list: data.fovy_range=[1,2], not"),
        ("system.optimizer.params=[]", "system.optimizer.params takes a mapping:"),
        ("system.guidance=[1]", "system.guidance takes a mapping: system.guidance.name=value, not"),
        ("trainer=5", "the config: trainer takes a mapping, not 5"),
        ("system=null", "the config: system is empty: give it a value"),
        ("system.prompt_processor=5", "config: system.prompt_processor takes a mapping"),
        ("seed=abc", "seed must be a whole number from 0 to 4294967295, not 'abc'"),
        ("checkpoint.filename={step", "checkpoint.filename='{step' has a brace without"),
        ("system..x=1", "cannot read 'system..x=1': a part of the key 'system..x' is empty"),
        (".system=1", "cannot read '.system=1': a part of the key"),
        ("system.seed", "cannot read 'system.seed': put the value in quotes:"),
        ("system.geometry.sh_degree", "cannot read 'system.geometry.sh_degree': options of a"),
        ("SYSTEM.geometry.sh_degree=1", "no field 'SYSTEM': did you mean 'system'?"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(word, said):
    assert said in refusal(GS, CAR, word)


def test_a_list_may_follow_a_value_that_followed_a_mapping():
    texts = ["name: {a: 1}", "name: x", "name: [1]"]
    with pytest.raises(UserError, match="name takes one value"):  # which the field says
        load_config(*texts, from_string=True)


@pytest.mark.parametrize(
    "text, said",
    [
        (b"5", "is not a YAML mapping"),
        (b"name: \xff", "is not valid YAML: save it as text in UTF-8"),
        (b"data: [1]", "data takes a mapping: data.name=value, not [1]"),
        (b"checkpoint: {filename: [a]}", "checkpoint.filename must be a text, not ['a']"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, said):
    (tmp_path / "a.yaml").write_bytes(text)
    assert said in refusal([*GS, str(tmp_path / "a.yaml")], CAR)


def test_an_overlay_in_front_of_its_config_is_refused_with_the_order():
    full, overlay = GS
    line = refusal([overlay, full], CAR)
    assert line.endswith(f"write --config {full} {overlay}")


def test_a_base_in_front_of_a_config_is_not(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "description: mine\ntrainer: {benchmark: true, max_steps: 9}"
    )
    cfg = read_config([str(tmp_path / "base.yaml"), *GS], [CAR], "train")
    assert cfg.trainer.benchmark is True


def test_a_filename_of_a_checkpoint_may_name_metrics():
    cfg = load_config("tag: t\ncheckpoint: {filename: '{epoch}-{step:06d}'}", from_string=True)
    assert cfg.checkpoint.filename == "{epoch}-{step:06d}"


@pytest.mark.parametrize("section", ["geometry", "guidance", "guidance_type"])
def test_an_extension_looks_past_a_section_that_is_none(section, capsys):
    words = [CAR, f"system.{section}=5"]
    preflight(GS, words, "train", [ROOT / "custom"])
    assert "left out" not in capsys.readouterr().err


def test_a_name_in_capitals_is_suggested_in_its_own_letters():
    assert nearest("SEED", ["speed", "seed"]) == ": did you mean 'seed'?"


@pytest.mark.parametrize(
    "config, said",
    [
        ({"args": {"betas": [0.9]}}, r"optimizer\.args\.betas must be 2 numbers, not \[0\.9\]"),
        ({"args": {"betas": [0.9] * 3}}, "betas must be 2 numbers"),
        ({"name": "Adan", "args": {"betas": [0.9, 0.9]}}, "betas must be 3 numbers"),
        ({"params": {"weight": {"betas": [0.9] * 3}}}, r"params\.weight\.betas must be 2 numbers"),
        ({"params": {"weight": {"lrr": 1}}}, r"params\.weight has no option 'lrr': did you mean"),
    ],
)
def test_options_of_an_optimizer_that_it_would_ignore_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        parse_optimizer({"name": "Adam", **config}, torch.nn.Linear(2, 2))


def test_a_misspelt_parameter_of_the_optimizer_is_told_from_an_option():
    config = {"name": "Adam", "params": {"0.weight": {}, "0": {"weigth": {"lr": 1.0}}}}
    with pytest.raises(UserError, match=r"params\.0 has no option 'weigth': did you mean '0\.wei"):
        parse_optimizer(config, torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_an_option_of_another_optimizer_may_stay_in_a_group():
    params = {"weight": {"lr": 0.1, "betas": [0.9, 0.99]}}
    optimizer = parse_optimizer({"name": "SGD", "params": params}, torch.nn.Linear(2, 2))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_options_of_the_strategy_that_is_not_chosen_are_read_too(lods):
    from importlib import import_module

    module = import_module("lods.threestudio.systems.gs")
    cfg = OmegaConf.create({"system": {"strategy": {"name": "none", "default": {"prune_op": 0.1}}}})
    with pytest.raises(UserError, match=r"strategy\.default\.prune_op is no option of this"):
        parse_structured(module.StrategyConfig, cfg.system.strategy)
    cfg.system.strategy.default = {"prune_opa": 0.1, "of_a_newer_gsplat": 1}
    parse_structured(module.StrategyConfig, cfg.system.strategy)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer\.accelerator=mps: there is no such device"):
        choose_device({"accelerator": "mps"})


def test_a_geometry_to_convert_needs_the_folder_of_its_run(tmp_path):
    with pytest.raises(UserError, match=r"system\.geometry_convert_from=.* folder of its run"):
        BaseLift3DSystem._converted_geometry(None, str(tmp_path / "ckpts" / "last.ckpt"))
