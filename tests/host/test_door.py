"""The door of the extension: one ``lods``, by one name, wherever it stands."""

import os
import shutil
import subprocess
import sys

import lods
import pytest
from lods.methods import registry

import threestudio
from tests.runs import ROOT
from threestudio.utils.extensions import load_extension

DOOR = ROOT / "custom" / "threestudio-lods" / "__init__.py"


@pytest.fixture
def second(tmp_path):
    """Another copy of the extension, its door loaded under another name."""
    folder = tmp_path / "threestudio-lods-copy"
    shutil.copytree(
        DOOR.parent, folder, ignore=shutil.ignore_patterns("pocket", "__pycache__", "models")
    )
    yield folder
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def test_a_second_copy_is_not_loaded_but_announced(second, monkeypatch):
    said, before = [], dict(threestudio.__modules__)
    monkeypatch.setattr("lods.threestudio.warn", said.append)
    path = list(sys.path)
    module = load_extension(second)
    assert module.lods is lods and sys.path == path
    assert threestudio.__modules__ == before
    files = [str(getattr(m, "__file__", None) or "") for m in list(sys.modules.values())]
    assert [f for f in files if f.startswith(str(second))] == [str(second / "__init__.py")]
    [line] = said
    assert line.startswith(f"lods {lods.__version__} is the package installed in ")
    assert str(second) in line and "uninstall" in line and "\n" not in line


def test_the_door_beside_it_says_nothing(monkeypatch):
    said = []
    monkeypatch.setattr("lods.threestudio.warn", said.append)
    code = compile(DOOR.read_text(), str(DOOR), "exec")
    exec(code, {"__file__": str(DOOR), "__name__": "door"})
    assert said == []


def test_a_stale_installation_on_the_path_is_announced(tmp_path):
    """A door in a process that finds another ``lods`` before its own."""
    package = tmp_path / "site" / "lods" / "threestudio"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("__version__ = '0.0.1'\n")
    (package / "__init__.py").write_text("def warn(line): print(line)\n")
    env = os.environ | {"PYTHONPATH": str(package.parent.parent)}
    command = [sys.executable, "-P", str(DOOR)]  # without the door's own folder in front
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == (
        f"lods 0.0.1 is the package installed in {package.parent}, not the one in {DOOR.parent}: "
        "uninstall threestudio-lods to use that\n"
    ), done.stderr


def test_no_module_of_the_library_has_a_second_name():
    twice = [name for name in sys.modules if name.startswith("threestudio-lods.")]
    assert not twice, twice


def test_every_method_is_a_guidance():
    for name in registry.ours():
        guidance = threestudio.find(f"{name}-guidance")
        assert guidance.method_class is registry.find(name)
        assert guidance.__doc__ == guidance.method_class.__doc__
