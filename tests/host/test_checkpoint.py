"""Checkpoints: whole or absent, safe to read, and an error line that names the good one."""

import os
import signal

import pytest
import torch

from threestudio.run import checkpoint as module
from threestudio.run.checkpoint import AtomicCheckpointIO
from threestudio.run.interrupt import Interrupted, InterruptGuard
from threestudio.utils.checkpoint_files import read_checkpoint
from threestudio.utils.errors import UserError


def content(step):
    return {"state_dict": {"w": torch.full((5000,), float(step))}, "global_step": step, "epoch": 0}


@pytest.fixture
def folder(tmp_path):
    """ckpts/ with three checkpoints, the oldest first."""
    io = AtomicCheckpointIO()
    for age, step in enumerate((1, 2, 3)):
        path = tmp_path / "ckpts" / f"step={step}.ckpt"
        io.save_checkpoint(content(step), path)
        os.utime(path, (1000 + age, 1000 + age))
    return tmp_path / "ckpts"


def test_what_is_written_is_read_back(folder):
    loaded = AtomicCheckpointIO().load_checkpoint(folder / "step=2.ckpt")
    assert loaded["global_step"] == 2 and torch.equal(
        loaded["state_dict"]["w"], torch.full((5000,), 2.0)
    )
    assert sorted(os.listdir(folder)) == [f"step={s}.ckpt" for s in (1, 2, 3)], "no leftovers"


@pytest.mark.parametrize("stage", ["save", "fsync", "replace"])
def test_a_failure_while_saving_keeps_the_old_file(folder, monkeypatch, stage):
    def fail(*args, **kwargs):
        if stage == "save":
            args[1].write(b"half a checkpoint")
        raise OSError("no space left on device")

    target = {"save": (module.torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}
    monkeypatch.setattr(*target[stage], fail)
    with pytest.raises(OSError, match="no space left"):
        AtomicCheckpointIO().save_checkpoint(content(9), folder / "step=3.ckpt")
    monkeypatch.undo()
    assert read_checkpoint(folder / "step=3.ckpt")["global_step"] == 3
    assert len(os.listdir(folder)) == 3, "no leftovers"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named_with_the_newest_good_one(folder, keep):
    for name in ("step=3.ckpt", "last.ckpt"):  # step=3 is newest, but broken too
        data = (folder / "step=3.ckpt").read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError) as caught:
        read_checkpoint(folder / "last.ckpt")
    message = str(caught.value)
    assert "last.ckpt is truncated or damaged" in message
    assert message.endswith(f"newest good one beside it is {folder / 'step=2.ckpt'}")
    assert "\n" not in message


def test_damage_inside_is_noticed(folder):
    data = bytearray((folder / "step=3.ckpt").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "step=3.ckpt").write_bytes(data)
    (folder / "last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"good one beside it is .*step=2\.ckpt"):
        read_checkpoint(folder / "last.ckpt")


def test_a_missing_file(folder, tmp_path):
    with pytest.raises(UserError, match=r"lst\.ckpt not found: the newest good .*step=3\.ckpt"):
        read_checkpoint(folder / "lst.ckpt")
    with pytest.raises(UserError, match=r"not found$"):
        read_checkpoint(tmp_path / "nowhere" / "last.ckpt")


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_is_neither_written_nor_executed(folder, capsys):
    with pytest.raises(UserError, match="cannot be read back safely"):
        AtomicCheckpointIO().save_checkpoint({"x": Payload()}, folder / "step=3.ckpt")
    assert read_checkpoint(folder / "step=3.ckpt")["global_step"] == 3
    torch.save({"x": Payload()}, folder / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt cannot be loaded"):
        read_checkpoint(folder / "evil.ckpt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_in_training_waits_the_second_does_not(signum, capfd):
    before = signal.getsignal(signum)
    with InterruptGuard() as guard:
        guard.training = True
        os.kill(os.getpid(), signum)
        assert guard.requested
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signum)
        guard.training = guard.requested = False
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_of_a_folder_that_is_not_there_no_other_file_is_suggested(folder):
    with pytest.raises(UserError) as caught:
        read_checkpoint(folder / "nothing")
    assert "newest good one" not in str(caught.value)
