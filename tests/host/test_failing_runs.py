"""What a run does when something goes wrong: killed, out of disk or memory, values not finite.

``make test-faults`` (tests/faults) does the same at length.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.host.test_launch import cli, last, logged, train  # noqa: F401 (a fixture)
from tests.runs import ROOT, read, same
from threestudio.run import loggers
from threestudio.run.checkpoint import AtomicCheckpointIO
from threestudio.utils import checkpoint_files as checkpoint
from threestudio.utils import files, saving
from threestudio.utils.callbacks import ConfigSnapshotCallback
from threestudio.utils.checkpoint_files import newest_checkpoint

FAULTY = ["system_type=toy-faulty-system", "checkpoint.every_n_train_steps=1"]
KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step")


def one_line(result, *words):
    """Assert that a run ended as a mistake does: status 2, one line, with these words in it."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def step_of(run="p"):
    return read(last(run))["global_step"]


# --- values that are not finite ---


@pytest.mark.parametrize(
    "fault, report",
    [
        ("loss", "the loss became inf (loss_toy is inf) at step 2"),
        ("constant", "the loss became nan at step 2"),
        ("gradient", "gradients are not finite: body.0.weight (2 of 12 elements) at step 2"),
        ("parameter", "parameters are not finite: body.1.bias (1 of 1 elements) after step 3"),
    ],
)
@pytest.mark.parametrize("manual", [False, True])
def test_values_not_finite_stop_the_run_before_a_checkpoint(cli, fault, report, manual):  # noqa: F811
    line = one_line(train(cli, *FAULTY, f"system.fault={fault}", f"system.manual={manual}"), report)
    assert "last good checkpoint is outputs/toy/p/ckpts/last.ckpt (step 2)" in line
    assert all(torch.isfinite(v).all() for v in read(last())["state_dict"].values())


@pytest.mark.parametrize("fault", ["loss", "constant", "gradient"])
@pytest.mark.parametrize("manual", [False, True])
def test_a_skipped_step_touches_nothing(cli, caplog, fault, manual):  # noqa: F811
    flags = [*FAULTY, f"system.fault={fault}", f"system.manual={manual}"]
    assert train(cli, *flags, "system.on_nonfinite=skip")[0] == 0
    assert caplog.text.count("this step is skipped") == 1
    before, after, end = (read(f"outputs/toy/p/ckpts/epoch=0-step={n}.ckpt") for n in (2, 3, 4))
    for key in ("state_dict", "optimizer_states"):
        same(before[key], after[key], key)
    assert not torch.equal(
        after["state_dict"]["body.0.weight"], end["state_dict"]["body.0.weight"]
    ), "the next step is taken"
    assert {s["step"].item() for s in end["optimizer_states"][0]["state"].values()} == {3.0}


def test_accumulated_gradients_are_skipped_as_one(cli, caplog):  # noqa: F811
    flags = [*FAULTY, "system.fault=constant", "system.on_nonfinite=skip"]
    assert train(cli, *flags, "trainer.accumulate_grad_batches=2")[0] == 0
    assert caplog.text.count("this step is skipped") == 1
    assert {s["step"].item() for s in read(last())["optimizer_states"][0]["state"].values()} == {3}


def test_skipping_has_an_end_that_a_resumed_run_remembers(cli, caplog):  # noqa: F811
    flags = [*FAULTY, "system.fault=gradient", "system.on_nonfinite=skip", "system.n=9"]
    flags += ["system.max_skipped_steps=3", "trainer.max_steps=9"]
    one_line(train(cli, *flags), "at step 4", "after 3 skipped steps in a row")
    assert step_of() == 4
    flags += ["system.max_skipped_steps=4"]
    one_line(train(cli, *flags, f"resume={last()}"), "at step 5", "after 4 skipped steps")
    flags += ["system.n=2"]
    assert train(cli, *flags, f"resume={last()}")[0] == 0
    assert "steps were skipped because of values not finite" in caplog.text


def test_an_unknown_policy_names_the_nearest(cli):  # noqa: F811
    one_line(
        train(cli, "system.on_nonfinite=skp"),
        "one of stop, skip, not 'skp': did you mean 'skip'?",
    )
    one_line(
        train(cli, "system.max_skipped_steps=0"),
        "max_skipped_steps must be a whole number from 1 ",
    )


def test_large_values_are_finite():
    from threestudio.run.nonfinite import all_finite

    big = torch.full((10,), 3e38)  # whose norm and sum overflow
    assert all_finite([big, torch.ones(3, dtype=torch.float16), torch.zeros(2, dtype=torch.int)])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([big, torch.tensor([1.0, bad])])


# --- memory ---


@pytest.mark.parametrize("fault", ["cuda", "memory", "allocation"])
def test_too_little_memory_names_the_settings(cli, fault):  # noqa: F811
    data = ["data_type=random-camera-datamodule", "data.batch_size=3", "data.width=17"]
    data += ["data.height=18", "data.eval_width=8", "data.eval_height=8", "data.n_test_views=1"]
    line = one_line(train(cli, *FAULTY, f"system.fault={fault}", *data), "out of memory")
    assert "lower data.batch_size (3), data.width (17), data.height (18)" in line
    assert "last good checkpoint is outputs/toy/p/ckpts/last.ckpt (step 2)" in line


def test_the_advice_knows_the_shipped_configs(lods):
    from threestudio.run.explain import why_stopped
    from threestudio.utils.config import load_config

    cli_args = ["system.prompt_processor.prompt=x"]
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    for name, words in {
        "gs": ["system.strategy.default.cap_max (no limit)"],
        "ngp": ["system.renderer.num_samples_per_ray (", "system.renderer.eval_chunk_size ("],
    }.items():
        file = str(ROOT / "configs" / f"lods-{name}-embedding.yaml")
        text = str(why_stopped(error, load_config(file, cli_args=cli_args), "nowhere"))
        for word in [*words, "enable_attention_slicing=true (now false)", "another 2.00 GiB"]:
            assert word in text, text
        assert "half_precision_weights" not in text, "it is on already"


# --- the disk ---


def fail_in(monkeypatch, module, name, error=errno.ENOSPC, when=lambda *a: True):
    """Let the function `name` of `module` fail with this error of the disk."""
    original = getattr(module, name)

    def wrapper(*args, **kwargs):
        if when(*args):
            raise OSError(error, os.strerror(error))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)


def test_a_checkpoint_that_does_not_fit_stops_the_run_and_keeps_the_last(cli, monkeypatch):  # noqa: F811
    fail_in(monkeypatch, checkpoint.torch, "save", when=lambda c, f: c["global_step"] == 3)
    line = one_line(train(cli, *FAULTY), "step=3.ckpt: No space left on device: free some space")
    assert "last good checkpoint is outputs/toy/p/ckpts/last.ckpt (step 2)" in line
    assert not [n for n in os.listdir("outputs/toy/p/ckpts") if n.endswith(".tmp")]


def test_pictures_and_logs_do_not_end_a_training(cli, monkeypatch, caplog):  # noqa: F811
    train(cli, "trainer.max_steps=1")  # loads the extension
    toy = sys.modules["toy_extension"]

    def picture(system):
        path = system.save_image(f"it{system.true_global_step}.png", torch.zeros(4, 4).byte())
        assert path.endswith(".png")

    monkeypatch.setattr(toy.ToySystem, "on_validation_epoch_end", picture)
    monkeypatch.setattr(toy.ToySystem, "test_step", lambda self, batch, i: None)
    fail_in(monkeypatch, saving.Image.Image, "save")
    fail_in(monkeypatch, loggers.CSVLogger, "save")
    assert train(cli, prompt="q")[0] == 0 and step_of("q") == 4
    assert caplog.text.count("a file is left out") == 1
    assert caplog.text.count("the log has gaps") == 1


def test_what_a_test_writes_must_be_written(cli, monkeypatch):  # noqa: F811
    train(cli)
    before = Path("outputs/toy/p/save/it4-test.json").read_text()
    fail_in(monkeypatch, files.os, "replace", when=lambda a, b: str(b).endswith(".json"))
    argv = ["--config", "toy.yaml", "--test", "system.prompt=p", "resume=outputs/toy/p"]
    one_line(cli(*argv), "it4-test.json: No space left on device")
    assert Path("outputs/toy/p/save/it4-test.json").read_text() == before
    assert sorted(os.listdir("outputs/toy/p/save")) == ["it4-test.json"], "no leftovers"


def test_a_log_keeps_its_rows_when_the_disk_is_full(tmp_path, monkeypatch):
    log = loggers.make_loggers(str(tmp_path))[0]
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    path = tmp_path / "csv_logs" / "version_0" / "metrics.csv"
    before = path.read_bytes()

    def torn(experiment):
        path.write_bytes(b"a,")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(log.experiment), "save", torn)
    log.log_metrics({"b": 1.0}, 1)
    log.save()
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written(cli, monkeypatch):  # noqa: F811
    Path("file").write_text("")
    line = one_line(train(cli, "exp_root_dir=file/outputs"), "Not a directory: choose a folder")
    assert "exp_root_dir=" in line
    fail_in(monkeypatch, ConfigSnapshotCallback, "save_config_snapshot", errno.EROFS)
    one_line(train(cli), "Read-only file system: choose a folder")
    assert not Path("outputs/toy").exists()


# --- checkpoints ---


def write(folder, **steps):
    for name, step in steps.items():
        content = {"state_dict": {"w": torch.full((900,), step)}, "global_step": step, "epoch": 0}
        AtomicCheckpointIO().save_checkpoint(content, folder / f"{name}.ckpt")


def test_the_newest_is_the_one_of_most_steps(tmp_path):
    folder = tmp_path / "ckpts"
    write(folder, late=30, early=10, last=20)  # 'last' is the file written last
    assert newest_checkpoint(tmp_path)[:2] == (folder / "late.ckpt", 30)
    for name, keep in (("late", -1), ("last", 0.5)):  # damaged in the middle; truncated
        data = bytearray((folder / f"{name}.ckpt").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / f"{name}.ckpt").write_bytes(data[: int(len(data) * abs(keep))])
    assert newest_checkpoint(tmp_path) == (
        folder / "early.ckpt",
        10,
        "the newest of 3; last.ckpt, late.ckpt are truncated or damaged",
    )


def test_one_flipped_bit_is_never_loaded(tmp_path):
    write(tmp_path, a=7)
    path = tmp_path / "a.ckpt"
    data = bytearray(path.read_bytes())
    position = data.index(torch.full((900,), 7).numpy().tobytes()) + 100
    data[position] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["state_dict"]["w"].unique().numel() == 2, (
        "torch does not notice: if it does now, is_whole is not needed"
    )
    with pytest.raises(ValueError, match="truncated or damaged"):
        checkpoint.read_checkpoint(path)


def test_resume_takes_a_folder_and_says_what_it_took(cli):  # noqa: F811
    train(cli, "checkpoint.every_n_train_steps=1")
    Path(last()).write_bytes(Path(last()).read_bytes()[:-100])
    status, out, _ = train(cli, "resume=outputs/toy/p", "trainer.max_steps=6")
    assert status == 0 and step_of() == 6
    chosen = "outputs/toy/p/ckpts/epoch=0-step=4.ckpt (step 4: the newest of 5; last.ckpt is"
    assert f"using {chosen} truncated or damaged)" in out
    Path("empty").mkdir()
    one_line(train(cli, "resume=empty"), "no checkpoint can be read in empty")


def test_leftovers_of_killed_processes_are_cleared(cli):  # noqa: F811
    train(cli)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = Path("outputs/toy/p/ckpts")
    alive = folder / f".last.ckpt.{files._HOST}-{os.getppid()}.tmp"
    alive.write_bytes(b"of a process that runs")
    (folder / f".last.ckpt.{files._HOST}-{dead.pid}.tmp").write_bytes(b"half")
    train(cli, f"resume={last()}")
    assert [n for n in os.listdir(folder) if n.endswith(".tmp")] == [alive.name]


def test_a_checkpoint_of_another_system_is_one_line(cli):  # noqa: F811
    train(cli)
    state = read(last())
    state["state_dict"] = {"other": torch.zeros(1)}
    torch.save(state, "other.ckpt")
    one_line(
        train(cli, "resume=other.ckpt"), "checkpoint other.ckpt does not fit ToySystem: Missing key"
    )
    torch.save({"state_dict": {}}, "bare.ckpt")
    one_line(train(cli, "resume=bare.ckpt"), "is no checkpoint of a run: it has no good epoch")


# --- signals ---


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("mode, hook", [("--test", "test_step"), ("--export", "predict_step")])
def test_a_signal_while_evaluating(cli, monkeypatch, name, mode, hook):  # noqa: F811
    train(cli)
    toy = sys.modules["toy_extension"]
    number = getattr(signal, name)
    monkeypatch.setattr(toy.ToySystem, hook, lambda *args: os.kill(os.getpid(), number))
    status, out, err = cli(
        "--config", "toy.yaml", mode, "system.prompt=p", "resume=outputs/toy/p/ckpts"
    )
    assert status == 128 + number and "interrupted" in out and "Traceback" not in err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_before_anything_is_built(cli, monkeypatch, name):  # noqa: F811
    number = getattr(signal, name)
    from threestudio.run import cli as module

    monkeypatch.setattr(module, "_load", lambda *args: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    status, out, _ = train(cli)
    assert status == 128 + number and "nothing had been trained" in out
    assert signal.getsignal(number) is before


# --- kill -9 ---


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(cli):  # noqa: F811
    flags = ["system.prompt=p", "trainer.max_steps=200", "checkpoint.every_n_train_steps=20"]
    command = [sys.executable, str(ROOT / "launch.py"), "--config", "toy.yaml", "--train", *flags]
    command += ["--extensions", "custom"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not Path(last()).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    reached = step_of()
    assert 0 < reached < 200, "killed in the middle"
    status, out, err = train(cli, *flags[1:], "resume=outputs/toy/p")
    assert status == 0 and f"(step {newest_step(out)}:" in out and "Traceback" not in err
    train(cli, *flags[1:], prompt="whole")
    for key in KEYS:
        same(read(last("whole"))[key], read(last())[key], key)


def newest_step(out):
    return int(out.split("(step ")[1].split(":")[0])
