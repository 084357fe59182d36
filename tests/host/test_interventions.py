"""Changes while a run is trained: made between steps, noted, kept in checkpoints, made again."""

import contextlib
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from tests.host import test_gs_system
from tests.runs import fit, read, same
from threestudio.run import interventions
from threestudio.run.interventions import Interventions
from threestudio.utils.errors import UserError

small = test_gs_system.small  # a fixture


class Ask(pl.Callback):
    """Asks for changes at the ends of steps: {step: (what, value)}."""

    def __init__(self, changes, wishes):
        self.changes, self.wishes, self.answers = changes, wishes, []

    def on_train_batch_end(self, trainer, *args):
        for what, value in self.wishes.get(trainer.global_step, {}).items():
            self.changes.ask(what, value, self.answers.append)


WISHES = {
    1: {"prompt": "a  blue house"},
    2: {"guidance_scale": 9.0, "learning_rate_factor": 0.5},
    3: {"learning_rate_factor": 1.0},
}


def parts(system, trainer):
    return {"system": system.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}


def test_the_log_of_a_steered_run_makes_the_same_run_again(small):
    run = small("embedding")
    plain = parts(*fit(*run, max_steps=4, callbacks=[Interventions("none")]))
    Path("steered").mkdir(), Path("again").mkdir()
    steered = Interventions("steered")
    found = fit(*run, max_steps=4, callbacks=[steered, ask := Ask(steered, WISHES)])
    assert ask.answers == [None] * 4 and found[0].prompt_processor.prompt == "a blue house"
    with pytest.raises(AssertionError):
        same(plain, parts(*found))
    log = Path("steered", interventions.FILE)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["step"], line["what"], line["old"], line["new"]) for line in lines] == [
        (1, "prompt", "a red car", "a blue house"),
        (2, "guidance_scale", 1000.0, 9.0),
        (2, "learning_rate_factor", 1.0, 0.5),
        (3, "learning_rate_factor", 0.5, 1.0),
    ]
    again = fit(*run, max_steps=4, callbacks=[Interventions("again", interventions.read(log))])
    same(parts(*found), parts(*again))
    assert Path("again", interventions.FILE).read_text() == log.read_text()


def test_a_resumed_run_goes_on_with_what_was_changed(small):
    run = small("embedding")
    wishes = {1: WISHES[1], 2: WISHES[2]}
    for name in ("whole", "resumed"):
        Path(name).mkdir()

    def saver(folder):
        return pl.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_last=True
        )

    first = Interventions("whole")
    fit(*run, max_steps=4, callbacks=[first, Ask(first, wishes), saver("whole")])
    whole = read("whole/last.ckpt") if Path("whole/last.ckpt").exists() else None
    second = Interventions("whole")
    found = fit(*run, max_steps=4, resume="whole/step=3.ckpt", callbacks=[second])
    assert second.changed == {
        "prompt": "a blue house",
        "guidance_scale": 9.0,
        "learning_rate_factor": 0.5,
    }
    assert found[0].prompt_processor.prompt == "a blue house"
    third = Interventions("resumed")
    straight = fit(*run, max_steps=4, callbacks=[third, Ask(third, wishes)])
    same(parts(*straight), parts(*found))
    assert whole is None or "state_dict" in whole


def test_a_run_that_nobody_steers_has_nothing_of_it_in_its_checkpoints(small):
    Path("run").mkdir()
    saver = pl.callbacks.ModelCheckpoint("run", filename="{step}", every_n_train_steps=2)
    fit(*small("embedding"), max_steps=2, callbacks=[Interventions("run"), saver])
    assert "Interventions" not in str(list(read("run/step=2.ckpt")["callbacks"]))
    assert not Path("run", interventions.FILE).exists()


def test_a_rate_is_multiplied_in_the_step_of_the_optimizer_only():
    """A schedule that computes the next rate from the last one does not see the factor."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    changes = Interventions()
    changes._set_rate(type("T", (), {"optimizers": [optimizer]}), 0.25)
    moved = []
    for _ in range(3):
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
        moved.append(before - parameter.item())
    assert moved == [0.25, 0.125, 0.0625]
    assert optimizer.param_groups[0]["lr"] == 0.125
    changes._unhook()
    before, parameter.grad = parameter.item(), torch.ones(1)
    optimizer.step()
    assert before - parameter.item() == 0.125


def test_what_cannot_be_changed_is_told_and_changes_nothing(small):
    Path("run").mkdir()
    changes = Interventions("run")
    wishes = {1: {"prompt": " ", "guidance_scale": float("nan"), "learning_rate_factor": -1}}
    ask = Ask(changes, wishes)
    system, _ = fit(*small("embedding"), max_steps=2, callbacks=[changes, ask])
    assert len(ask.answers) == 3 and all(ask.answers)
    assert not changes.made and system.prompt_processor.prompt == "a red car"


def test_a_text_encoder_that_fails_does_not_end_the_run(small, monkeypatch):
    Path("run").mkdir()

    def broken(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(interventions, "_set_prompt", broken)
    changes = Interventions("run")
    ask = Ask(changes, {1: {"prompt": "a blue house"}})
    system, trainer = fit(*small("embedding"), max_steps=2, callbacks=[changes, ask])
    assert trainer.global_step == 2 and ask.answers == ["no memory"]
    assert not changes.made and system.prompt_processor.prompt == "a red car"


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "line 1: it is not JSON"),
        ("[]", "line 1: it needs the keys"),
        ('{"step": 1, "what": "prompt", "old": "", "new": 3}', "a prompt is a text"),
        ('{"step": 1.5, "what": "prompt", "old": "", "new": "x"}', "whole number"),
        ('{"step": 1, "what": "seed", "old": 0, "new": 1}', "cannot be changed"),
        ('{"step": 1, "what": "guidance_scale", "old": 0, "new": 1e99}', "a number from"),
        (
            '{"step": 9, "what": "guidance_scale", "old": 0, "new": 1}\n'
            '{"step": 8, "what": "guidance_scale", "old": 0, "new": 1}',
            "line 2: its step is 8",
        ),
    ],
)
def test_a_file_that_is_no_log_is_refused_with_its_line(tmp_path, text, why):
    (tmp_path / "log").write_text(text)
    with pytest.raises(UserError, match=why):
        interventions.read(tmp_path / "log")


def test_a_pipe_which_can_be_read_only_once_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a file"):
        interventions.read(tmp_path / "pipe")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        interventions.read(tmp_path / "none")


# --- what must not end a run ---


@pytest.mark.parametrize("prompt", ["${oc.env:HOME}", "a ${", "???"])
def test_a_prompt_that_a_config_would_look_up_is_refused(prompt, tmp_path):
    """It would be taken from the environment of this machine, or end the training."""
    with pytest.raises(UserError, match="neither holds"):
        interventions.checked("prompt", prompt)
    line = {"step": 1, "what": "prompt", "old": "", "new": prompt}
    (tmp_path / "log").write_text(json.dumps(line))
    with pytest.raises(UserError, match="line 1: a prompt"):
        interventions.read(tmp_path / "log")


def asked_in_a_run(small, wish):
    """``(answers, changes, prompt)`` of a run of two steps in which `wish` is asked for."""
    Path("run").mkdir()
    changes = Interventions("run")
    ask = Ask(changes, {1: wish})
    system, trainer = fit(*small("embedding"), max_steps=2, callbacks=[changes, ask])
    assert trainer.global_step == 2
    return ask.answers, changes, system.prompt_processor.prompt


def test_a_change_that_the_disk_does_not_take_is_not_made(small, monkeypatch):
    """Without its line in the log, the run could not be made again."""

    @contextlib.contextmanager
    def full(path, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
        yield

    monkeypatch.setattr(interventions, "whole_file", full)
    (answer,), changes, prompt = asked_in_a_run(small, {"prompt": "a blue house"})
    assert "free some space" in answer and prompt == "a red car" and not changes.made


def test_a_change_that_fails_is_told_and_leaves_the_log_as_it_was(small, monkeypatch):
    def fail(system, prompt):
        raise torch.OutOfMemoryError("no memory for the text encoder")

    monkeypatch.setattr(interventions, "_set_prompt", fail)
    (answer,), changes, _ = asked_in_a_run(small, {"prompt": "a blue house"})
    assert "no memory" in answer and not changes.made and not changes.changed
    assert Path("run", interventions.FILE).read_text() == ""


def test_no_change_makes_the_log_too_long_to_go_on_from(small, monkeypatch):
    monkeypatch.setattr(interventions, "MAX_BYTES", 50)
    (answer,), changes, prompt = asked_in_a_run(small, {"prompt": "a blue house"})
    assert "cannot be changed again" in answer and prompt == "a red car" and not changes.made


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 99999, b"x" * (5 << 20)])
def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, content):
    log = tmp_path / interventions.FILE
    log.write_bytes(content)
    changes = Interventions(tmp_path)
    changes.on_train_start(SimpleNamespace(global_step=5), None)
    assert changes.made == [] and log.read_text() == ""
    assert (tmp_path / f"{interventions.FILE}.damaged").read_bytes() == content


def test_a_log_that_a_link_leads_to_is_not_taken_for_the_runs_own(tmp_path):
    line = {"step": 1, "what": "prompt", "old": "", "new": "a blue house"}
    (tmp_path / "other").write_text(json.dumps(line))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / interventions.FILE).symlink_to(tmp_path / "other")
    changes = Interventions(tmp_path / "run")
    changes.on_train_start(SimpleNamespace(global_step=5), None)
    assert changes.made == [] and json.loads((tmp_path / "other").read_text()) == line
