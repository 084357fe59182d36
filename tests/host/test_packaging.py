"""What ``pip install .`` brings: the library, the host, and nothing that others import."""

import configparser
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import lods
import pytest
from packaging.requirements import Requirement

from tests.runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIBRARY = "custom/threestudio-lods/lods/"
# where each tracked file is in a wheel: the first of these that it begins with
PLACES = {
    LIBRARY: "lods/",
    "custom/threestudio-lods/": "lods_host/custom/threestudio-lods/",
    "lods_host/": "lods_host/",
    **{f"{name}/": f"lods_host/{name}/" for name in ("threestudio", "evaluation", "configs")},
    "pocket/": "lods_host/pocket/",
}
# tables of which nothing that runs reads, and pictures of the study of a checkout
LEFT_OUT = tuple(f"pocket/{part}/" for part in ("shapes/results", "results", "ideal", "truth"))


def tracked():
    """The files of the repository that git has, or would have with ``git add``."""
    words = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def place(name):
    """The name in the wheel of a file of the repository; "" if it has none there."""
    if name.startswith(LEFT_OUT):
        return ""
    found = next((begin for begin in PLACES if name.startswith(begin)), None)
    return PLACES[found] + name.removeprefix(found) if found else ""


def requirements(file):
    lines = (ROOT / file).read_text().splitlines()
    found = (line.split("#")[0].strip() for line in lines)
    return [Requirement(line) for line in found if line and not line.startswith("-")]


# --- what pyproject.toml says ---------------------------------------------------------------------


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    pinned = {r.name: str(r.specifier).removeprefix("==") for r in requirements("requirements.txt")}
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        assert requirement.name in pinned
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_every_pinned_tool_is_in_the_extra_for_developers():
    extra = {
        r.name: r for r in map(Requirement, PROJECT["project"]["optional-dependencies"]["dev"])
    }
    for pinned in requirements("requirements-dev.txt"):
        version = str(pinned.specifier).removeprefix("==")
        assert extra[pinned.name].specifier.contains(version), pinned


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lods.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", lods.__version__)


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Built without the network, by the setuptools of this environment."""
    if not has_setuptools():
        pytest.skip("building a wheel without the network needs setuptools here")
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(folder)]
    subprocess.run([*words, "--no-build-isolation"], check=True)
    [file] = folder.iterdir()
    return file


def has_setuptools():
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("setuptools").split(".")[0]) >= 68
    except PackageNotFoundError:
        return False


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_library_and_the_host(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set(filter(None, map(place, tracked())))


@pytest.mark.slow
def test_the_wheel_is_small_and_says_its_version(wheel):
    assert wheel.stat().st_size < 80e6  # of the 100 MB that PyPI takes, three models are 69
    assert wheel.name.startswith(f"threestudio_lods-{lods.__version__}-")


@pytest.mark.slow
def test_the_wheel_brings_two_names_and_one_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist() if "dist-info" not in name} == {
            "lods",
            "lods_host",
        }
        [entry] = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        points = configparser.ConfigParser()
        points.read_string(archive.read(entry).decode())
    assert dict(points["console_scripts"]) == {"lods": "lods.cli:main"}


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The Python of an environment with the wheel, the packages of this one, and a package
    ``threestudio`` of somebody else's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "threestudio").mkdir()
    (site / "threestudio" / "__init__.py").write_text("whose = 'upstream'\n")
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    return folder / "bin" / "python"


def run(python, *words, **options):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *words], capture_output=True, text=True, env=env, **options)


@pytest.mark.slow
def test_somebody_elses_threestudio_stays_what_it_is(installed, tmp_path):
    code = "import lods, lods.cli, threestudio; print(threestudio.whose, lods.__file__)"
    done = run(installed, "-c", code, cwd=tmp_path)
    whose, file = done.stdout.split()
    assert whose == "upstream" and Path(file).is_relative_to(installed.parent.parent)


@pytest.mark.slow
def test_importing_lods_brings_nothing_heavy(installed, tmp_path):
    heavy = "{'torch', 'numpy', 'diffusers', 'omegaconf', 'threestudio'}"
    code = f"import sys, lods; print({heavy} & {{*sys.modules}})"
    assert run(installed, "-c", code, cwd=tmp_path).stdout == "set()\n"


@pytest.mark.slow
def test_the_command_trains_beside_somebody_elses_threestudio(installed, tmp_path):
    settings = {
        "data.batch_size": 1,
        "data.width": 16,
        "data.height": 16,
        "data.eval_width": 16,
        "data.eval_height": 16,
        "data.n_test_views": 2,
        "trainer.max_steps": 1,
        "system.geometry.ball.n_points": 50,
        "system.prompt_processor.prompt": "a red car",
        "use_timestamp": "false",
    }
    words = ["-m", "lods", "train", "--config", "lods-gs-embedding", "pocket", "--train"]
    words += [f"{key}={value}" for key, value in settings.items()]
    done = run(installed, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs/lods-gs-embedding/a_red_car/ckpts/last.ckpt").is_file()
    assert "installed in" not in done.stdout + done.stderr
