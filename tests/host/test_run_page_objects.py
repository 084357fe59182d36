"""The object in report.html: read, made smaller and packed."""

import base64
import json
import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from tests.host.run_pages import Page, run, write_mesh
from tests.run_folders import PROMPT, gaussians, picture, write_gaussians
from tests.runs import ROOT
from threestudio.run.drawing import objects
from threestudio.run.page import write_page

__all__ = ["run"]  # a fixture


def unpacked(element):
    return json.loads(element[1]["data-about"]), zlib.decompress(base64.b64decode(element[2]))


def test_the_gaussians_in_the_page_are_those_of_the_file(run):
    about, data = unpacked(Page(write_page([run])).all("script", id="object-0")[0])
    rows, n = gaussians(), about["count"]
    assert n == len(rows) and len(data) == 17 * n and about["kind"] == "splats"
    low, high = np.array(about["low"]), np.array(about["high"])
    places = low + np.frombuffer(data, "<u2", 3 * n).reshape(n, 3) / 65535 * (high - low)
    assert np.abs(places - rows[:, :3]).max() <= 0.6 / 65535
    least, most = about["sizes"]
    sizes = least + np.frombuffer(data, "u1", 3 * n, 6 * n).reshape(n, 3) / 255 * (most - least)
    assert np.abs(sizes - rows[:, 10:13]).max() <= 0.6 * (most - least) / 255
    turns = np.frombuffer(data, "i1", 4 * n, 9 * n).reshape(n, 4) / 127
    unit = rows[:, 13:] / np.linalg.norm(rows[:, 13:], axis=1, keepdims=True)
    assert np.abs(turns - unit).max() <= 0.51 / 127
    shown = np.frombuffer(data, "u1", 4 * n, 13 * n).reshape(n, 4) / 255
    assert np.abs(shown[:, :3] - (0.5 + 0.2820948 * rows[:, 6:9])).max() <= 0.51 / 255
    assert np.abs(shown[:, 3] - 1 / (1 + np.exp(-rows[:, 9]))).max() <= 0.51 / 255


def test_gaussians_in_other_axes_are_turned_back(tmp_path):
    """y down and the front on -z, as viewers of 3DGS have it: (x, y, z) is (-z, x, -y) there."""
    rows = gaussians()
    write_gaussians(tmp_path / "up.ply", rows)
    turned = rows.copy()
    front, right, down = rows[:, 0], rows[:, 1], -rows[:, 2]
    turned[:, 0], turned[:, 1], turned[:, 2] = right, down, -front
    write_gaussians(tmp_path / "down.ply", turned, "comment front -z up -y\n")
    here, there = (objects.read_object(tmp_path / f"{n}.ply") for n in ("up", "down"))
    assert np.allclose(here.means, there.means, atol=1e-6)
    # the rotation that takes the file's axes to the run's turns the ellipsoids too
    rotation = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    for splats, matrix in ((here, rotation), (there, np.eye(3))):
        splats.axes = matrix @ matrices(splats.quats)
    assert np.allclose(here.axes, there.axes, atol=1e-6)


def matrices(q):
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return np.stack(rows, axis=1).reshape(-1, 3, 3)


def test_the_mesh_in_the_page_is_that_of_the_file(run):
    points = np.random.default_rng(1).uniform(-0.5, 0.5, (20, 3))
    rgb = np.random.default_rng(2).uniform(0, 1, (20, 3))
    faces = np.random.default_rng(3).integers(0, 20, (30, 3))
    export = run / "save/it30-export"
    (export / "gaussians.ply").unlink()
    write_mesh(export / "model.glb", points, rgb, faces)
    about, data = unpacked(Page(write_page([run])).all("script", id="object-0")[0])
    assert (about["kind"], about["faces"], about["count"]) == ("mesh", 30, 20)
    assert (np.cumsum(np.frombuffer(data, "<i4", 90)) == faces.reshape(-1)).all()
    low, high = np.array(about["low"]), np.array(about["high"])
    places = low + np.frombuffer(data, "<u2", 60, 360).reshape(20, 3) / 65535 * (high - low)
    assert np.abs(places - points).max() < 1e-5 + 0.6 / 65535
    assert np.abs(np.frombuffer(data, "u1", 60, 480).reshape(20, 3) / 255 - rgb).max() < 0.51 / 255


def test_a_texture_is_drawn_by_the_corners_of_smaller_triangles():
    """On the same surface, within the bound, with the texture's colours; no more than texels."""
    points = np.array([[0.0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]])
    uv = np.array([[0.0, 1], [1, 1], [1, 0], [0, 0]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    texture = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    whole = objects.Triangles(points, np.zeros((4, 3)), faces, texture=texture, uv=uv)
    drawn = objects.fewer(whole, 500)
    assert len(drawn.faces) == 2 * 15**2 and objects.left_out(drawn, whole) == []
    a, b, c = drawn.points[drawn.faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    assert np.allclose(normals, [2 * 4 / len(drawn.faces), 0, 0])  # none turned over
    column, row = (8 * (drawn.points[:, 1] + 1) - 0.5), (4 * (1 - drawn.points[:, 2]) - 0.5)
    for channel in range(3):
        expected = map_coordinates(
            texture[..., channel] / 255, [row, column], order=1, mode="nearest"
        )
        assert np.allclose(drawn.rgb[:, channel], expected)
    assert len(objects.fewer(whole, 10**6).faces) == 2 * 18**2  # texels of the longest side
    assert objects.fewer(whole, 7) is whole


def test_an_object_is_read_and_packed_without_torch(tmp_path):
    """A server that does it is light."""
    write_gaussians(tmp_path / "a.ply", gaussians(), "comment front -z up -y\n")
    (tmp_path / "b.ply").write_bytes(b"ply")
    code = """
import sys
from pathlib import Path
from threestudio.run import drawing
drawing.packed(drawing.read_object(Path("a.ply")), drawing.Camera())
try: drawing.read_object(Path("b.ply"))
except ValueError: print("torch" in sys.modules)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_stray_gaussian_does_not_make_the_object_small():
    rows = gaussians(1000)
    far = rows[-1:].copy()
    far[:, :3] = 50
    parts = [np.concatenate([rows, far])[:, k] for k in (slice(3), slice(10, 13), slice(13, 17))]
    parts += [np.concatenate([rows, far])[:, k] for k in (9, slice(6, 9))]
    for camera in (objects.Camera(), objects.Camera(distance=3.6)):
        alone = camera.about(objects.splats_of(*(part[:-1] for part in parts)))
        about = camera.about(objects.splats_of(*parts))
        assert about["distance"] == pytest.approx(alone["distance"], rel=0.02)
        assert np.allclose(about["middle"], alone["middle"], atol=0.02)


def test_all_corners_of_a_mesh_are_in_the_picture():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-1, 1, (1000, 3)), [[0, 0, 4]]])
    about = objects.Camera().about(objects.Triangles(points, points, np.zeros((1, 3), int)))
    away = np.linalg.norm(points - about["middle"], axis=1).max()
    assert away < about["distance"] * np.sin(about["fovy"] / 2) < 1.1 * away


OBJ = """mtllib model.mtl
v 0 0 0
v 0 1 0
v 0 0 1
vt 0.1 0.5
vt 0.5 0.5
vt 0.9 0.5
usemtl m
f 1/1 2/2 3/3
"""


@pytest.mark.parametrize("image", ["texture.png", "../secret.png"])
def test_a_texture_gives_the_corners_their_colours_from_beside_the_mesh_only(tmp_path, image):
    folder = tmp_path / "export"
    picture(folder / "texture.png", (200, 100, 30))
    picture(tmp_path / "secret.png", (1, 2, 3))
    (folder / "model.mtl").write_text(f"newmtl m\nmap_Kd {image}\n")
    (folder / "model.obj").write_text(OBJ)
    found = objects.read_object(folder / "model.obj")
    assert len(found.faces) == 1
    colors = {tuple(np.rint(255 * rgb).astype(int)) for rgb in found.rgb}
    assert colors == ({(200, 100, 30)} if image == "texture.png" else {(178, 178, 178)})


def test_a_page_has_less_than_5_mb_whatever_the_object(run):
    write_gaussians(run / "save/it30-export/gaussians.ply", gaussians(400_000))
    path = write_page([run])
    assert path.stat().st_size < 5_000_000
    assert re.search(r"Drawn here with [\d,]+ Gaussians of 400,000 Gaussians", Page(path).text)


def test_of_too_many_gaussians_the_most_visible_are_kept():
    rows = gaussians(100)
    parts = rows[:, :3], rows[:, 10:13], rows[:, 13:], rows[:, 9], rows[:, 6:9]
    found = objects.splats_of(*parts)
    kept = objects.fewer(found, 10)
    two = np.sort(found.scales, axis=1)[:, 1:].sum(axis=1)  # the logarithm of the largest area
    best = np.argsort(-(np.log(found.opacities) + two))[:10]
    assert len(kept.means) == 10
    assert {*map(tuple, kept.means)} == {*map(tuple, found.means[best])}


def test_a_mesh_of_too_many_triangles_keeps_its_place_and_colours():
    side = np.linspace(-1, 1, 120)
    points = np.stack([*np.meshgrid(side, side), np.zeros((120, 120))], axis=-1).reshape(-1, 3)
    index = np.arange(120 * 120).reshape(120, 120)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    faces = np.stack([a, b, c, b, d, c], axis=-1).reshape(-1, 3)
    rgb = (points + 1) / 2
    small = objects.fewer(objects.Triangles(points, rgb, faces), 5000)
    assert 1000 < len(small.faces) <= 5000
    assert np.abs(small.rgb - (small.points + 1) / 2).max() < 1e-9
    assert np.abs(small.points).max() > 0.95

    def area(mesh):
        p, q, r = (mesh.points[mesh.faces[:, k]] for k in range(3))
        return np.linalg.norm(np.cross(q - p, r - p), axis=1).sum() / 2

    assert area(small) == pytest.approx(4, rel=0.08)


def test_a_run_that_was_stopped_shows_the_gaussians_of_its_checkpoint(run):
    import torch

    from threestudio.run.checkpoint import AtomicCheckpointIO

    (run / "save/it30-export/gaussians.ply").unlink()
    rows = torch.from_numpy(gaussians(25))
    parts = {"means": rows[:, :3], "scales": rows[:, 10:13], "quats": rows[:, 13:]}
    parts |= {"opacities": rows[:, 9], "sh0": rows[:, None, 6:9]}
    state = {f"geometry.{name}": value.clone() for name, value in parts.items()}
    content = {"state_dict": state, "epoch": 0, "global_step": 12}
    AtomicCheckpointIO(str(run / "ckpts")).save_checkpoint(content, str(run / "ckpts/last.ckpt"))
    page = Page(write_page([run]))
    assert page.rows()["object"] == "25 Gaussians" and page.rows()["steps"] == "12"
    assert "The run was stopped before its end" in page.text


def test_the_picture_of_a_run_without_an_object_is_shown(run):
    (run / "save/it30-export/gaussians.ply").unlink()
    picture(run / "save/it30-test/0.png", (0, 0, 255))
    page = Page(write_page([run]))
    [stage] = [e for e in page.all("div") if "stage" in e[1].get("class", "")]
    assert "data-object" not in stage[1] and page.all("img", alt=f"A view of {PROMPT}")
