"""Meshes that users of the studio send: what is taken, what is kept, and what a form may name."""

import json
import os
import time
from dataclasses import replace

import pytest
import trimesh
from lods.studio.choices import Refused, read_form, refuse_foreign
from lods.studio.meshes import FOLDER, Meshes, title

from tests.studio.toy import FORM, ask, let_end, server, until

MESH_FORM = FORM | {"on": "mesh"}


def box(side=1.0, kind="stl"):
    data = trimesh.creation.box((1.0, side, 1.0)).export(file_type=kind)
    return data if isinstance(data, bytes) else data.encode()


@pytest.fixture
def kept(tmp_path):
    return Meshes(tmp_path)


def test_a_mesh_is_kept_once_under_a_name_of_our_own(kept, tmp_path):
    name = kept.keep("../../My chair (1).STL", box(), set())
    assert name.endswith("-My-chair-1.stl") and title(name) == "My-chair-1.stl"
    assert kept.keep("../../My chair (1).STL", box(), set()) == name
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [name]
    assert kept.path(name).read_bytes() == box()
    assert kept.keep("other.stl", box(2.0), set()) != name


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.exe", box(), "a mesh is a file of glb, obj, ply, stl, off"),
        ("a.gltf", b"{}", "a mesh is a file of glb"),
        ("", b"x", "a mesh is a file of glb"),
        ("a.stl", b"", "at least a byte"),
        ("a.obj", b"v 0 0 0", "no triangles"),
        ("a.glb", b"glTF", "this is no mesh to be painted: "),
    ],
)
def test_what_is_no_mesh_is_not_kept(kept, tmp_path, name, content, said):
    with pytest.raises(ValueError, match=said) as caught:
        kept.keep(name, content, set())
    text = str(caught.value)
    assert "\n" not in text and str(tmp_path) not in text
    assert not [*tmp_path.glob(f"{FOLDER}/*")] and not [*tmp_path.glob(f"{FOLDER}/.*")]


def test_a_mesh_is_deleted_after_a_day_unless_a_run_has_it(kept):
    used, old, new = (kept.keep("a.stl", box(side), set()) for side in (1.0, 2.0, 3.0))
    for name in (used, old):
        os.utime(kept.path(name), (time.time() - 90_000,) * 2)
    kept.sweep({used})
    assert kept.path(used) and kept.path(new) and not kept.path(old)


def test_a_form_names_a_mesh_that_is_there(kept, tmp_path):
    name = kept.keep("chair.stl", box(), set())
    request, _ = read_form(MESH_FORM | {"mesh": name}, kept)
    words = request.words(tmp_path)
    assert f"system.geometry.file.path={kept.folder / name}" in words
    assert kept.name_of(request) == name
    refuse_foreign(request, kept)


@pytest.mark.parametrize("mesh", [None, 3, "", "../a.stl", "/etc/passwd", "0" * 16 + "-a.stl"])
def test_a_form_names_no_other_file(kept, mesh):
    with pytest.raises(Refused if mesh in (None, 3) else ValueError, match="choose the file"):
        read_form(MESH_FORM | {"mesh": mesh}, kept)


def test_what_is_not_of_a_mesh_has_none(kept):
    name = kept.keep("chair.stl", box(), set())
    with pytest.raises(Refused, match="a mesh is of"):
        read_form(FORM | {"mesh": name}, kept)


@pytest.mark.parametrize(
    "change",
    [
        {"source": "/etc/passwd"},
        {"source": ""},
        {"source_hash": "0" * 16},
        {"source_hash": "", "source": ""},
        {"on": "nerf"},
    ],
)
def test_a_run_of_somebody_else_begins_with_no_other_file(kept, change):
    name = kept.keep("chair.stl", box(), set())
    request, _ = read_form(MESH_FORM | {"mesh": name}, kept)
    with pytest.raises(Refused, match="the mesh that it begins with"):
        refuse_foreign(replace(request, **change), kept)


def test_a_link_is_no_mesh(kept, tmp_path):
    name = kept.keep("chair.stl", box(), set())
    path = kept.path(name)
    path.rename(tmp_path / "there.stl")
    path.symlink_to(tmp_path / "there.stl")
    assert kept.path(name) is None


# --- over HTTP ------------------------------------------------------------------------------------

SENT = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    pytest.importorskip("aiohttp")
    with server(tmp_path_factory.mktemp("studio") / "runs") as (port, queue):
        yield port, queue


def test_from_a_file_to_a_run_of_it(studio):
    port, queue = studio
    status, _, body = ask(port, "POST", "/api/meshes?name=chair.stl", box(), SENT)
    sent = json.loads(body)
    assert status == 200 and sent["title"] == "chair.stl"
    status, _, body = ask(port, "POST", "/api/runs", MESH_FORM | {"mesh": sent["mesh"]})
    name = json.loads(body)["name"]
    assert status == 200 and until(lambda: queue.shelf.find(name).state == "running")
    found = json.loads(ask(port, "GET", f"/api/runs/{name}")[2])
    assert (found["on"], found["mesh"], found["mesh_title"]) == ("mesh", sent["mesh"], "chair.stl")
    assert "again" in found["can"] and set(found["formats"]) <= {"glb", "video"}
    let_end(queue, name)
    assert until(lambda: queue.shelf.find(name).state == "done")


@pytest.mark.parametrize(
    "headers, body, expected",
    [
        ({"Content-Type": "text/plain"}, b"x", 415),
        (SENT | {"Origin": "http://elsewhere.example"}, b"x", 403),
        (SENT | {"Origin": None}, b"x", 403),
        (SENT, b"no mesh", 400),
    ],
)
def test_what_is_not_sent_as_it_should_be_is_refused(studio, headers, body, expected):
    status, _, answer = ask(studio[0], "POST", "/api/meshes?name=a.stl", body, headers)
    assert status == expected and str(studio[1].shelf.root) not in answer.decode()


def test_a_mesh_that_is_too_large_is_refused_before_all_of_it_has_come(studio, monkeypatch):
    monkeypatch.setattr("lods.studio.meshes.MAX_BYTES", 1000)
    status, _, body = ask(studio[0], "POST", "/api/meshes?name=a.stl", b"0" * 5000, SENT)
    assert status == 413 and "a mesh has at most" in json.loads(body)["error"]
