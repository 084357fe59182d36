"""The original's three YAML files run as they are, scaled on the command line only."""

from pathlib import Path

import pytest
import torch
from lods.threestudio.systems import original
from omegaconf import OmegaConf

from tests.runs import ROOT, SMALL_FIELD, launch, read, small_run

FIXTURES = ROOT / "tests" / "original"
SMALL = {
    "lods-ngp-lora": [
        *SMALL_FIELD,
        "system.exporter.fmt=ply",
    ],
    "lods-gs-embedding": [
        "system.geometry.init_type=ball",
        "system.geometry.ball.n_points=50",
    ],
}
SMALL["lods-ngp-embedding"] = SMALL["lods-ngp-lora"]


@pytest.mark.parametrize("name", SMALL)
def test_two_steps(name, tiny_sd, tmp_path, monkeypatch):
    """Model id and scale are all that is overridden; every group of the YAML is trained."""
    monkeypatch.chdir(tmp_path)
    model = tiny_sd()
    more = [f"system.guidance.pretrained_model_name_or_path={model}", *SMALL[name]]
    if name.endswith("lora"):
        more.append(f"system.guidance.pretrained_model_name_or_path_lora={model}")
    assert launch([str(FIXTURES / f"{name}.yaml")], [*small_run(model), *more]) == 0
    last = read(Path("outputs") / name / "t" / "ckpts" / "last.ckpt")
    assert last["global_step"] == 2
    [optimizer] = last["optimizer_states"]
    rates = {group["name"]: group["lr"] for group in optimizer["param_groups"]}
    moments = sum(len(group["params"]) for group in optimizer["param_groups"])
    assert len(optimizer["state"]) == moments > 0
    if name.startswith("lods-ngp"):
        written = OmegaConf.load(FIXTURES / f"{name}.yaml").system.optimizer.params
        assert rates == {group: args.lr for group, args in written.items()}
    else:
        assert rates["geometry.means"] == pytest.approx(1.75e-4, rel=1e-3)
        assert rates["guidance"] == 1e-4
    assert all(
        torch.isfinite(value).all()
        for value in last["state_dict"].values()
        if value.is_floating_point()
    )


@pytest.fixture
def complete(lods):
    return original.complete


def minimal(**more):
    """A system section as the original's YAML has it, after parsing."""
    empty = {
        name: {}
        for name in ("geometry", "strategy", "background", "renderer", "optimizer", "lr_schedule")
    }
    return OmegaConf.create(
        {**empty, "radius": 4.0, "prompt_processor": {"prompt": "a car"}, **more}
    )


def test_the_constants_are_the_shipped_yaml(complete):
    cfg = minimal()
    complete(cfg)
    shipped = OmegaConf.load(ROOT / "configs" / "lods-gs-embedding.yaml").system
    shipped.prompt_processor.prompt = "a car"
    shipped.geometry.shap_e.prompt = "a car"
    del shipped.strategy["mcmc"], shipped.renderer["backend"]
    for name in ("geometry", "strategy", "background", "renderer", "optimizer", "lr_schedule"):
        assert OmegaConf.to_container(cfg[name]) == OmegaConf.to_container(shipped[name]), name


def test_what_the_yaml_says_stays(complete):
    cfg = minimal(
        radius=2.0,
        geometry={"init_type": "ball"},
        strategy={"name": "none"},
        optimizer={"name": "SGD", "params": {"geometry": {"lr": 1.0}, "guidance": {"lr": 2.0}}},
    )
    complete(cfg)
    assert cfg.geometry.init_type == "ball" and cfg.strategy.name == "none"
    assert cfg.geometry.shap_e.scale == pytest.approx(0.8)  # 0.4 of the radius
    assert cfg.optimizer == {
        "name": "SGD",
        "params": {"geometry": {"lr": 1.0}, "guidance": {"lr": 2.0}},
    }
    assert not cfg.lr_schedule
