"""Optimisers, schedulers, and systems under a Trainer: exact resume above all."""

import importlib

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from tests.runs import ROOT
from threestudio.run.checkpoint import AtomicCheckpointIO, LastCheckpoint
from threestudio.systems.utils import (
    get_parameters,
    parse_optimizer,
    parse_scheduler,
    parse_scheduler_to_instance,
)
from threestudio.utils.checkpoint_files import read_checkpoint
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension

load_extension(ROOT / "tests" / "toy_extension.py")
toy = importlib.import_module("toy_extension")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.geometry = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        self.guidance = torch.nn.Module()
        self.guidance.learnable_embedding = torch.nn.Parameter(torch.zeros(3))
        self.material = torch.nn.ReLU()
        self.exporter = None


# --- optimisers ---


def test_groups_are_the_named_parts():
    net = Net()
    config = OmegaConf.create(
        {
            "name": "AdamW",
            "args": {"betas": [0.9, 0.99], "eps": 1.0e-15},
            "params": {
                "geometry": {"lr": 0.1},
                "guidance.learnable_embedding": {"lr": 0.2, "weight_decay": 0.0},
            },
        }
    )
    optimizer = parse_optimizer(config, net)
    assert type(optimizer) is torch.optim.AdamW
    first, second = optimizer.param_groups
    assert (first["name"], first["lr"], first["weight_decay"]) == ("geometry", 0.1, 0.01)
    assert len(first["params"]) == 4 and tuple(first["betas"]) == (0.9, 0.99)
    assert second["name"] == "guidance.learnable_embedding" and second["weight_decay"] == 0
    assert second["params"][0] is net.guidance.learnable_embedding
    rest = parse_optimizer(OmegaConf.create({"name": "SGD", "args": {"lr": 1.0}}), net)
    assert len(rest.param_groups[0]["params"]) == 5


def test_a_group_without_parameters_is_dropped_and_said(monkeypatch):
    config = {"name": "Adam", "params": {"geometry": {"lr": 0.1}, "material": {"lr": 1.0}}}
    said: list = []
    monkeypatch.setattr("threestudio.info", said.append)
    optimizer = parse_optimizer(OmegaConf.create(config), Net())
    assert [g["name"] for g in optimizer.param_groups] == ["geometry"]
    assert said == ["optimizer: material has no parameters and is left out"]
    with pytest.raises(UserError, match="nothing to train"):
        parse_optimizer({"name": "Adam", "params": {"material": {}, "exporter": {}}}, Net())


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"name": "Adam", "params": {"geometri": {}}}, "did you mean 'geometry'"),
        ({"name": "Adam", "params": {"guidance.learned": {}}}, "has no guidance.learned"),
        ({"name": "AdmaW"}, "torch.optim has no 'AdmaW': did you mean 'AdamW'"),
        ({"name": "lr_scheduler"}, "torch.optim has no 'lr_scheduler'"),
        ({}, "optimizer.name is missing"),
        ({"name": "Adam", "args": {"lrr": 1}}, "optimizer.args do not fit Adam"),
        ({"name": "Adam", "parms": {"geometry": {}}}, "no option 'parms': did you mean 'params'"),
        ({"name": "Adam", "lr": 0.1}, "optimizer has no option 'lr': it has name, args, params"),
    ],
)
def test_optimizer_mistakes(config, expected):
    with pytest.raises(UserError) as caught:
        parse_optimizer(OmegaConf.create(config), Net())
    assert expected in str(caught.value)


def test_a_scheduler_may_hold_what_it_refers_to_but_no_typing_error():
    optimizer = parse_optimizer({"name": "SGD", "args": {"lr": 1.0}}, Net())
    config = {"name": "StepLR", "args": {"step_size": 2}, "interval": "step", "warmup_steps": 3}
    assert parse_scheduler(config, optimizer)["interval"] == "step"
    with pytest.raises(UserError, match="no option 'intervall': did you mean 'interval'"):
        parse_scheduler({"name": "StepLR", "intervall": "step"}, optimizer)


def test_get_parameters():
    net = Net()
    assert len(get_parameters(net, "geometry.0")) == 2
    assert get_parameters(net, "geometry.0.weight")[0] is net.geometry[0].weight
    assert get_parameters(net, "exporter") == []


# --- schedulers ---


def rates(config, steps):
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = parse_scheduler_to_instance(OmegaConf.create(config), optimizer)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_schedulers_against_closed_forms():
    halving = {"name": "ExponentialLR", "args": {"gamma": 0.5}}
    warm = {"name": "LinearLR", "args": {"start_factor": 0.25, "total_iters": 3}}
    assert rates(halving, 4) == pytest.approx([1, 0.5, 0.25, 0.125])
    for name in ("SequentialLR", "Sequential"):
        both = {"name": name, "schedulers": [warm, halving], "milestones": [3]}
        assert rates(both, 6) == pytest.approx([0.25, 0.5, 0.75, 1, 0.5, 0.25])
    chained = {"name": "ChainedScheduler", "schedulers": [warm, halving]}
    factors = [0.25, 0.5, 0.75, 1, 1]
    assert rates(chained, 5) == pytest.approx([f * 0.5**i for i, f in enumerate(factors)])


def test_scheduler_interval_and_mistakes():
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    config = {"name": "ExponentialLR", "args": {"gamma": 0.5}}
    assert parse_scheduler(config, optimizer)["interval"] == "epoch"
    assert parse_scheduler({**config, "interval": "step"}, optimizer)["interval"] == "step"
    for bad, expected in [
        ({"name": "ExponentialRL"}, "did you mean 'ExponentialLR'"),
        ({**config, "interval": "hour"}, "must be 'epoch' or 'step'"),
        ({"name": "ExponentialLR", "args": {"gama": 1}}, "scheduler.args do not fit"),
        ({"name": "SequentialLR"}, "needs a list called schedulers"),
    ]:
        with pytest.raises(UserError) as caught:
            parse_scheduler(bad, optimizer)
        assert expected in str(caught.value)


# --- systems ---

CONFIG = {
    "optimizer": {"name": "Adam", "args": {"lr": 0.05}, "params": {"body": {"lr": 0.05}}},
    "scheduler": {"name": "ExponentialLR", "interval": "step", "args": {"gamma": 0.9}},
}


def fit(folder, max_steps, ckpt=None, system=None, accumulate=1, **trainer_args):
    """Train in a new Trainer, as launch.py does; seeded the same whatever is resumed."""
    pl.seed_everything(7)
    system = system or toy.ToySystem(OmegaConf.create(CONFIG), resumed=ckpt is not None)
    system.set_save_dir(str(folder))
    trainer = pl.Trainer(
        max_steps=max_steps,
        callbacks=[LastCheckpoint(folder / "last.ckpt")],
        plugins=[AtomicCheckpointIO()],
        accumulate_grad_batches=accumulate,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        **{
            "logger": False,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **trainer_args,
        },
    )
    trainer.fit(system, datamodule=toy.ToyData(), ckpt_path=ckpt)
    return system, read_checkpoint(folder / "last.ckpt")


def assert_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}[{i}]")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("first", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, first, accumulate):
    whole, expected = fit(tmp_path / "whole", 7, accumulate=accumulate)
    begun, _ = fit(tmp_path / "parts", first, accumulate=accumulate)
    assert begun.true_global_step == first
    resumed, got = fit(
        tmp_path / "parts", 7, ckpt=str(tmp_path / "parts" / "last.ckpt"), accumulate=accumulate
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng_state", "global_step"):
        assert_equal(got[key], expected[key], key)
    assert got["epoch"] == expected["epoch"] == 0
    assert begun.seen + resumed.seen == whole.seen
    # the validation of the very last batch of the first part may be repeated, none is lost
    assert sorted({*begun.validated, *resumed.validated}) == sorted(set(whole.validated))


def test_validation_does_not_disturb_training(tmp_path):
    _, with_validation = fit(tmp_path / "a", 7)
    _, without = fit(tmp_path / "b", 7, limit_val_batches=0)
    assert_equal(with_validation["state_dict"], without["state_dict"])
    assert_equal(with_validation["rng_state"], without["rng_state"])


def test_a_checkpoint_written_by_a_validation_resumes_exactly(tmp_path):
    callback = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    pl.seed_everything(7)
    trainer = pl.Trainer(
        max_steps=3,
        callbacks=[callback],
        val_check_interval=3,
        check_val_every_n_epoch=None,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(toy.ToySystem(OmegaConf.create(CONFIG)), datamodule=toy.ToyData())
    _, expected = fit(tmp_path / "whole", 7)
    _, got = fit(tmp_path / "rest", 7, ckpt=str(tmp_path / "step=3.ckpt"))
    assert_equal(got["state_dict"], expected["state_dict"])


def test_the_toy_depends_on_its_noise(tmp_path):
    """Without this the tests above would prove nothing."""
    _, expected = fit(tmp_path / "a", 3)
    state = read_checkpoint(tmp_path / "a" / "last.ckpt")
    state["rng_state"]["python"] = [*state["rng_state"]["python"][:1], (1,) * 624 + (3,), None]
    torch.save(state, tmp_path / "other.ckpt")
    _, one = fit(tmp_path / "b", 4, ckpt=str(tmp_path / "a" / "last.ckpt"))
    _, two = fit(tmp_path / "c", 4, ckpt=str(tmp_path / "other.ckpt"))
    key = "body.0.weight"
    assert not torch.equal(one["state_dict"][key], two["state_dict"][key])
    assert not torch.equal(one["state_dict"][key], expected["state_dict"][key])


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    system = toy.ToySystem(OmegaConf.create({**CONFIG, "nan_at": 2}))
    with pytest.raises(UserError, match="the loss became nan at step 2"):
        fit(tmp_path, 7, system=system)
    assert all(torch.isfinite(p).all() for p in system.parameters())


def test_counters_after_set_resume_status():
    system = toy.ToySystem({"loss": {"lambda_toy": [0, 0.0, 1.0, 10]}})
    assert (system.true_current_epoch, system.true_global_step, system.resumed) == (0, 0, False)
    system.set_resume_status(1, 5)
    assert (system.true_current_epoch, system.true_global_step) == (1, 5)
    assert system.C(system.cfg.loss.lambda_toy) == 0.5


def test_starting_weights_may_leave_modules_out(tmp_path):
    source, _ = fit(tmp_path, 2)
    config = {**CONFIG, "weights": str(tmp_path / "last.ckpt")}
    loaded = toy.ToySystem(OmegaConf.create(config))
    assert_equal(dict(loaded.state_dict()), dict(source.state_dict()))
    fresh = toy.ToySystem(OmegaConf.create({**config, "weights_ignore_modules": ["body.1"]}))
    assert torch.equal(fresh.body[0].weight, source.body[0].weight)
    assert not torch.equal(fresh.body[1].weight, source.body[1].weight)


def test_what_a_system_must_define():
    from threestudio.systems.base import BaseSystem

    system = BaseSystem({})
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        with pytest.raises(NotImplementedError, match=step):
            getattr(system, step)(None, 0)
    with pytest.raises(NotImplementedError):
        system.on_validation_epoch_end()


# --- Lift3D ---

LIFT = {
    **toy.LIFT,
    "exporter_type": "toy-exporter",
    "optimizer": {"name": "SGD", "params": {"geometry.points": {"lr": 0.1}}},
}


def test_lift3d_builds_its_parts_and_exports(tmp_path):
    system, saved = fit(tmp_path, 3, system=toy.ToyLift3D(OmegaConf.create(LIFT)))
    assert "geometry.points" in saved["state_dict"] and system.renderer.geometry is system.geometry
    steps = [step for _, step, _ in system.geometry.updates]
    assert sorted(set(steps)) == [0, 1, 2, 3]  # 3: before the validation after the last step
    again = toy.ToyLift3D(OmegaConf.create(LIFT), resumed=True)
    again.set_save_dir(str(tmp_path / "save"))
    again.set_resume_status(0, 3)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, plugins=[AtomicCheckpointIO()]
    )
    trainer.predict(again, datamodule=toy.ToyData(), ckpt_path=str(tmp_path / "last.ckpt"))
    written = (tmp_path / "save" / "it3-export" / "points.json").read_text()
    assert OmegaConf.create(written) == pytest.approx(system.geometry.points.tolist())


def test_a_geometry_is_converted_from_another_run(tmp_path):
    system, _ = fit(tmp_path / "ckpts", 3, system=toy.ToyLift3D(OmegaConf.create(LIFT)))
    (tmp_path / "configs").mkdir()
    cfg = {"tag": "t", "timestamp": "", "system_type": "toy-lift3d-system", "system": LIFT}
    OmegaConf.save(OmegaConf.create(cfg), tmp_path / "configs" / "parsed.yaml")
    config = {
        **LIFT,
        "geometry_type": "toy-grown-geometry",
        "geometry_convert_from": str(tmp_path / "ckpts" / "last.ckpt"),
        "geometry_convert_inherit_texture": True,
    }
    grown = toy.ToyLift3D(OmegaConf.create(config)).geometry
    assert torch.equal(grown.points, system.geometry.points.repeat(2)) and grown.copied_net is True
    resumed = toy.ToyLift3D(OmegaConf.create(config), resumed=True).geometry
    assert resumed.points.shape == (3,), "a resumed run has its own weights"
