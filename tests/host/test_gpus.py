"""Which GPUs a command line means, and what several of them refuse; no GPU is needed."""

import os

import pytest
import torch
from omegaconf import OmegaConf

from tests.runs import ROOT, launch
from threestudio.run.gpus import CHOSEN, VISIBLE, choose_gpus, count_gpus, seeing_gpus
from threestudio.run.preflight import ask_extensions
from threestudio.utils.errors import UserError

UUID, PART = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937/1/0"
EXTENSIONS = [ROOT / "custom"]


@pytest.mark.parametrize(
    "wanted, visible, expected",
    [
        ("0", "2,3", ["2"]),
        ("1", "2,3", ["3"]),
        ("1,0", "2,3", ["3", "2"]),
        (" 0, 1", "2, 3", ["2", "3"]),
        ("00", "5", ["5"]),
        (None, "2,3", ["2", "3"]),
        (None, "", []),
        (None, "-1", []),
        (None, None, ["0"]),
        ("1", None, ["1"]),
        ("0,2", None, ["0", "2"]),
        ("1", f"0,{UUID}", [UUID]),
        ("0", PART, [PART]),
        (UUID, f"{PART},{UUID}", [UUID]),
        (UUID, None, [UUID]),
        ("0", "4,-1,5", ["4"]),
    ],
)
def test_gpus_are_places_in_the_visible_list(wanted, visible, expected):
    assert choose_gpus(wanted, visible) == expected


@pytest.mark.parametrize(
    "wanted, visible, message",
    [
        ("2", "2,3", f"2 is not among the 2 that {VISIBLE}=2,3 leaves, counted from 0"),
        ("0,2", "2,3", "--gpu 0,2: 2 is not among"),
        ("0", "", "hides all; leave --gpu out"),
        ("0", "-1", "hides all; leave --gpu out"),
        ("1", "4,-1,5", "1 is not among the 1 that"),  # CUDA does not see the 5
        ("1", "NoDevFiles", "hides all"),
        ("0,0", "2,3", "names a GPU twice"),
        ("0,0", None, "names a GPU twice"),
        ("-1", None, "'-1' is no GPU here; give numbers, such as 0"),
        ("cpu", "0", "trainer.accelerator=cpu"),
        ("", "0", "'' is no GPU here"),
        ("0,", "0", "'' is no GPU here"),
        ("²", "0", "'²' is no GPU here"),
        ("1.5", "0,1", "'1.5' is no GPU here"),
        ("9" * 400, "0", "is no GPU here"),
        (UUID, "0,1", f"give one of {VISIBLE}=0,1"),
    ],
)
def test_what_is_no_place_in_it_is_refused(wanted, visible, message):
    with pytest.raises(UserError) as error:
        choose_gpus(wanted, visible)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_gpu_that_the_machine_lacks_is_refused():
    assert choose_gpus("1", None, installed=2) == ["1"]
    with pytest.raises(UserError, match=r"--gpu 2: this machine has 2 GPU\(s\)"):
        choose_gpus("2", None, installed=2)


def test_a_process_that_the_run_starts_sees_the_same_gpus(monkeypatch):
    """Lightning starts the others by the same command line, with the variables of the first."""
    monkeypatch.setenv(VISIBLE, "4,5,6")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with seeing_gpus("1,2") as chosen:
        assert chosen == ["5", "6"] and os.environ[VISIBLE] == "5,6"
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        monkeypatch.setenv("LOCAL_RANK", "1")
        with seeing_gpus("1,2") as again:
            assert again == chosen
        monkeypatch.delenv("LOCAL_RANK")
        with seeing_gpus("1") as other:  # a run of its own, started from within
            assert other == ["6"]
    assert os.environ[VISIBLE] == "4,5,6" and CHOSEN not in os.environ


def test_the_command_line_refuses_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VISIBLE, "2,3")
    monkeypatch.setattr("threestudio.run.gpus.installed_gpus", lambda: None)
    config = [str(ROOT / "configs" / "lods-gs-embedding.yaml")]
    assert launch(config, ["--gpu", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpu 2: 2 is not among the 2 that CUDA_VIS")
    assert os.environ[VISIBLE] == "2,3" and not os.listdir(tmp_path)


def test_gpus_are_counted_by_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert count_gpus(["0", "1"], "0,1") == 1  # one process on the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert count_gpus(["4", "5"], "0,1") == 2 and count_gpus(["4"], None) == 1
    assert count_gpus(["4", "5", "6"], None) == 2
    with pytest.raises(UserError, match="--gpu 0,1,2: CUDA finds 2 of these 3 GPUs"):
        count_gpus(["4", "5", "6"], "0,1,2")


# --- what several refuse ------------------------------------------------------------------------

DENSIFIED = {"strategy": {"name": "mcmc"}}


def ask(mode="train", n_gpus=2, trainer=None, system_type="lods-gs-system", **system):
    cfg = {"system_type": system_type, "system": system, "trainer": trainer or {}}
    ask_extensions(OmegaConf.create({**cfg, "n_gpus": n_gpus}), mode, EXTENSIONS)


@pytest.mark.parametrize("system", [DENSIFIED, {"strategy": {"name": "default"}}, {"radius": 4.0}])
def test_densification_on_several_gpus_is_refused_before_a_model_is_loaded(system):
    with pytest.raises(UserError, match=r"train on one GPU \(--gpu 0\).*strategy.name=none"):
        ask(**system)
    for trainer in ({"devices": 3}, {"devices": "auto"}, {"devices": -1}, {"num_nodes": 2}):
        with pytest.raises(UserError, match="on one GPU"):
            ask(trainer=trainer, **system)
    with pytest.raises(UserError, match="on one GPU"):
        ask(n_gpus=1, trainer={"accelerator": "cpu", "devices": 2}, **system)


def test_what_trains_in_one_process_is_not_refused():
    ask(n_gpus=1, **DENSIFIED)
    ask(n_gpus=1, trainer={"devices": 2}, **DENSIFIED)  # there is one, which the Trainer says
    ask(trainer={"devices": 1}, **DENSIFIED)
    ask(trainer={"accelerator": "cpu"}, **DENSIFIED)
    ask(mode="test", **DENSIFIED)
    ask(strategy={"name": "none"})
    ask(radius=4.0, strategy={"name": "none"})
    ask(system_type="lods-ngp-system")
    ask(strategy="mcmc")  # no section: what is wrong is said by who reads it


def test_what_is_taught_inside_a_step_is_refused_on_several_gpus():
    for kind in ("embedding", "lora", "vsd"):
        name = f"lods-{kind}-guidance"
        for system_type in ("lods-gs-system", "lods-ngp-system"):
            with pytest.raises(UserError, match="prior_inner_steps=0"):
                ask(
                    system_type=system_type,
                    guidance_type=name,
                    guidance={"prior_inner_steps": 2},
                )
        ask(n_gpus=1, guidance_type=name, guidance={"prior_inner_steps": 2})
    ask(guidance_type="lods-sds-guidance", guidance={"prior_inner_steps": 2})  # it learns nothing


def test_densification_with_accumulated_gradients_is_refused_as_early():
    with pytest.raises(UserError, match="accumulate_grad_batches=1"):
        ask(n_gpus=1, trainer={"accumulate_grad_batches": 2}, **DENSIFIED)


def test_the_run_asks_again_when_it_knows_the_number(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VISIBLE, "2,3")
    monkeypatch.setattr("threestudio.run.gpus.installed_gpus", lambda: None)
    monkeypatch.setattr("threestudio.run.gpus.count_gpus", lambda gpus, wanted: len(gpus))
    configs = [
        str(ROOT / f"configs/{name}.yaml") for name in ("lods-gs-embedding", "pocket-shapes")
    ]
    words = ["system.prompt_processor.prompt=a car", "system.strategy.name=default"]
    words.append(
        "system.prompt_processor.pretrained_model_name_or_path="
        f"{ROOT / 'custom/threestudio-lods/lods/models/pocket-shapes'}"
    )
    assert launch(configs, words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: densification would change") and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "wanted, visible",
    [
        ("0" * 5000, None),
        ("0," * 2000, None),
        ("0", "x" * 5000),
        (UUID, "0," * 2000),
        ("9", "0," * 9),
    ],
)
def test_a_long_list_is_refused_in_a_short_line(wanted, visible):
    with pytest.raises(UserError) as error:
        choose_gpus(wanted, visible)
    assert len(str(error.value)) < 400
