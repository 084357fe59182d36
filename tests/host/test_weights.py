"""Weights of another run: what was loaded is said, and a file that has none is refused."""

import logging
import re

import pytest
import torch
from omegaconf import OmegaConf

import threestudio
from tests.runs import ROOT
from threestudio.run.checkpoint import AtomicCheckpointIO
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.misc import load_matching

toy = load_extension(ROOT / "tests" / "toy_extension.py")
LIFT = toy.LIFT


@pytest.fixture
def told(caplog, monkeypatch):
    """``told()``: (level, message) of what was logged since the last call."""
    monkeypatch.setattr(threestudio.logger, "propagate", True)
    caplog.set_level(logging.INFO)

    def lines():
        found = [
            (r.levelname, r.getMessage()) for r in caplog.records if "loaded" in r.getMessage()
        ]
        caplog.clear()
        return found

    return lines


@pytest.fixture
def save(tmp_path):
    """``save(**weights) -> path`` of a checkpoint in a run's folder with its config."""
    parsed = tmp_path / "configs" / "parsed.yaml"
    parsed.parent.mkdir()
    OmegaConf.save({"tag": "t", "timestamp": "", "system": LIFT}, parsed)

    def write(**weights):
        path = tmp_path / "ckpts" / "last.ckpt"
        state = {key.replace("__", "."): value for key, value in weights.items()}
        content = {"state_dict": state, "epoch": 1, "global_step": 7}
        AtomicCheckpointIO().save_checkpoint(content, path)
        return str(path)

    return write


def body(**other):
    good = {
        f"body.{i}.{n}": v + 1
        for i, m in enumerate(toy.ToySystem({}).body)
        for n, v in m.state_dict().items()
    }
    return {**good, **other}


def test_all_of_them_are_one_line(save, told):
    path = save(**body())
    system = toy.ToySystem({"weights": path})
    assert told() == [("INFO", f"{path}: 4 of 4 tensors loaded into ToySystem")]
    assert system.checkpoint_name == "the checkpoint"


def test_some_of_them_are_named(save, told):
    state = body(guidance__lora=torch.zeros(1))
    del state["body.1.bias"], state["body.1.weight"]
    path = save(**state)
    toy.ToySystem({"weights": path})
    ((level, line),) = told()
    assert level == "WARNING" and line == (
        f"{path}: 2 of 3 tensors loaded into ToySystem; missing there, as they were: "
        "body.1.weight, body.1.bias; not used: guidance.lora"
    )
    many = {f"key{i}": torch.zeros(1) for i in range(500)}
    toy.ToySystem({"weights": save(**body(), **many)})
    assert told()[0][1].endswith("not used: key0, key1, key2 and 497 more")


def test_what_was_to_be_ignored_is_not_missing(save, told):
    path = save(**body())
    toy.ToySystem({"weights": path, "weights_ignore_modules": ["body.1"]})
    assert told() == [("INFO", f"{path}: 2 of 2 tensors loaded into ToySystem")]


@pytest.mark.parametrize(
    "state", [{"net__weight": torch.zeros(3)}, {"system.body.0.weight": torch.zeros(3, 4)}, {}]
)
def test_none_of_them_is_an_error_that_says_what_is_there(save, state):
    path = save(**state)
    there = next(iter(state), "no weights").replace("__", ".")
    line = f"{path} holds nothing of ToySystem: {there} there, and body.0.weight, "
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        toy.ToySystem({"weights": path})


def test_another_shape_is_an_error_that_names_the_file(save):
    path = save(**body(**{"body.0.bias": torch.zeros(9)}))
    with pytest.raises(
        UserError, match=f"^{re.escape(path)} does not fit ToySystem: size mismatch"
    ):
        toy.ToySystem({"weights": path})


def convert(path, **cfg):
    return toy.ToyLift3D({**LIFT, "geometry_convert_from": path, **cfg})


def test_a_geometry_to_convert_that_matches_nothing_is_an_error(save, told):
    grown = {"geometry_type": "toy-grown-geometry"}
    path = save(geometry__means=torch.zeros(3))
    with pytest.raises(
        UserError, match="holds nothing of ToyGeometry: means there, and points here"
    ):
        convert(path, **grown)
    path = save(geometry__points=torch.ones(3), geometry__means=torch.zeros(3))
    assert torch.equal(convert(path, **grown).geometry.points, torch.ones(6))
    assert told()[0][1].endswith("1 of 2 tensors loaded into ToyGeometry; not used: means")
    with pytest.raises(UserError, match="cannot be created from ToyGeometry"):
        convert(path)  # which has no create_from of its own


def test_a_geometry_to_convert_beside_weights_is_said_to_be_unused(save, told, caplog):
    path = save(geometry__points=torch.ones(3))
    system = convert("nowhere.ckpt", weights=path)
    assert torch.equal(system.geometry.points, torch.ones(3))
    assert any("geometry_convert_from is not used" in r.getMessage() for r in caplog.records)


def test_a_volume_takes_no_encoding_of_another_size_and_says_so_of_a_texture(caplog, monkeypatch):
    monkeypatch.setattr(threestudio.logger, "propagate", True)
    volume = threestudio.find("implicit-volume")
    grid = {"otype": "HashGrid", "n_levels": 2, "n_features_per_level": 2, "log2_hashmap_size": 4}
    grid |= {"base_resolution": 2, "per_level_scale": 1.5}
    small = {"pos_encoding_config": grid, "normal_type": None}
    other = volume(small)
    with pytest.raises(UserError, match="the other geometry's encoding does not fit"):
        volume.create_from(other, {**small, "pos_encoding_config": {**grid, "n_levels": 3}})
    volume.create_from(other, {**small, "n_feature_dims": 4})
    assert "texture is not taken over: it has 3 features, and this one 4" in caplog.text


def test_a_module_without_weights_is_no_match():
    with pytest.raises(UserError, match="holds nothing of ReLU: a there, and no weights here"):
        load_matching(torch.nn.ReLU(), {"a": torch.zeros(1)}, "x.ckpt")
