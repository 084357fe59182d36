"""``lods make --on mesh --from``: a mesh that is there is what a run begins with."""

import shlex
from pathlib import Path

import pytest
import trimesh
from lods.commands import job, make, runs

from tests.host.commands import away, refused
from tests.run_folders import make_run

__all__ = ["away"]  # a fixture


def write_box(path):
    """A mesh without a texture."""
    trimesh.creation.box((1.0, 1, 1)).export(path)
    return path


def test_a_mesh_that_is_there_is_what_a_run_begins_with(away):
    """By whatever path; its folder is named after it, and what it holds is part of what is asked
    for."""
    box = write_box(away / "my 'box'.stl")
    argv = ["a red armchair", "--on", "mesh", "--from", box.name, "--model", "pocket"]
    [request] = make.requests(make.parse_args(argv, "lods make"))
    words = request.words(Path("x"))
    assert words[:3] == ["--config", "lods-mesh-embedding", "pocket-mesh"]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert given["system.geometry.init_type"] == "file"
    assert given["system.geometry.file.path"] == str(away / "my 'box'.stl")
    folder = make.folder_of(request, Path("out")).name
    assert folder.startswith("a_red_armchair-mesh-my") and folder.endswith("-lods-embedding")
    trimesh.creation.box((1.0, 2, 1)).export(box)
    [changed] = make.requests(make.parse_args(argv, "lods make"))
    assert changed.source == request.source and changed.key != request.key
    words = shlex.split(changed.command)
    assert make.requests(make.parse_args(words[2:], "lods make")) == [changed]


def test_the_surface_of_a_run_is_a_mesh_to_begin_with(away, monkeypatch):
    """It is exported first where it is not yet there."""
    run, started = make_run(away / "outputs" / "lods-gs" / "a_car"), []

    def start(words):
        started.append(words)
        (run / "save/it4-export").mkdir(parents=True)
        write_box(run / "save/it4-export/gaussians.glb")
        return 0

    monkeypatch.setattr(runs, "start", start)
    argv = ["a red armchair", "--on", "mesh", "--from", "a_car", "--model", "pocket"]
    for _ in range(2):
        [request] = make.requests(make.parse_args(argv, "lods make"))
        assert request.source == str(run / "save/it4-export/gaussians.glb")
    assert len(started) == 1 and started[0][-2:] == ["--export", "system.exporter.fmt=glb"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--on", "mesh"], "name it by --from FILE"),
        (["--on", "mesh", "--from", "none.glb"], "there is no file"),
        (["--on", "mesh", "--from", "list.txt"], "is of no known format"),
        (["--on", "mesh", "--from", "nothing"], "there is no run 'nothing'"),
        (["--on", "mesh", "--from", "bad.obj"], "--from bad.obj: "),
        (["--on", "mesh", "--from", "${seed}.stl"], "take for a reference"),
        (["--from", "box.stl"], "Gaussians begin with a file by system.geometry.init_type=file"),
        (["--on", "nerf", "--from", "box.stl"], "--from is of --on mesh, and this is --on nerf"),
    ],
)
def test_a_mesh_that_cannot_be_had_is_one_line(away, capsys, monkeypatch, argv, said):
    monkeypatch.setattr(job, "start", lambda words: pytest.fail("it has begun"))
    write_box(away / "box.stl")
    (away / "list.txt").write_text("a car")
    (away / "bad.obj").write_text("f 1 2 9\nv 0 0 0\n")
    assert said in refused(capsys, "make", "a red armchair", "--model", "pocket", *argv)
    assert not Path("outputs").exists()
