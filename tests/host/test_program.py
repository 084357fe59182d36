"""The command line of a run under another name and with another home than ``launch.py``."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.host.test_launch import CONFIG, cli  # noqa: F401 (a fixture)
from tests.runs import ROOT
from threestudio.run.arguments import Program, find_config, parse_args
from threestudio.run.cli import main
from threestudio.utils.errors import UserError


@pytest.fixture
def home(tmp_path):
    """A home with an extension, and the configs ``toy`` and ``toys`` in it."""
    for name in ("custom", "configs"):
        (tmp_path / "home" / name).mkdir(parents=True)
    link = tmp_path / "home" / "custom" / "toy_extension.py"
    link.symlink_to(ROOT / "tests" / "toy_extension.py")
    (tmp_path / "home" / "configs" / "toy.yaml").write_text(CONFIG)
    (tmp_path / "home" / "configs" / "toys.yaml").write_text("{}")
    return tmp_path / "home"


@pytest.fixture
def away(tmp_path, monkeypatch):
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")


# --- configs by name ----------------------------------------------------------------------------


def test_a_shipped_config_is_found_by_its_name_from_every_folder(home, away):
    assert find_config("toy", Program(home=home)) == str(home / "configs" / "toy.yaml")
    assert find_config("pocket", Program()) == str(ROOT / "configs" / "pocket.yaml")


def test_a_file_comes_before_a_name_and_a_folder_does_not(home, away):
    Path("toy").mkdir()
    assert find_config("toy", Program(home=home)) == str(home / "configs" / "toy.yaml")
    Path("toy").rmdir()
    Path("toy").write_text("{}")
    assert find_config("toy", Program(home=home)) == "toy"


def test_a_path_means_a_file_here_or_else_at_home(home, away):
    assert find_config("configs/toy.yaml", Program(home=home)) == str(home / "configs/toy.yaml")
    Path("configs").mkdir()
    Path("configs/toy.yaml").write_text("{}")
    assert find_config("configs/toy.yaml", Program(home=home)) == "configs/toy.yaml"


def test_a_file_that_is_not_here_is_not_taken_from_the_shipped_ones(home, away):
    assert find_config("toy.yaml", Program(home=home)) == "toy.yaml"


@pytest.mark.parametrize(
    ("word", "hint"),
    [("tooy", ": did you mean 'toy'?"), ("xxxxxxx", "; those are toy, toys")],
)
def test_an_unknown_name_is_refused_with_the_nearest(home, away, word, hint):
    with pytest.raises(UserError) as caught:
        find_config(word, Program(home=home))
    assert str(caught.value) == (
        f"--config {word}: there is neither such a file nor a shipped config{hint}"
    )


# --- the program --------------------------------------------------------------------------------


def test_the_help_names_the_program_and_its_configs(home, capsys):
    for program, usage in ((Program(), "launch.py"), (Program("a tool", home), "a tool")):
        with pytest.raises(SystemExit) as stop:
            parse_args(["--help"], program)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and out.startswith(f"usage: {usage} ")
        assert f"    {' '.join(program.words)} --train" in out
    assert "toy, toys." in out


def test_a_run_by_another_name_tells_how_to_go_on_by_that_name(home, away, cli, capfd):  # noqa: F811
    os.chdir(home.parent / "away")  # the fixture `cli` goes elsewhere
    words = ["--config", "toy", "--train", "system.prompt=p"]
    assert main([*words, "system.signal_at=1"], "a tool", home) == 130
    line = capfd.readouterr().out.splitlines()[-1]
    head, command = line.split("; resume with: a tool ")
    assert head == "interrupted at step 2"
    typed = shlex.join(["a", "tool", *words, "system.signal_at=1"])
    assert Path("outputs/toy/p/cmd.txt").read_text().splitlines()[0] == typed
    assert main([*shlex.split(command), "system.signal_at=-1"], "a tool", home) == 0


def test_launch_py_is_called_by_the_path_that_was_typed(home, away, cli, monkeypatch):  # noqa: F811
    os.chdir(home.parent / "away")
    monkeypatch.setattr(sys, "argv", ["../launch.py"])
    assert main(["--config", "toy", "--train", "system.prompt=p"], home=home) == 0
    command = Path("outputs/toy/p/cmd.txt").read_text().splitlines()[0]
    assert command == "python ../launch.py --config toy --train system.prompt=p"


def test_launch_py_itself_refuses_in_one_line_from_every_folder(away):
    command = [sys.executable, str(ROOT / "launch.py"), "--train", "--config", "pocketngp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --config pocketngp: there is neither such a file nor a shipped config: did you "
        "mean 'pocket-ngp'?\n"
    )
