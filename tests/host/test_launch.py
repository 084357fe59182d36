"""launch.py, run in process: what it writes, and what it says when something is wrong."""

import csv
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf

import launch
from tests.runs import ROOT
from threestudio.run.messages import explain_error
from threestudio.utils import extensions
from threestudio.utils.callbacks import CodeSnapshotCallback, ConfigSnapshotCallback
from threestudio.utils.checkpoint_files import read_checkpoint
from threestudio.utils.misc import set_device_type

CONFIG = """
name: toy
tag: ${rmspace:${system.prompt},_}
use_timestamp: false
seed: 3
data_type: toy-data
system_type: toy-system
system:
  prompt: ???
  optimizer: {name: Adam, args: {lr: 0.01}, params: {body: {lr: 0.01}}}
trainer:
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  num_sanity_val_steps: 0
checkpoint: {save_last: true, save_top_k: -1, every_n_train_steps: '${trainer.max_steps}'}
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """``cli(*argv) -> (status, stdout, stderr)`` in a folder with toy.yaml and custom/."""
    (tmp_path / "custom").mkdir()
    link = tmp_path / "custom" / "toy_extension.py"
    link.symlink_to(ROOT / "tests" / "toy_extension.py")
    (tmp_path / "toy.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*argv):
        try:
            status = launch.main(["--extensions", "custom", *argv])
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err

    yield run
    set_device_type(None)


def train(cli, *argv, prompt="p"):
    return cli("--config", "toy.yaml", "--train", f"system.prompt={prompt}", *argv)


def last(run="p"):
    return f"outputs/toy/{run}/ckpts/last.ckpt"


def logged(trial):
    text = Path(trial, "csv_logs", "version_0", "metrics.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


# --- a run and its folder ---


def test_train_writes_everything_and_says_where(cli):
    status, out, err = train(cli, prompt="a b")
    assert status == 0
    trial = Path("outputs/toy/a_b")
    assert sorted(p.name for p in (trial / "ckpts").iterdir()) == [
        "epoch=0-step=4.ckpt",
        "last.ckpt",
    ]
    assert out.splitlines()[0] == "no CUDA device: running on the CPU"
    assert out.splitlines()[-4:] == [
        f"results in {trial}",
        "  the toy was tested at [4]",
        f"  checkpoint: {trial}/ckpts/last.ckpt",
        f"  page: {trial}/report.html",
    ]
    assert "4/4" in err and "loss=" in err  # the bar
    for noise in ("Warning", "GPU available", "litlogger", "Seed set", "stopped"):
        assert noise not in out + err
    assert (trial / "configs" / "raw.yaml").read_text() == CONFIG
    assert OmegaConf.load(trial / "configs" / "parsed.yaml").checkpoint.every_n_train_steps == 4
    command = (trial / "cmd.txt").read_text().splitlines()[0]
    assert shlex.split(command)[-1] == "system.prompt=a b"
    rows = logged(trial)
    assert [r["step"] for r in rows if r["train/loss_toy"]] == ["0", "1", "2", "3"]
    assert any(r["lr-Adam/body"] for r in rows)
    assert (trial / "save" / "it4-test.json").is_file()


def test_a_resumed_run_writes_over_its_checkpoints(cli):
    assert train(cli)[0] == 0
    assert train(cli, "resume=outputs/toy/p", "trainer.max_steps=4")[0] == 0
    assert sorted(os.listdir("outputs/toy/p/ckpts")) == ["epoch=0-step=4.ckpt", "last.ckpt"]


def test_the_bar_and_the_log_can_be_left_out(cli):
    flags = ["trainer.enable_progress_bar=false", "trainer.logger=false"]
    status, _, err = train(cli, *flags, "trainer.enable_checkpointing=false")
    assert status == 0 and "step/s" not in err
    assert not Path("outputs/toy/p/csv_logs").exists() and not Path(last()).exists()


def test_log_interval_is_honoured(cli):
    assert train(cli, "trainer.log_every_n_steps=2")[0] == 0
    rows = logged("outputs/toy/p")
    assert [r["step"] for r in rows if r["train/loss_toy"]] == ["1", "3"]


def test_a_missing_package_is_one_line():
    error = ModuleNotFoundError("No module named 'omegaconf'", name="omegaconf")
    assert "omegaconf is not installed" in explain_error(error, ROOT)
    assert explain_error(ModuleNotFoundError("No module named 'mine'", name="mine"), ROOT) is None


def test_several_configs_are_merged_in_order(cli):
    Path("small.yaml").write_text("trainer: {max_steps: 1}")
    Path("last.yaml").write_text("trainer: {max_steps: 2}")
    argv = ["--config", "toy.yaml", "small.yaml", "system.prompt=p", "--config", "last.yaml"]
    assert cli(*argv, "--train")[0] == 0
    assert read_checkpoint(last())["global_step"] == 2
    assert Path("outputs/toy/p/configs/raw_2.yaml").read_text() == "trainer: {max_steps: 2}"


def test_resume_with_more_steps_continues_exactly_and_saves_the_last_step(cli):
    train(cli, "trainer.max_steps=7", prompt="whole")
    train(cli, "trainer.max_steps=2")
    parsed = "outputs/toy/p/configs/parsed.yaml"  # holds every_n_train_steps: 2, resolved
    status, _, _ = cli("--config", parsed, "--train", f"resume={last()}", "trainer.max_steps=7")
    assert status == 0
    whole, parts = read_checkpoint(last("whole")), read_checkpoint(last())
    assert parts["global_step"] == 7
    for key, value in whole["state_dict"].items():
        assert value.equal(parts["state_dict"][key])
    status, out, _ = cli("--config", parsed, "--train", f"resume={last()}", "trainer.max_steps=7")
    assert status == 0 and "is at step 7 of 7: nothing is left to train" in out


def test_test_validate_and_export_use_the_checkpoint(cli):
    train(cli)
    written = Path("outputs/toy/p/save/it4-test.json")
    before = json.loads(written.read_text())
    written.unlink()
    parsed = "outputs/toy/p/configs/parsed.yaml"
    for mode in ("--test", "--validate", "--export"):
        status, out, _ = cli("--config", parsed, mode, "resume=outputs/toy/LAST/ckpts/last.ckpt")
        assert status == 0 and "results in outputs/toy/p" in out
    assert json.loads(written.read_text()) == before


def test_gradio_keeps_its_files(cli):
    status, out, err = train(cli, "--gradio")
    assert status == 0 and "step/s" not in err
    assert "no page is opened here" in out and "outputs/toy/p/progress" in out
    assert Path("outputs/toy/p/progress").read_text() == "Exporting mesh assets ..."
    assert Path("outputs/toy/p/logs").exists()


def test_accelerator_and_precision(cli):
    status, out, _ = train(cli, "trainer.accelerator=cpu", "trainer.devices=1")
    assert status == 0 and "no CUDA device" not in out
    status, out, _ = train(cli, "trainer.precision=16-mixed", "trainer.max_steps=1")
    assert status == 0 and "precision 16-mixed needs a GPU: using 32 on the CPU" in out


# --- mistakes ---


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--train"], 'system.prompt is missing: add system.prompt="..."'),
        (["--test", "system.prompt=p"], "--test needs a trained model: add resume="),
        (["--validate", "system.prompt=p"], "--validate needs a trained model"),
        (["--export", "system.prompt=p"], "--export needs a trained model"),
        (["--train", "system.prompt=p", "--seed=1"], "write it without dashes, as 'seed=1'"),
        (["--train", "system.prompt=p", "sistem.x=1"], "did you mean 'system'"),
        (["--train", "system.prompt=p", "system.promt=1"], "did you mean 'prompt'"),
        (["--train", "system.prompt=p", "system_type=toy-sistem"], "did you mean 'toy-system'"),
        (["--train", "system.prompt=p", "data_type="], "the config has no data_type"),
        (["--train", "system.prompt=p", "trainer.max_step=1"], "did you mean 'max_steps'"),
        (["--train", "system.prompt=p", "trainer.strategy=few"], "trainer or checkpoint options"),
        (["--train", "system.prompt=p", "checkpoint.save_lst=1"], "did you mean 'save_last'"),
        (["--train", "system.prompt=p", "system.optimizer.name=AdmaW"], "did you mean 'AdamW'"),
        (["--train", "system.prompt=p", "system.nan_at=1"], "the loss became nan at step 1"),
        (["--train", "system.prompt=p", "resume=no.ckpt"], "checkpoint no.ckpt not found"),
        (["--train", "system.prompt=p", "--typecheck"], "--typecheck is not supported"),
        (["system.prompt=p"], "--train --validate --test --export --view is required"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(cli, argv, expected):
    status, out, err = cli("--config", "toy.yaml", *argv)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and expected in lines[0]
    assert "Traceback" not in err and "results in" not in out
    assert not Path("outputs/toy").exists()


def test_a_config_that_is_not_there(cli):
    status, _, err = cli("--config", "toi.yaml", "--train")
    assert (status, err) == (2, "error: config file toi.yaml not found: did you mean 'toy.yaml'?\n")


def test_verbose_shows_where(cli):
    status, _, err = cli("--config", "toy.yaml", "--train", "--verbose", "system.prompt=p", "x=1")
    assert status == 2 and "Traceback" in err and "error: the config has no field 'x'" in err


def test_a_truncated_checkpoint_is_answered(cli):
    train(cli)
    data = Path(last()).read_bytes()
    Path(last()).write_bytes(data[: len(data) // 2])
    status, _, err = train(cli, f"resume={last()}")
    assert status == 2
    good = "outputs/toy/p/ckpts/epoch=0-step=4.ckpt"
    hint = f"the newest good one beside it is {good}"
    assert err == f"error: checkpoint {last()} is truncated or damaged: {hint}\n"


def test_an_extension_that_fails_is_named_where_it_is_missed(cli):
    Path("custom/h-wrong").mkdir()
    Path("custom/h-wrong/__init__.py").write_text("import nothing_of_that_name")
    status, _, err = train(cli, "system_type=wrong-system")
    assert status == 2
    assert "extension 'h-wrong' failed to load: ModuleNotFoundError" in err.splitlines()[-1]
    extensions.failed.clear()


@pytest.mark.parametrize("mode", ["--train", "--test"])
def test_an_extension_that_fails_is_named_when_all_else_is_said(cli, monkeypatch, mode):
    train(cli)  # loads the toy
    toy = sys.modules["toy_extension"]
    Path("custom/h-wrong").mkdir()
    text = "raise RuntimeError('many lines\\nof a compiler\\nno such header')"
    Path("custom/h-wrong/__init__.py").write_text(text)
    monkeypatch.setattr("threestudio.warn", lambda line: print(line, file=sys.stderr))
    monkeypatch.setattr(
        toy.ToySystem, "on_fit_start", lambda self: print("on_fit_start", file=sys.stderr)
    )
    flags = ["resume=" + last()] if mode == "--test" else ["trainer.enable_progress_bar=false"]
    status, _, err = cli("--config", "toy.yaml", mode, "system.prompt=p", *flags)
    assert status == 0
    lines = [line for line in err.splitlines() if "h-wrong" in line or line.startswith("on_")]
    named = "extension 'h-wrong' failed to load: RuntimeError: no such header"
    before = ["on_fit_start"] if mode == "--train" else []
    assert lines[: len(before) + 1] == [*before, named] and lines.count(named) == 1
    status, _, err = cli("--config", "toy.yaml", "--train", "system.prompt=p", "trainer.strategy=x")
    assert status == 2 and err.splitlines()[-2] == named, "an early end names it too"
    extensions.failed.clear()


# --- interruption ---


@pytest.mark.parametrize("name, batches", [("SIGINT", 1), ("SIGTERM", 1), ("SIGINT", 2)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(cli, name, batches):
    flags = ["trainer.max_steps=6", f"trainer.accumulate_grad_batches={batches}"]
    train(cli, *flags, prompt="whole")
    flags += ["system.signal_at=2", f"system.signal={name}"]
    status, out, err = train(cli, *flags, prompt="a b")
    assert status == 128 + getattr(signal, name) and "stopping after this step" in err
    line = out.splitlines()[-1]
    head, command = line.split("; resume with: python launch.py ")
    assert head == "interrupted at step 3"
    assert not Path("outputs/toy/a_b/save").exists(), "an interrupted run is not tested"
    status, out, _ = cli(*shlex.split(command), "system.signal_at=-1")
    assert status == 0
    whole, parts = read_checkpoint(last("whole")), read_checkpoint(last("a_b"))
    assert parts["global_step"] == 6
    for key, value in whole["state_dict"].items():
        assert value.equal(parts["state_dict"][key])


def test_a_signal_in_the_last_step_skips_the_test(cli):
    status, out, _ = train(cli, "system.signal_at=3")
    assert status == 130 and "interrupted at step 4" in out
    assert read_checkpoint(last())["global_step"] == 4


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("sent, stopped", [(2, 3), (4, 4)])  # 4 is the last step
def test_a_signal_in_a_validation(cli, monkeypatch, signum, sent, stopped):
    train(cli, "trainer.max_steps=1")  # loads the extension
    toy = sys.modules["toy_extension"]

    def interrupt(system):
        if system.true_global_step == sent:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(toy.ToySystem, "on_validation_epoch_end", interrupt)
    status, out, _ = train(cli, prompt="q")
    assert status == 128 + signum and f"interrupted at step {stopped}; resume with" in out
    assert not Path("outputs/toy/q/save").exists(), "an interrupted run is not tested"
    assert read_checkpoint(last("q"))["global_step"] == stopped


def test_a_signal_while_setting_up_leaves_nothing(cli, monkeypatch):
    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), 2)

    monkeypatch.setattr(ConfigSnapshotCallback, "on_fit_start", interrupt)
    status, out, _ = train(cli)
    assert status == 130 and "nothing had been trained yet" in out
    assert not Path("outputs/toy/p").exists()


# --- callbacks ---


def test_code_snapshot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("threestudio.utils.extensions.loaded", {})
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    for name in ("kept.py", "sub dir/é.py", "ignored.py", "load/x.py", "outputs/y.py", "new.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("big.bin").write_bytes(b"0" * 1_000_001)
    Path(".gitignore").write_text("ignored.py\n")
    tracked = ["kept.py", "sub dir", "load", "outputs", "big.bin", ".gitignore"]
    subprocess.run([*git, "add", *tracked], check=True)
    Path("run").mkdir()
    callback = CodeSnapshotCallback("run/code", use_version=False)
    callback.save_code_snapshot()
    callback.save_code_snapshot()  # does not copy its own copies
    copied = sorted(str(p.relative_to("run/code")) for p in Path("run").rglob("*") if p.is_file())
    assert copied == [".gitignore", "kept.py", "sub dir/é.py"]
    # nor those of the run before, where runs are in a folder of another name
    callback = CodeSnapshotCallback("run/next/code", use_version=False, exclude=["run"])
    assert callback.get_file_list() == copied
    # but all of it where the results lie in the repository's own folder, or around it
    for root in (".", ".."):
        callback = CodeSnapshotCallback("run/next/code", use_version=False, exclude=[root, "run"])
        assert callback.get_file_list() == copied
    monkeypatch.setattr(callback, "get_file_list", lambda: ["kept.py", "gone.py"])
    callback.save_code_snapshot()
    assert [p.name for p in Path("run/next/code").iterdir()] == ["kept.py"]

    outside = tmp_path.parent / "no-repository"
    outside.mkdir(exist_ok=True)
    monkeypatch.chdir(outside)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(outside.parent))
    told = []
    monkeypatch.setattr("threestudio.info", told.append)  # it is no reason to worry
    CodeSnapshotCallback("code").on_fit_start(None, None)
    assert len(told) == 1 and "is no git repository" in told[0] and not Path("code").exists()


def test_versions_count_up(tmp_path):
    Path(tmp_path, "a.yaml").write_text("raw: 1")
    for version in (0, 1):
        callback = ConfigSnapshotCallback(str(tmp_path / "a.yaml"), OmegaConf.create({}), tmp_path)
        callback.save_config_snapshot()
        assert Path(callback.savedir).name == f"version_{version}"
        assert Path(callback.savedir, "raw.yaml").read_text() == "raw: 1"


def test_lightning_still_has_the_options_that_are_passed():
    names = set(inspect.signature(pl.Trainer.__init__).parameters)
    assert {"inference_mode", "enable_model_summary", "limit_predict_batches"} <= names


def test_help_is_quick_and_lists_the_flags():
    code = "import sys, launch\ntry:\n launch.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    root = Path(launch.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0
    flags = re.findall(r"--\w+", done.stdout)
    assert {"--config", "--gpu", "--train", "--validate", "--test", "--export"} <= set(flags)
