"""Faults that end with something other than the run: wrong folders, processes, counters, logs."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

import threestudio
from tests.host.test_failing_runs import one_line
from tests.host.test_launch import cli, last, train  # noqa: F401 (a fixture)
from tests.runs import read
from threestudio.run import loggers
from threestudio.run.checkpoint import LastCheckpoint
from threestudio.run.nonfinite import NonFiniteGuard, all_finite
from threestudio.systems.exact_resume import ExactResume
from threestudio.utils import files, saving
from threestudio.utils.callbacks import CodeSnapshotCallback
from threestudio.utils.errors import StoppedError

# --- several processes, several optimizers ---


def test_other_processes_write_no_log(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log = loggers.make_loggers(str(tmp_path))[0]
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    assert not list(tmp_path.iterdir())


def test_processes_do_not_resume_with_the_same_random_numbers():
    def draw(rank):
        torch.manual_seed(0)
        resume = ExactResume()
        content: dict = {}
        resume.on_save_checkpoint(SimpleNamespace(validating=False), None, content)
        resume.on_load_checkpoint(None, None, content)
        torch.rand(3)
        trainer = SimpleNamespace(global_rank=rank)
        resume.on_train_batch_start(trainer, SimpleNamespace(global_step=5), None, 0)
        return torch.rand(4)

    torch.manual_seed(0)
    expected = torch.rand(4)
    assert torch.equal(draw(0), expected)  # the first goes on where it was
    assert not torch.equal(draw(1), draw(0)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1), draw(1))


def guarded_step(guard, optimizer, trainer, value):
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.full_like(parameter, value)
    module = SimpleNamespace(loss_terms={}, named_parameters=lambda: [("w", parameter)])
    guard.on_before_optimizer_step(trainer, module, optimizer)
    return parameter.grad is None


def make_trainer(n=1, **fields):
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1) for _ in range(n)]
    plugin = SimpleNamespace(scaler=None)
    trainer = SimpleNamespace(
        optimizers=optimizers, precision_plugin=plugin, global_step=3, world_size=1
    )
    vars(trainer).update(fields)
    return trainer


def test_each_optimizer_has_its_own_patience():
    """A good step of one does not excuse the other."""
    guard, trainer = NonFiniteGuard("skip", patience=3), make_trainer(2)
    bad, good = trainer.optimizers
    for _ in range(2):
        assert guarded_step(guard, bad, trainer, float("nan"))
        assert not guarded_step(guard, good, trainer, 1.0)
    with pytest.raises(StoppedError, match="3 skipped steps in a row"):
        guarded_step(guard, bad, trainer, float("nan"))
    again = NonFiniteGuard("skip", patience=4)
    again.load_state_dict(guard.state_dict())
    with pytest.raises(StoppedError, match="4 skipped steps in a row"):
        guarded_step(again, bad, trainer, float("nan"))


def test_steps_that_loss_scaling_costs_are_told(monkeypatch):
    """The first of them when it happens, as ordinary; their number at the end."""
    told, warnings = [], []
    monkeypatch.setattr(threestudio, "info", told.append)
    monkeypatch.setattr(threestudio, "warn", warnings.append)
    trainer = make_trainer(precision_plugin=SimpleNamespace(scaler=object()))
    guard = NonFiniteGuard()
    for value in (float("inf"), 1.0, float("inf")):
        guarded_step(guard, trainer.optimizers[0], trainer, value)
    assert len(told) == 1 and "ordinary in the first steps" in told[0] and not warnings
    guard.on_train_end(trainer, None)
    assert warnings == ["2 steps were skipped because of values not finite"]


def test_processes_skip_together():
    votes = []

    def reduce(good, all):
        votes.append((good, all))
        return False  # another one's loss was not finite

    trainer = make_trainer(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=reduce))
    guard = NonFiniteGuard("skip")
    assert guarded_step(guard, trainer.optimizers[0], trainer, 1.0)
    assert votes == [(True, True)] and guard.skipped == 1


def test_sparse_gradients_are_looked_at():
    for value in (1.0, float("inf")):
        sparse = torch.sparse_coo_tensor([[0]], [value], (3,))
        assert all_finite([sparse]) == (value == 1.0)


# --- folders and files of others ---


def test_a_log_folder_that_cannot_be_made_is_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(threestudio, "warn", said.append)
    (tmp_path / "csv_logs").write_text("")
    log = loggers.make_loggers(str(tmp_path))[0]
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    log.finalize("success")
    assert len(said) == 1 and "the log has gaps" in said[0]


def test_a_run_with_checkpoints_elsewhere_keeps_its_config(cli):  # noqa: F811
    flags = ["checkpoint.dirpath=outputs/ck", "system.signal_at=1", "trainer.limit_val_batches=0"]
    status, out, _ = train(cli, *flags)
    assert status == 130 and Path("outputs/ck/last.ckpt").exists()
    assert "outputs/toy/p/configs/parsed.yaml" in out
    assert Path("outputs/toy/p/configs/parsed.yaml").exists()


def test_code_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(os.fsdecode(b"caf\xe9.py")).write_text("")  # a name that is not UTF-8
    os.system("git init -q . && touch good.py closed.py && git add .")
    asked = os.access
    monkeypatch.setattr(os, "access", lambda p, m: Path(p).name != "closed.py" and asked(p, m))
    names = CodeSnapshotCallback(tmp_path / "code").get_file_list()
    assert "good.py" in names and "closed.py" not in names and len(names) == 2


def test_an_error_keeps_the_name_of_the_file_that_it_is_about(tmp_path):
    with pytest.raises(PermissionError) as caught, files.whole_file(tmp_path / "new"):
        raise PermissionError(13, "Permission denied", "/source")
    assert caught.value.filename == "/source"
    with pytest.raises(OSError) as caught, files.whole_file(tmp_path / "new"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "new")


def test_leftovers_of_other_machines_are_not_ours(tmp_path):
    (tmp_path / ".a.ckpt.another_machine-999999999.tmp").write_bytes(b"")
    with contextlib.suppress(ZeroDivisionError), files.whole_file(tmp_path / "b.ckpt") as ours:
        ours.write_bytes(b"")
        (tmp_path / ours.name.replace(f"-{os.getpid()}", "-999999999")).write_bytes(b"")
        raise ZeroDivisionError
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".a.ckpt.another_machine-999999999.tmp"]


def test_a_mistake_in_a_picture_is_not_the_disks_fault(tmp_path):
    class System(saving.SaverMixin):
        _trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), training=False, world_size=1)

    system = System()
    system.set_save_dir(str(tmp_path))
    with pytest.raises(OSError, match="cannot write mode RGBA as JPEG"):
        system.save_image("x.jpg", torch.zeros(2, 2, 4).byte().numpy())
    with pytest.raises(FileNotFoundError):
        system.save_file("y", "/missing")


# --- checkpoints ---


@pytest.mark.parametrize("key, value", [("epoch", "x"), ("global_step", -1), ("state_dict", [])])
def test_counters_are_looked_at(cli, key, value):  # noqa: F811
    train(cli)
    content = read(last())
    content[key] = value
    torch.save(content, "odd.ckpt")
    one_line(train(cli, "resume=odd.ckpt"), "no checkpoint of a run", key)


@pytest.mark.parametrize("state", [[], {"skipped": "x", "in_a_row": {}}, {"skipped": 1}])
def test_a_damaged_count_of_skipped_steps(state):
    with pytest.raises(ValueError, match="skipped steps is damaged"):
        NonFiniteGuard().load_state_dict(state)


def test_five_minutes_are_five_minutes(tmp_path):
    """Whatever the step."""
    keeper = LastCheckpoint(tmp_path / "last.ckpt", minutes=5.0)
    trainer = SimpleNamespace(global_step=7, max_steps=100, world_size=1)
    assert not keeper._due(trainer)
    keeper._saved_at -= 301
    assert keeper._due(trainer)
