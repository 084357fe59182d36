"""Which folder a run gets, and that it has it for itself."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.host.test_failing_runs import one_line
from tests.host.test_launch import cli, last, train  # noqa: F401 (a fixture)
from tests.runs import ROOT, read
from threestudio.run.folder import RESULTS, TRAINING, Lock, RunFolder, make_folder
from threestudio.utils.callbacks import ConfigSnapshotCallback, VersionedCallback
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file
from threestudio.utils.misc import find_last_path

RUN = Path("outputs/toy/p")


def tree(folder):
    """Names, contents and times of all that is in a folder."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def child(work):
    """The id of a forked process that does `work` and then waits to be killed."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(done, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# --- new folders and locks ---


def test_no_two_get_the_same_new_folder(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(make_folder, [tmp_path / "a" / "b" / "run"] * 48))
    names = sorted(Path(path).name for path, _ in made)
    assert names == ["run", *(f"run-{n:03d}" for n in range(2, 49))]
    assert find_last_path(f"{tmp_path}/a/b/LAST") == str(tmp_path / "a/b/run-048")


def test_what_was_made_is_known_from_the_top(tmp_path):
    _, made = make_folder(tmp_path / "a" / "b" / "run")
    assert made == [str(tmp_path / name) for name in ("a", "a/b", "a/b/run")]
    assert make_folder(tmp_path / "a" / "b" / "run")[1] == [str(tmp_path / "a/b/run-002")]


def test_a_folder_above_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make_folder(tmp_path / "file" / "run")


def test_a_lock_is_for_one(tmp_path):
    first, second = Lock(tmp_path / "x"), Lock(tmp_path / "x")
    assert first.acquire() and first.acquire() and not second.acquire()
    assert second.holder().startswith(f"process {os.getpid()} on ")
    first.release()
    assert not (tmp_path / "x").exists() and second.acquire()
    second.release()


def test_a_lock_goes_with_the_process_that_is_killed(tmp_path):
    lock = Lock(tmp_path / "x")
    pid = child(lambda: Lock(tmp_path / "x").acquire())
    assert not lock.acquire()
    kill(pid)
    assert lock.acquire()
    lock.release()


def test_a_killed_process_leaves_no_lock_with_its_children(tmp_path):
    holder, other = Lock(tmp_path / "x"), Lock(tmp_path / "x")

    def work():
        assert holder.acquire()
        (tmp_path / "pid").write_text(str(child(lambda: None)))

    pid = child(work)
    assert not other.acquire(), "the child has it"
    kill(pid)
    try:
        assert other.acquire()
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    other.release()


def test_a_file_that_is_left_behind_locks_nothing(tmp_path):
    (tmp_path / TRAINING).write_text(f"process {os.getpid()} on here\n")
    with RunFolder() as folder:
        folder.hold(tmp_path, TRAINING)
    assert not list(tmp_path.iterdir())


def test_only_what_was_made_is_discarded(tmp_path):
    (tmp_path / "theirs" / "configs").mkdir(parents=True)
    (tmp_path / "theirs" / "configs" / "parsed.yaml").write_text("theirs")
    with RunFolder() as folder:
        folder.hold(tmp_path / "theirs", TRAINING)
        mine = folder.make(tmp_path / "new" / "mine")
        Path(mine, "code").mkdir()
        make_folder(mine)  # of another run, beside it
        folder.discard([Path(mine, "save")])
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    theirs = ["theirs", "theirs/configs", "theirs/configs/parsed.yaml"]
    assert left == ["new", "new/mine-002", *theirs]


def test_no_empty_folder_is_left_behind(tmp_path):
    with RunFolder() as folder:
        folder.discard([Path(folder.make(tmp_path / "a" / "b" / "mine"), "save")])
    assert not list(tmp_path.iterdir())


def test_what_has_results_is_not_discarded(tmp_path):
    with RunFolder() as folder:
        path = Path(folder.make(tmp_path / "mine"))
        (path / "save").mkdir()
        (path / "save" / "it1.png").write_text("")
        folder.discard([path / "ckpts", path / "save"])
        assert (path / "save" / "it1.png").exists()


def test_other_processes_of_a_run_make_and_lock_nothing(tmp_path):
    with RunFolder(first=False) as folder:
        assert folder.make(tmp_path / "a") == str(tmp_path / "a")
        folder.hold(tmp_path / "b", TRAINING)
        with folder.results(tmp_path / "b"):
            folder.discard([])
    assert not list(tmp_path.iterdir())


def test_versions_are_taken_by_one_alone(tmp_path):
    callbacks = [VersionedCallback(tmp_path) for _ in range(3)]
    assert sorted(Path(c.savedir).name for c in callbacks) == [f"version_{n}" for n in range(3)]


def test_a_file_has_the_permissions_of_the_umask(tmp_path, lods):
    from safetensors.torch import save_file

    ours = sys.modules["lods.files"].whole_file
    for mask in (0o022, 0o027):
        before = os.umask(mask)
        try:
            for i, writer in enumerate((whole_file, ours)):
                with writer(tmp_path / f"{i}.safetensors") as tmp:
                    save_file({}, tmp)
                    os.chmod(tmp, 0o600)  # what newer versions of safetensors do
                found = (tmp_path / f"{i}.safetensors").stat().st_mode
                assert found & 0o777 == 0o666 & ~mask
        finally:
            os.umask(before)


# --- runs ---


def test_a_new_run_does_not_touch_that_of_its_name(cli):  # noqa: F811
    train(cli, "trainer.max_steps=2")
    before = tree(RUN)
    status, out, _ = train(cli, "trainer.max_steps=3")
    assert status == 0 and tree(RUN) == before
    second = "outputs/toy/p-002"
    assert f"{RUN} exists: this run goes to {second}" in out and f"results in {second}" in out
    assert read(f"{second}/ckpts/last.ckpt")["global_step"] == 3
    # its config leads to it
    parsed = f"{second}/configs/parsed.yaml"
    resume = f"resume={second}/ckpts/last.ckpt"
    assert cli("--config", parsed, "--train", resume, "trainer.max_steps=4")[0] == 0
    assert read(f"{second}/ckpts/last.ckpt")["global_step"] == 4 and tree(RUN) == before
    assert len(list(RUN.parent.iterdir())) == 2


def test_checkpoints_elsewhere_are_not_shared_either(cli):  # noqa: F811
    for steps in (2, 3):
        train(cli, f"trainer.max_steps={steps}", "checkpoint.dirpath=outputs/ck")
    train(cli, "trainer.max_steps=1", "checkpoint.dirpath=outputs")
    train(cli, "trainer.max_steps=1", f"checkpoint.dirpath={RUN}/mine")
    folders = ("outputs/ck", "outputs/ck-002", "outputs", "outputs/toy/p-004/mine")
    steps = [read(f"{folder}/last.ckpt")["global_step"] for folder in folders]
    assert steps == [2, 3, 1, 1]


def test_a_run_that_goes_on_is_not_resumed_twice(cli):  # noqa: F811
    train(cli, "trainer.max_steps=2")
    before = tree(RUN)
    pid = child(lambda: Lock(RUN / TRAINING).acquire())
    try:
        line = one_line(train(cli, f"resume={RUN}"), f"process {pid} on", f"training in {RUN}")
        assert "wait until it has ended" in line
        assert {k: v for k, v in tree(RUN).items() if TRAINING not in k} == before
        # but it can be looked at
        parsed = str(RUN / "configs" / "parsed.yaml")
        assert cli("--config", parsed, "--test", f"resume={RUN}")[0] == 0
    finally:
        kill(pid)
    assert train(cli, f"resume={RUN}")[0] == 0


def test_results_are_written_by_one_at_a_time(cli):  # noqa: F811
    train(cli, "trainer.max_steps=2")
    lock = Lock(RUN / RESULTS)
    assert lock.acquire()
    parsed = str(RUN / "configs" / "parsed.yaml")
    for mode in ("--test", "--validate", "--export"):
        one_line(cli("--config", parsed, mode, f"resume={RUN}"), f"writing results into {RUN}")
    lock.release()
    assert cli("--config", parsed, "--export", f"resume={RUN}")[0] == 0
    assert "--train" in (RUN / "cmd.txt").read_text(), "the command of the training is kept"
    assert "--export" in (RUN / "cmd-export.txt").read_text()


def test_the_end_of_a_training_waits_for_a_reader(tmp_path, monkeypatch, capfd):
    lock = Lock(tmp_path / RESULTS)
    assert lock.acquire()
    monkeypatch.setattr("time.sleep", lambda seconds: lock.release())
    with RunFolder().results(tmp_path):
        assert not lock.acquire()
    out = capfd.readouterr().out
    assert out == f"waiting: {lock_text()} is writing results into {tmp_path}\n"


def lock_text():
    import socket

    return f"process {os.getpid()} on {socket.gethostname()}"


def test_a_run_that_ends_in_its_set_up_leaves_others_alone(cli, monkeypatch):  # noqa: F811
    """Of the same name, and resumed: what was there before is there after."""
    train(cli, "trainer.max_steps=2")
    before = tree(RUN)
    monkeypatch.setattr(
        ConfigSnapshotCallback, "on_fit_start", lambda *args: os.kill(os.getpid(), signal.SIGINT)
    )
    for more in ([], [f"resume={RUN}"]):
        status, out, _ = train(cli, *more)
        assert status == 130 and "interrupted" in out
        now = {name: value for name, value in tree(RUN).items() if not name.endswith("cmd.txt")}
        assert now == {n: v for n, v in before.items() if not n.endswith("cmd.txt")}
        assert [p.name for p in RUN.parent.iterdir()] == ["p"]


# --- copied and moved runs ---


@pytest.mark.parametrize("copied", [True, False])
def test_results_go_beside_the_checkpoint(cli, copied):  # noqa: F811
    train(cli, "trainer.max_steps=2", f"exp_root_dir={Path.cwd()}/outputs")
    there = Path("backup/of a run")
    os.makedirs("backup")
    if copied:
        shutil.copytree(RUN, there)
    else:
        shutil.move(RUN, there)
    before, parsed = tree("outputs"), str(there / "configs" / "parsed.yaml")
    (there / "save/it2-test.json").unlink()
    for mode in ("--test", "--validate", "--export"):
        status, out, _ = cli("--config", parsed, mode, f"resume={there}/ckpts/last.ckpt")
        assert status == 0 and f"results in {there}" in out
    original = ["--config", "toy.yaml", "--export", "system.prompt=p", "tag=t"]
    assert cli(*original, f"resume={there}/ckpts/last.ckpt")[0] == 0
    assert (there / "save/it2-test.json").exists()
    # it can be trained further where it is
    more = [f"resume={there}", "trainer.max_steps=3"]
    assert cli("--config", parsed, "--train", *more)[0] == 0
    assert read(there / "ckpts/last.ckpt")["global_step"] == 3
    assert tree("outputs") == before
    assert OmegaConf.load(parsed).exp_root_dir == "backup"


def test_a_checkpoint_alone_has_its_results_beside_it(cli):  # noqa: F811
    train(cli, "trainer.max_steps=2")
    os.makedirs("alone")
    shutil.copy(last(), "alone/given.ckpt")
    shutil.copy(RUN / "configs/parsed.yaml", "alone/parsed.yaml")
    before = tree("outputs")
    status, _, _ = cli("--config", "alone/parsed.yaml", "--test", "resume=alone/given.ckpt")
    assert status == 0 and Path("alone/save/it2-test.json").exists() and tree("outputs") == before
    # a training that starts from it is a new run
    assert train(cli, "resume=alone/given.ckpt", "trainer.max_steps=3")[0] == 0
    assert read("outputs/toy/p-002/ckpts/last.ckpt")["global_step"] == 3


def test_a_folder_that_is_asked_for_is_taken(cli):  # noqa: F811
    train(cli, "trainer.max_steps=2")
    before, parsed = tree("outputs"), str(RUN / "configs" / "parsed.yaml")
    argv = ["--config", parsed, "--test", f"resume={last()}", "exp_root_dir=out"]
    assert cli(*argv)[0] == 0 and Path("out/toy/p/save/it2-test.json").exists()
    assert cli(*argv)[0] == 0 and Path("out/toy/p-002/save/it2-test.json").exists()
    assert tree("outputs") == before


# --- the current folder ---


def test_nothing_in_the_current_folder_runs_unless_it_is_asked_for(tmp_path, monkeypatch, capfd):
    from tests.runs import launch

    for name in ("__init__.py", "preflight.py"):
        file = tmp_path / "custom" / "h-evil" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"from pathlib import Path\nPath('ran-{name}').touch()\n")
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("{tag: t, data_type: d, system_type: s}")
    assert launch(["run.yaml"], []) == 2
    first = capfd.readouterr().err.splitlines()[0]
    assert first == f"not loaded: h-evil in {tmp_path}/custom (--extensions custom loads them)"
    assert not list(tmp_path.glob("ran-*"))
    assert launch(["run.yaml"], [], "--train", "--extensions", "custom") == 2
    assert {p.name for p in tmp_path.glob("ran-*")} == {"ran-__init__.py", "ran-preflight.py"}
    assert launch(["run.yaml"], [], "--train", "--extensions", "nowhere") == 2
    assert capfd.readouterr().err.endswith("--extensions nowhere: there is no such folder\n")
    sys.modules.pop("h-evil")


def test_the_overlays_find_their_model_from_everywhere(tmp_path, monkeypatch, lods):
    from threestudio.utils.pretrained import find_model

    cards = sys.modules["lods.models.cards"]
    name = OmegaConf.load(ROOT / "configs/pocket-shapes.yaml").system.prompt_processor
    name = name.pretrained_model_name_or_path
    monkeypatch.chdir(tmp_path)
    assert Path(find_model(name)) == Path(cards.resolve(name).path) == ROOT / name
    assert cards.canonical(name) == cards.canonical("pocket-shapes") == "pocket-shapes"
    cards.refuse_early(name)
    (tmp_path / name).mkdir(parents=True)  # but a folder of that name here is what was meant
    assert find_model(name) == cards.resolve(name).path == name
    for other in ("configs", "custom/threestudio-lods", "owner/name", "/etc", "pocket-shapes", ""):
        assert find_model(other) == other


@pytest.mark.slow
def test_a_shipped_configuration_runs_from_another_folder(tmp_path):
    files = [str(ROOT / f"configs/{name}.yaml") for name in ("lods-gs-embedding", "pocket-shapes")]
    more = ["system.prompt_processor.prompt=a red car", "trainer.max_steps=1", "data.batch_size=1"]
    more += ["data.n_test_views=2", "data.eval_width=24", "data.eval_height=24"]
    command = [sys.executable, str(ROOT / "launch.py"), "--config", *files, "--train", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("outputs/*/*/ckpts/last.ckpt"))


def test_a_user_error_names_the_process(tmp_path):
    lock = Lock(tmp_path / TRAINING)
    assert lock.acquire()
    with RunFolder() as folder, pytest.raises(UserError, match=f"process {os.getpid()} on"):
        folder.hold(tmp_path, TRAINING)
    assert (tmp_path / TRAINING).exists(), "and keeps its lock"
    lock.release()


def test_what_a_lock_would_be_written_through_is_refused(tmp_path):
    """The folder of a run may be somebody else's, with a link to a file of mine."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / TRAINING).symlink_to(tmp_path / "mine")
    with RunFolder() as folder, pytest.raises(UserError, match="is a link"):
        folder.hold(tmp_path, TRAINING)
    assert (tmp_path / "mine").read_text() == "precious" and (tmp_path / TRAINING).is_symlink()


@pytest.mark.parametrize("left", [TRAINING, "cmd.txt", "a.ckpt"])
def test_a_run_within_the_folder_of_another_is_not_discarded_with_it(tmp_path, left):
    with RunFolder() as folder:
        path = Path(folder.make(tmp_path / "outer"))
        (path / "tag" / "inner").mkdir(parents=True)
        (path / "tag" / "inner" / left).write_text("")
        folder.discard([path / "ckpts", path / "save"])
        assert (path / "tag" / "inner" / left).exists()


def test_what_the_snapshot_has_copied_is_no_other_run(tmp_path):
    with RunFolder() as folder:
        path = Path(folder.make(tmp_path / "mine"))
        (path / "code" / "notes").mkdir(parents=True)
        (path / "code" / "notes" / "cmd.txt").write_text("")
        folder.discard([path / "save"])
        assert not path.exists()


@pytest.mark.parametrize("name, status", [("progress", 0), ("logs", 2)])
def test_what_a_watcher_reads_is_not_written_through_a_link(cli, name, status):  # noqa: F811
    assert train(cli, "trainer.max_steps=1")[0] == 0
    mine = Path("mine")
    mine.write_text("precious")
    Path(f"outputs/toy/p/{name}").symlink_to(mine.absolute())
    assert train(cli, "--gradio", f"resume={last()}", "trainer.max_steps=2")[0] == status
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("mark", ["cmd.txt", TRAINING])
def test_checkpoints_do_not_go_among_those_of_a_run_that_goes_on(cli, mark):  # noqa: F811
    (RUN / "ckpts").mkdir(parents=True)
    (RUN / mark).write_text("")
    status, out, _ = train(cli, f"checkpoint.dirpath={RUN}/ckpts", "tag=t", "trainer.max_steps=1")
    assert status == 0 and not list((RUN / "ckpts").iterdir())
    assert f"checkpoints go to {RUN}/ckpts-002" in out


@pytest.mark.parametrize("name", ["ckpts", "save"])
def test_nothing_goes_through_a_link_into_another_run(cli, name):  # noqa: F811
    for tag in ("a", "b"):
        assert train(cli, f"tag={tag}", "trainer.max_steps=1")[0] == 0
    mine, link = RUN.with_name("a") / name, RUN.with_name("b") / name
    shutil.rmtree(link)
    link.symlink_to(mine.absolute())
    before = tree(mine)
    resume = f"resume={RUN.with_name('b')}/ckpts/last.ckpt"
    status, _, err = train(cli, "tag=b", resume, "trainer.max_steps=2")
    assert status == 2 and "is a link into the run in" in err
    assert tree(mine) == before


def test_a_folder_of_checkpoints_on_another_disk_is_used(cli):  # noqa: F811
    assert train(cli, "trainer.max_steps=1")[0] == 0
    shutil.move(RUN / "ckpts", "disk")
    (RUN / "ckpts").symlink_to(Path("disk").absolute())
    assert train(cli, f"resume={last()}", "trainer.max_steps=2")[0] == 0
    assert read("disk/last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("mode", ["--test", "--export", "--train"])
@pytest.mark.parametrize("copied", [True, False])
def test_a_copied_run_that_was_resumed_finds_its_own_checkpoint(cli, mode, copied):  # noqa: F811
    """Its saved config names the checkpoint that it was resumed from, where that was."""
    train(cli, "trainer.max_steps=1")
    train(cli, f"resume={last()}", "trainer.max_steps=2")
    (shutil.copytree if copied else shutil.move)(RUN, "copy")
    before = tree("outputs")
    status, out, _ = cli("--config", "copy/configs/parsed.yaml", mode)
    assert status == 0 and "results in copy" in out
    assert tree("outputs") == before


def test_a_run_from_anothers_checkpoint_is_tested_with_its_own(cli):  # noqa: F811
    train(cli, "trainer.max_steps=1")
    train(cli, f"resume={last()}", "tag=new", "trainer.max_steps=2")
    parsed = str(RUN.with_name("new") / "configs" / "parsed.yaml")
    before = tree(RUN)
    assert f"results in {RUN.with_name('new')}\n" in cli("--config", parsed, "--test")[1]
    assert f"results in {RUN.with_name('new-002')}\n" in cli("--config", parsed, "--train")[1]
    assert tree(RUN) == before


def test_a_lock_among_the_checkpoints_is_no_result(tmp_path):
    with RunFolder() as folder:
        folder.make(tmp_path / "mine")
        folder.hold(tmp_path / "ck", TRAINING)
        folder.discard([tmp_path / "ck", tmp_path / "mine" / "save"])
        assert not list(tmp_path.iterdir())
