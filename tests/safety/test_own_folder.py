"""Nothing outside a run's own folder is deleted, whatever the checkpoint that it resumes says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lods
import pytest
import torch

from tests.host.test_launch import cli, last, train  # noqa: F401 (a fixture)
from tests.runs import read
from threestudio.run.best_checkpoints import BestCheckpoints
from threestudio.run.checkpoint import AtomicCheckpointIO

KEEP_ONE = ["checkpoint.save_top_k=1", "checkpoint.every_n_train_steps=1"]
KEEP_TWO = ["checkpoint.save_top_k=2", "checkpoint.monitor=train/loss_toy", KEEP_ONE[1]]


def victims(root: Path) -> list:
    """What a stranger may want to have removed: folders and files around a run's checkpoints."""
    folder = root / "victim"
    (folder / "deep").mkdir(parents=True)
    for name in ("deep/file.txt", "notes.txt", "other.ckpt"):
        (folder / name).write_text("precious")
    ckpts = root / "outputs" / "toy" / "p" / "ckpts"
    (ckpts / "inside.ckpt").mkdir()
    (ckpts / "inside.ckpt" / "file.txt").write_text("precious")
    (ckpts / "notes.txt").write_text("precious")
    (ckpts / "link.ckpt").symlink_to(folder / "other.ckpt")
    (ckpts / "linked").symlink_to(folder)
    return [
        str(folder),
        str(folder / "other.ckpt"),
        f"{ckpts}/../../../../victim",
        f"{ckpts}/../../../../victim/other.ckpt",
        str(ckpts),
        str(ckpts / "inside.ckpt"),
        str(ckpts / "notes.txt"),
        str(ckpts / "link.ckpt"),
        str(ckpts / "linked" / "other.ckpt"),
        str(ckpts / "linked" / "deep"),
        "victim",
        ".",
        "..",
        "",
        "a\0b.ckpt",
        str(ckpts / "last.ckpt"),
    ]


def tree(root: Path) -> dict:
    """Every path below `root` that a run itself does not write, with what it holds."""
    kept = {}
    for path in sorted(root.rglob("*")):
        if "victim" in path.parts or path.name in ("inside.ckpt", "notes.txt", "link.ckpt"):
            kept[path] = path.read_text() if path.is_file() else None
    return kept


def poisoned(content: dict, path, monitor: bool) -> dict:
    """A checkpoint of `content` that names `path` wherever ModelCheckpoint keeps a path."""
    (key,) = [key for key in content["callbacks"] if key.startswith("ModelCheckpoint")]
    state = dict(content["callbacks"][key])
    state |= {"best_model_path": path, "kth_best_model_path": path, "last_model_path": path}
    if monitor:
        score = torch.tensor(9e9)  # the worst there is, and so the first to go
        state |= {"best_k_models": {path: score, f"{path}/.": score}, "kth_value": score}
    return {**content, "callbacks": {**content["callbacks"], key: state}}


@pytest.mark.parametrize("monitor", [False, True])
def test_a_checkpoint_of_a_stranger_deletes_nothing(cli, monitor):  # noqa: F811
    flags = KEEP_TWO if monitor else KEEP_ONE
    assert train(cli, *flags, "trainer.max_steps=1")[0] == 0
    content, paths = read(last()), victims(Path.cwd())[monitor::4]  # tests/faults tries them all
    before = tree(Path.cwd())
    assert len(before) == 8
    for path in paths:
        torch.save(poisoned(content, path, monitor), last())
        # two steps, so that a checkpoint has to go for the next
        status, _, err = train(cli, *flags, f"resume={last()}", "trainer.max_steps=4")
        assert status == 0 and "Traceback" not in err, path
        assert tree(Path.cwd()) == before, path
        assert read(last())["global_step"] == 4, path


def test_a_run_goes_on_counting_its_own_checkpoints(cli):  # noqa: F811
    """Also where it was moved to: what it had kept before is removed for what it keeps now."""
    assert train(cli, *KEEP_ONE, "trainer.max_steps=2")[0] == 0
    os.makedirs("elsewhere")
    shutil.move("outputs/toy", "elsewhere/toy")
    root = "exp_root_dir=elsewhere"
    resume = "resume=elsewhere/toy/p/ckpts/last.ckpt"
    assert train(cli, *KEEP_ONE, root, resume, "trainer.max_steps=4")[0] == 0
    names = sorted(path.name for path in Path("elsewhere/toy/p/ckpts").iterdir())
    assert names == ["epoch=0-step=4.ckpt", "last.ckpt"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_are_found_from_their_scores(tmp_path, mode):
    scores = {"a.ckpt": 3.0, "b.ckpt": 1.0, "c.ckpt": 2.0, "gone.ckpt": -9.0}
    for name in scores:
        if name != "gone.ckpt":
            (tmp_path / name).write_bytes(b"")
    state = {f"/elsewhere/{name}": torch.tensor(score) for name, score in scores.items()}
    state |= {"/elsewhere/d.ckpt": "no score", "e.ckpt": torch.tensor(float("nan")), 3: 4}
    options = {"dirpath": tmp_path, "monitor": "x", "mode": mode, "save_top_k": 3}
    callback = BestCheckpoints(**options)
    callback.load_state_dict({"best_k_models": state, "kth_best_model_path": "/etc"})
    assert {Path(p).name for p in callback.best_k_models} == {"a.ckpt", "b.ckpt", "c.ckpt"}
    best, worst = ("b.ckpt", "a.ckpt") if mode == "min" else ("a.ckpt", "b.ckpt")
    assert callback.best_model_path == str(tmp_path / best)
    assert callback.kth_best_model_path == str(tmp_path / worst)
    assert callback.kth_value == scores[worst] and callback.best_model_score == scores[best]


@pytest.mark.parametrize("state", [None, [], {}, {"best_k_models": 3, "best_model_path": b"x"}])
def test_a_state_that_is_none_is_a_new_start(tmp_path, state):
    for monitor in (None, "x"):
        callback = BestCheckpoints(dirpath=tmp_path, monitor=monitor)
        callback.load_state_dict(state)
        assert callback.best_model_path == "" and callback.best_k_models == {}


def test_the_state_is_kept_under_the_name_that_lightning_gives_it(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    options = {"dirpath": tmp_path, "monitor": "x", "every_n_train_steps": 3}
    assert BestCheckpoints(**options).state_key == ModelCheckpoint(**options).state_key


def test_only_checkpoints_of_the_folder_are_removed(tmp_path, monkeypatch):
    said: list = []
    monkeypatch.setattr("threestudio.warn", said.append)
    (tmp_path / "ckpts" / "sub").mkdir(parents=True)
    for name in ("ckpts/a.ckpt", "ckpts/sub/b.ckpt", "ckpts/c.txt", "d.ckpt"):
        (tmp_path / name).write_bytes(b"")
    io = AtomicCheckpointIO(tmp_path / "ckpts")
    for name in ("ckpts/c.txt", "d.ckpt", "ckpts/../d.ckpt", "ckpts", "ckpts/sub", "none.ckpt"):
        io.remove_checkpoint(tmp_path / name)
    AtomicCheckpointIO().remove_checkpoint(tmp_path / "d.ckpt")
    assert (tmp_path / "d.ckpt").exists() and (tmp_path / "ckpts/c.txt").exists()
    assert len(said) == 7
    for name in ("ckpts/a.ckpt", "ckpts/sub/b.ckpt"):
        io.remove_checkpoint(tmp_path / name)
        assert not (tmp_path / name).exists()
    assert len(said) == 7


@pytest.mark.parametrize("monitor", [None, "x"])
def test_what_is_behind_a_link_is_not_taken_for_the_runs_own(tmp_path, monitor):
    """The folder of a run may be a stranger's, with a link to checkpoints of mine."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.ckpt").write_bytes(b"")
    (tmp_path / "ckpts").symlink_to(tmp_path / "mine")
    callback = BestCheckpoints(dirpath=tmp_path / "ckpts", monitor=monitor, save_top_k=1)
    scores = {"a.ckpt": torch.tensor(1.0)}
    callback.load_state_dict({"best_model_path": "a.ckpt", "best_k_models": scores})
    assert callback.best_model_path == "" and callback.best_k_models == {}


@pytest.mark.slow
def test_python_m_lods_imports_nothing_of_the_current_folder(tmp_path):
    for name in ("argparse", "difflib", "json", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from here')")
    package = Path(lods.__file__).parents[1]
    for folder in (tmp_path, package):  # and in the one that holds lods, it is found as before
        env = os.environ | {"PYTHONPATH": "" if folder == package else str(package)}
        command = [sys.executable, "-m", "lods", "--version"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"lods {lods.__version__}\n"), done.stderr
