"""What is copied of the code, and that asking git about a folder runs nothing of that folder."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from evaluation import machine
from threestudio.run import git
from threestudio.utils import extensions
from threestudio.utils.callbacks import CodeSnapshotCallback, ConfigSnapshotCallback


def run_git(*arguments: str, folder=".") -> None:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """The current folder, with one file that git tracks; no extension is loaded."""
    here = tmp_path / "repository"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(extensions, "loaded", {})
    run_git("init", "-q")
    Path("kept.py").write_text("kept")
    run_git("add", "."), run_git("commit", "-qm", "1")
    return here


def snapshot(**options) -> dict:
    """What is in the folder of the snapshot: relative path -> content."""
    CodeSnapshotCallback("run/code", use_version=False, **options).on_fit_start(None, None)
    files = [path for path in Path("run/code").rglob("*") if not path.is_dir()]
    return {str(path.relative_to("run/code")): path.read_text() for path in files}


def test_only_tracked_files_are_copied(repository):
    for name in (".env", "id_rsa", "new.py", "sub/key.pem"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("secret")
    assert snapshot() == {"kept.py": "kept"}


def test_what_links_point_to_is_not_copied(repository, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.py").write_text("secret")
    for name in ("file.py", "folder/key.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("harmless")
    Path("link.py").symlink_to(tmp_path / "secrets" / "key.py")
    run_git("add", ".")
    Path("file.py").unlink()  # links where git knows files
    Path("file.py").symlink_to(tmp_path / "secrets" / "key.py")
    Path("folder/key.py").unlink(), Path("folder").rmdir()
    Path("folder").symlink_to(tmp_path / "secrets")
    assert snapshot() == {"kept.py": "kept"}


@pytest.mark.parametrize("linked", ["code", "code/sub", "code/sub/kept.py"])
def test_nothing_is_written_through_a_link(repository, tmp_path, linked, monkeypatch):
    told = []
    for tell in ("warn", "info"):
        monkeypatch.setattr(f"threestudio.{tell}", told.append)
    Path("sub").mkdir(), Path("sub/kept.py").write_text("new")
    run_git("add", ".")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    (elsewhere / "sub" / "kept.py").write_text("of somebody else")
    target = Path("run", linked)
    target.parent.mkdir(parents=True)
    target.symlink_to(Path(elsewhere, *Path(linked).parts[1:]))
    CodeSnapshotCallback("run/code", use_version=False).on_fit_start(None, None)
    found = {str(p.relative_to(elsewhere)): p for p in elsewhere.rglob("*")}
    assert set(found) == {"sub", "sub/kept.py"}
    assert found["sub/kept.py"].read_text() == "of somebody else"
    if linked.endswith(".py"):  # the link itself is replaced
        assert target.read_text() == "new" and not target.is_symlink() and not told
    else:
        assert len(told) == 1 and f"run/{linked}: it is a link" in told[0]


def test_the_config_is_not_written_through_a_link(repository, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Path("run").mkdir(), Path("run/configs").symlink_to(tmp_path / "elsewhere")
    Path("a.yaml").write_text("a: 1")
    callback = ConfigSnapshotCallback("a.yaml", {}, "run/configs", use_version=False)
    with pytest.raises(OSError, match="link"):
        callback.on_fit_start(None, None)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_file_that_is_not_for_all_stays_so(repository):
    Path("own.py").write_text("own")
    Path("own.py").chmod(0o600)
    run_git("add", ".")
    snapshot()
    modes = [Path("run/code", name).stat().st_mode & 0o777 for name in ("own.py", "kept.py")]
    assert modes == [0o600, 0o644]


def load(path: Path) -> None:
    extensions.loaded[path.stem if path.suffix == ".py" else path.name] = path


def test_loaded_extensions_are_copied_also_where_git_ignores_them(repository):
    Path(".gitignore").write_text("custom\n")
    for name in ("one/__init__.py", "one/deep/a.cu", "one/.env", "one/key.json", "two.py"):
        Path("custom", name).parent.mkdir(parents=True, exist_ok=True)
        Path("custom", name).write_text(name)
    Path("custom/one/.hidden").mkdir(), Path("custom/one/.hidden/a.py").write_text("")
    Path("custom/three.py").write_text("not loaded")
    load(Path.cwd() / "custom" / "one"), load(Path("custom/two.py"))
    copied = ["custom/one/__init__.py", "custom/one/deep/a.cu", "custom/two.py", "kept.py"]
    assert sorted(snapshot()) == copied


def test_of_an_extension_that_is_a_repository_the_tracked_files_are_copied(repository):
    Path(".gitignore").write_text("custom\n")
    folder = Path("custom/own")
    folder.mkdir(parents=True)
    for name in ("__init__.py", "cards.yaml", ".env"):
        (folder / name).write_text(name)
    run_git("init", "-q", folder=folder)
    run_git("add", "__init__.py", "cards.yaml", folder=folder)
    load(folder)
    assert sorted(snapshot()) == ["custom/own/__init__.py", "custom/own/cards.yaml", "kept.py"]


def test_an_extension_of_another_place_goes_to_custom(repository, tmp_path):
    (tmp_path / "far" / "custom" / "one").mkdir(parents=True)
    (tmp_path / "far" / "custom" / "one" / "__init__.py").write_text("one")
    load(tmp_path / "far" / "custom" / "one")
    assert snapshot() == {"custom/one/__init__.py": "one", "kept.py": "kept"}


@pytest.mark.parametrize("linked", ["extension", "custom"])
def test_a_linked_extension_is_left_out_and_named(repository, tmp_path, linked, monkeypatch):
    told = []
    monkeypatch.setattr("threestudio.info", told.append)
    (tmp_path / "far" / "one").mkdir(parents=True)
    (tmp_path / "far" / "one" / "__init__.py").write_text("one")
    if linked == "custom":
        Path("custom").symlink_to(tmp_path / "far")
    else:
        Path("custom").mkdir(), Path("custom/one").symlink_to(tmp_path / "far" / "one")
    load(Path("custom/one"))
    assert snapshot() == {"kept.py": "kept"}
    assert len(told) == 1 and told[0].endswith(": one")


def test_without_a_repository_the_extensions_are_copied(tmp_path, monkeypatch):
    told = []
    for tell in ("warn", "info"):
        monkeypatch.setattr(f"threestudio.{tell}", told.append)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(extensions, "loaded", {})
    Path("custom").mkdir(), Path("custom/one.py").write_text("one")
    Path("other.py").write_text("")
    load(Path("custom/one.py"))
    assert snapshot() == {"custom/one.py": "one"}
    assert len(told) == 1 and "of the code but of the extensions" in told[0]


def test_load_custom_modules_tells_what_it_has_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(extensions, "loaded", {})
    (tmp_path / "good_one.py").write_text("")
    (tmp_path / "bad_one.py").write_text("1 / 0")
    extensions.load_custom_modules(tmp_path)
    extensions.failed.pop("bad_one"), extensions._to_report.pop("bad_one")
    assert extensions.loaded == {"good_one": tmp_path / "good_one.py"}


# --- git ----------------------------------------------------------------------------------------


@pytest.fixture
def hostile(repository, tmp_path) -> Path:
    """The repository with a configuration that runs a program wherever git knows to; the file that
    this makes is returned."""
    made, program = tmp_path / "made", tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {made}\ncat\n")
    program.chmod(0o755)
    Path("hooks").mkdir()
    for hook in ("post-index-change", "fsmonitor-watchman", "pre-commit", "query-watchman"):
        Path("hooks", hook).symlink_to(program)
        Path(".git/hooks", hook).unlink(missing_ok=True)
        Path(".git/hooks", hook).symlink_to(program)
    Path(".gitattributes").write_text("* filter=f diff=d merge=m\n")
    Path(".git/info/attributes").write_text("* filter=f diff=d merge=m\n")
    keys = ("core.fsmonitor", "core.pager", "pager.ls-files", "pager.diff", "diff.external")
    keys += ("filter.f.clean", "filter.f.smudge", "filter.f.process", "diff.d.textconv")
    keys += ("diff.d.command", "core.sshCommand", "core.askPass", "core.gitProxy", "core.editor")
    keys += ("core.alternateRefsCommand", "credential.helper", "gpg.program")
    for key in keys:
        run_git("config", key, str(program))
    run_git("config", "alias.ls-files", f"!{program}"), run_git("config", "core.hooksPath", "hooks")
    made.unlink(missing_ok=True)
    Path("kept.py").write_text("changed")
    return made


def test_the_fixture_is_hostile(hostile):
    subprocess.run(["git", "ls-files", "--others"], capture_output=True)
    assert hostile.exists()
    hostile.unlink()
    subprocess.run(["git", "-c", "core.fsmonitor=false", "diff", "HEAD"], capture_output=True)
    assert hostile.exists()


def test_asking_git_about_a_folder_runs_nothing_of_it(hostile, repository, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", repository)
    assert snapshot() == {"kept.py": "changed"}
    for ask in (git.tracked_files, git.untracked_files, git.staged, git.changed_files, git.head):
        assert ask(".") is not None and not hostile.exists(), ask
    machine.code(), machine.commit()
    assert not hostile.exists()


def test_variables_of_git_do_not_count(repository, hostile, tmp_path, monkeypatch):
    """They could mean another repository, another index or another configuration."""
    program = str(tmp_path / "program")
    other = tmp_path / "other"
    other.mkdir(), run_git("init", "-q", folder=other)
    for name, value in {
        "GIT_DIR": str(other / ".git"),
        "GIT_WORK_TREE": str(other),
        "GIT_INDEX_FILE": str(other / "index"),
        "GIT_EXTERNAL_DIFF": program,
        "GIT_PAGER": program,
        "GIT_CONFIG_PARAMETERS": f"'core.fsmonitor'='{program}'",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.fsmonitor",
        "GIT_CONFIG_VALUE_0": program,
        "GIT_TRACE": str(tmp_path / "trace"),
    }.items():
        monkeypatch.setenv(name, value)
    assert git.tracked_files(".") == ["kept.py"] and git.changed_files(".") == []
    assert not hostile.exists() and not (tmp_path / "trace").exists()


def test_a_program_of_the_current_folder_is_not_git(repository, monkeypatch):
    Path("git").write_text("#!/bin/sh\ntouch made\n"), Path("git").chmod(0o755)
    monkeypatch.setenv("PATH", "." + os.pathsep)
    with pytest.raises(git.NoGit, match="not installed"):
        git.tracked_files(".")
    assert not Path("made").exists()


def test_a_result_knows_what_was_changed_since_the_commit(repository, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", repository)
    Path("launch.py").write_text("1")
    assert machine.commit().endswith("-dirty")  # a new file
    run_git("add", "launch.py")
    assert machine.commit().endswith("-dirty")  # staged
    run_git("commit", "-qm", "2")
    clean = machine.commit()
    assert len(clean) >= 4 and "-" not in clean
    Path("launch.py").write_text("2")
    assert machine.commit() == f"{clean}-dirty"
    Path("launch.py").write_text("1"), Path("notes.py").write_text("1")
    assert machine.commit() == clean  # which no result depends on
    Path("launch.py").unlink()
    assert machine.commit() == f"{clean}-dirty"


@pytest.mark.parametrize("name", [os.fsdecode(b"a\xffb.py"), "a\nb.py", "a\tb.py", "-n.py"])
def test_files_of_unusual_names_are_copied(repository, name):
    Path(name).write_text("unusual")
    run_git("add", "--", name)
    assert snapshot() == {"kept.py": "kept", name: "unusual"}


@pytest.mark.parametrize("name", ["../ret.txt", ".git/tokens", ".GIT/tokens", "/tmp/ret.txt"])
def test_names_that_lead_out_of_the_repository_are_not_followed(repository, name):
    """git adds no such name, but lists those of an index that somebody else has written."""
    added = "x" * len(name)
    Path(added).write_text("harmless")
    Path("../ret.txt").write_text("secret"), Path(".git/tokens").write_text("secret")
    run_git("add", added)
    index = Path(".git/index")
    data = index.read_bytes()[:-20].replace(added.encode(), name.encode())
    index.write_bytes(data + hashlib.sha1(data).digest())
    assert name in git.tracked_files(repository)
    before = {path for path in repository.parent.rglob("*") if ".git" not in path.parts}
    assert snapshot() == {"kept.py": "kept"}
    left = {path for path in repository.parent.rglob("*") if ".git" not in path.parts} - before
    assert all(path.is_relative_to(repository / "run") for path in left)
    assert not (repository / "run" / "ret.txt").exists()
