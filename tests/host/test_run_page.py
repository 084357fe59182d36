"""report.html: what it tells of a run, what it never does, and runs of which parts are missing."""

import base64
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from tests.glb_files import glb, linear
from tests.host.test_launch import cli, last, train  # noqa: F401 (a fixture)
from tests.run_folders import PROMPT, gaussians, picture, run_folder, write_gaussians
from tests.runs import ROOT
from threestudio.run.drawing import objects
from threestudio.run.page import curves, try_page, write_page
from threestudio.run.page.facts import read_facts
from threestudio.run.record import read_record
from threestudio.utils.errors import UserError

EVIL = "</script><img src=x onerror=alert(1)> \"'<b>&amp; </title>"


class Page(HTMLParser):
    """Elements as (name, attributes, text in it)."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text("utf-8")
        self.elements, self._open = [], []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append([name, dict(attributes), ""])
        if name not in ("img", "meta", "wbr"):
            self._open.append(self.elements[-1])

    def handle_endtag(self, name):
        assert self._open.pop()[0] == name  # well formed

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, name, **wanted):
        return [e for e in self.elements if e[0] == name and wanted.items() <= e[1].items()]

    @property
    def text(self):
        return next(e[2] for e in self.elements if e[0] == "body")

    def rows(self):
        """What stands beside what in the lists of facts."""
        names = [e[2] for e in self.elements if e[0] == "dt"]
        return dict(zip(names, [e[2] for e in self.elements if e[0] == "dd"], strict=True))


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "a_red_mushroom@1")


def test_the_facts_are_those_of_the_run(run):
    page = Page(write_page([run]))
    rows = page.rows()
    assert page.all("h1")[0][2] == PROMPT
    told = {"method": "lods-embedding", "representation": "lods-gaussians", "seed": "3"}
    told |= {"guidance scale": "7.5", "model": "pocket-shapes", "steps": "30"}
    told |= {"object": "40 Gaussians", "training": "12.5 s", "on": "a processor, 2 threads"}
    told |= {"begun": "2026-11-28 21:40:11", "what": "learnable embedding, 4 × 6"}
    told |= {"learned on": "pocket-shapes", "has moved by": "12.5 % (|e - e0| / |e0|)"}
    assert told.items() <= rows.items()
    assert rows["size"].startswith("24 numbers, ")
    assert "torch 2.13.0, numpy 2.4.6" in page.text


def test_it_loads_nothing_and_its_policy_allows_nothing_else(run):
    page = Page(write_page([run]))
    for _, attributes, _ in page.elements:
        assert attributes.get("src", "data:").startswith("data:image/webp;base64,") or (
            "src" not in attributes
        )
        assert attributes.get("href", "./").startswith("./")
        assert not {"style", "srcset", "action", "poster"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert not page.all("link") and not page.all("iframe")
    assert "http://" not in page.html and "https://" not in page.html
    [policy] = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.split(" ", 1) for rule in policy[1]["content"].split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for name, of in (("script", "script-src"), ("style", "style-src")):
        [inline] = [e for e in page.all(name) if e[1].get("type", "module") == "module"]
        digest = base64.b64encode(hashlib.sha256(inline[2].encode()).digest()).decode()
        assert rules[of] == f"'sha256-{digest}'"  # of that one, and of no other


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_its_script_is_one_valid_module(run, tmp_path):
    """Two files are put together, which may not declare the same name."""
    [script] = Page(write_page([run])).all("script", type="module")
    (tmp_path / "page.mjs").write_text(script[2])
    words = ["node", "--check", str(tmp_path / "page.mjs")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "class Viewer" in script[2] and "new Viewer(" in script[2]


def test_its_links_lead_to_the_files_of_the_run(run, tmp_path):
    (run / "save/it30-export/a b#?%.glb").write_bytes(b"")
    for target in (None, tmp_path / "elsewhere" / "page.html"):
        path = write_page([run], target)
        links = [e[1]["href"] for e in Page(path).all("a")]
        files = [os.path.normpath(path.parent / unquote(link)) for link in links]
        assert len(files) == 7 and all(map(os.path.isfile, files))
        assert str(run / "save/it30-test.mp4") in files
        assert str(run / "save/it30-export/a b#?%.glb") in files


def test_text_from_a_run_is_shown_as_text(tmp_path):
    run = run_folder(tmp_path / "r", prompt=EVIL, overrides=[f"tag={EVIL}"])
    entry = {"machine": EVIL, "versions": {EVIL: EVIL}, "started": EVIL}
    (run / "run.json").write_text(json.dumps({"trainings": [entry]}))
    log = run / "csv_logs/version_0/metrics.csv"
    log.write_text(log.read_text().replace("train/loss", "</svg><img src=x onerror=alert(2)>"))
    page = Page(write_page([run]))
    assert page.all("h1")[0][2] == EVIL and page.all("title")[0][2] == EVIL
    assert all(e[1]["src"].startswith("data:") for e in page.all("img"))
    kinds = [e[1].get("type") for e in page.all("script")]
    assert sorted(kinds) == ["application/octet-stream", "module"]
    assert not any(name.startswith("on") for e in page.elements for name in e[1])
    assert EVIL in page.rows()["on"]


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


def write_mesh(path, points, rgb, faces):
    """A glb: y up and the front on +z, its colours as light."""
    blob = points[:, [1, 2, 0]].astype("<f4").tobytes() + linear(rgb).astype("<f4").tobytes()
    blob += faces.astype("<u4").tobytes()
    n, size = len(points), 12 * len(points)
    views = [{"byteOffset": 0, "byteLength": size}, {"byteOffset": size, "byteLength": size}]
    views.append({"byteOffset": 2 * size, "byteLength": faces.size * 4})
    accessors = [
        {"bufferView": i, "componentType": 5126, "count": n, "type": "VEC3"} for i in (0, 1)
    ]
    accessors += [{"bufferView": 2, "componentType": 5125, "count": faces.size, "type": "SCALAR"}]
    primitive = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2}
    tree = {"bufferViews": views, "accessors": accessors, "meshes": [{"primitives": [primitive]}]}
    path.write_bytes(glb(tree, blob))


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


def test_the_curves_are_those_of_the_log(run):
    more = run / "csv_logs/version_1/metrics.csv"  # of a training that went on from step 20
    more.parent.mkdir()
    more.write_text("step,train/loss,lr-Adam\n29,1.5,nan\n39,0.5,1e-3\nx,3,\n")
    found = read_facts(run).curves
    assert found["train/loss"] == [(9, 4.0), (19, 2.5), (29, 1.5), (39, 0.5)]
    assert found["lr-Adam"] == [(39, 1e-3)]
    page = Page(write_page([run]))
    labels = [e[1].get("aria-label") for e in page.all("svg")]
    assert labels == ["loss: from 4 to 0.5"]
    assert "Constant: n gaussians 40" in page.text


def test_a_line_of_a_plot_goes_where_the_values_are():
    svg = curves.plot("train/loss", [("", [(0, 2.0), (50, 4.0), (100, 3.0)])])
    points = re.search(r'points="([^"]*)"', svg)[1].split()
    x, y = zip(*(map(float, point.split(",")) for point in points))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert y[0] - y[1] == pytest.approx(2 * (y[2] - y[1]), abs=0.2)  # up is less


def test_long_curves_keep_their_mean():
    curve = [(i, float(i % 7)) for i in range(10_000)]
    thin = curves.thinned(curve)
    assert len(thin) == curves.MAX_POINTS
    assert np.mean([v for _, v in thin]) == pytest.approx(np.mean([v for _, v in curve]), abs=0.01)


def test_settings_that_are_not_the_default_are_told_with_it(run):
    page = Page(write_page([run]))
    cells = [[e[2] for e in page.elements if e[0] == "td"][i : i + 3] for i in range(200)]
    assert ["seed", "3", "0"] in cells
    assert ["trainer.max_steps", "30", "-1"] in cells  # Lightning's
    assert ["data.eval_width", "64", "—"] in cells  # nobody declares it here
    [keys] = [[e[2] for e in page.elements if e[0] == "td"][:2]]
    assert keys == ["system.prompt_processor.prompt", PROMPT]  # of the command


def test_it_tells_the_command_and_the_one_that_repeats_it(run):
    page = Page(write_page([run]))
    made, again = (e[2] for e in page.all("pre", **{"class": "command"}))
    assert made == (run / "cmd.txt").read_text().partition("\n")[0]
    wanted = ["python", "launch.py", "--config", f"{run}/configs/parsed.yaml", "--train"]
    assert shlex.split(again) == [*wanted, "--gpu", "0"]


def test_what_was_changed_on_the_way_is_told_and_repeated(run):
    lines = [{"step": 12, "what": "prompt", "old": "a cat", "new": EVIL}, {"step": 3}]
    text = "\n".join(map(json.dumps, lines)) + "\nnothing\n"
    (run / "interventions.jsonl").write_text(text)
    page = Page(write_page([run]))
    cells = [e[2] for e in page.elements if e[0] == "td"]
    assert cells[-4:] == ["12", "prompt", "a cat", EVIL]
    again = shlex.split(page.all("pre", **{"class": "command"})[1][2])
    assert again[-2:] == ["--replay", f"{run}/interventions.jsonl"]


def test_a_setting_is_not_looked_up_in_this_machines_environment(run, monkeypatch):
    monkeypatch.setenv("A_SECRET", "s3cret")
    config = run / "configs/parsed.yaml"
    config.write_text(config.read_text() + "note: ${oc.env:A_SECRET}\n")
    html = write_page([run]).read_text()
    assert "${oc.env:A_SECRET}" in html and "s3cret" not in html


def test_previews_are_the_first_panels_in_the_order_of_their_steps(run):
    page = Page(write_page([run]))
    assert [e[2] for e in page.all("figcaption")][:2] == ["step 10", "step 20"]
    strip = [e[1] for e in page.all("img") if "at step" in e[1]["alt"]]
    assert [(e["width"], e["height"]) for e in strip] == [("64", "64"), ("64", "64")]


DAMAGED = {
    "configs/parsed.yaml": b"{{{",
    "cmd.txt": b"\"'",
    "run.json": b"[1, 2",
    "csv_logs/version_0/metrics.csv": b"\0\xff\n,,,",
    "save/it30-test-sheet.png": b"\x89PNG nothing",
    "save/it30-test/0.png": b"",
    "save/it10-0.png": b"GIF89a",
    "save/it30-export/gaussians.ply": b"ply\nformat binary_little_endian 1.0\n"
    b"element vertex 9000000000\nproperty float f_dc_0\nend_header\n",
    "save/it30-export/prior.safetensors": struct.pack("<Q", 1 << 60),
}


@pytest.mark.parametrize("change", ["damaged", "missing", "a folder", "a link"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_part_that_is_damaged_or_missing_is_left_out(run, tmp_path, name, change):
    path = run / name
    path.unlink()
    if change == "damaged":
        path.write_bytes(DAMAGED[name])
    elif change == "a folder":
        path.mkdir()
    elif change == "a link":
        secret = tmp_path / "secret"
        yaml = name.endswith("yaml")
        secret.write_text("note: TOP SECRET\n" if yaml else "TOP SECRET\nNamespace(a=1)\n")
        path.symlink_to(secret)
    page = Page(write_page([run]))
    assert page.all("h1") and "SECRET" not in page.html
    if name != "configs/parsed.yaml":
        assert page.all("h1")[0][2] == PROMPT
    if name != "save/it30-export/gaussians.ply":
        assert page.all("script", id="object-0")


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    page = Page(write_page([tmp_path]))
    assert "There is no object to show" in page.text and "Left out: settings" in page.text


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


def test_a_page_that_fails_leaves_the_old_one(run, monkeypatch):
    path = write_page([run])
    before = path.read_bytes()
    page = importlib.import_module("threestudio.run.page")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_page([run])
    assert path.read_bytes() == before
    said = []
    monkeypatch.setattr(page.threestudio, "warn", said.append, raising=False)
    assert try_page(run) is None and len(said) == 1 and "No space left" in said[0]
    assert [p.name for p in run.iterdir() if "report" in p.name] == ["report.html"]


def test_a_file_that_is_no_page_is_not_replaced(run):
    (run / "report.html").write_text("<p>mine")
    with pytest.raises(UserError, match=r"report\.html is there and not a page"):
        write_page([run])
    assert (run / "report.html").read_text() == "<p>mine"


def test_several_runs_stand_side_by_side_with_what_they_differ_in(tmp_path):
    runs = [run_folder(tmp_path / "one", seed=1), run_folder(tmp_path / "two", seed=2)]
    page = Page(write_page(runs, tmp_path / "both.html"))
    ids = [e[1]["data-object"] for e in page.all("div") if "data-object" in e[1]]
    assert ids == ["object-0", "object-1"] and all(page.all("script", id=i) for i in ids)
    assert [e[2] for e in page.all("h3")] == [f"{PROMPT} (one)", f"{PROMPT} (two)"]
    cells = [e[2] for e in page.elements if e[0] == "td"]
    assert cells[cells.index("seed") :][:3] == ["seed", "1", "2"]
    assert "system.guidance.guidance_scale" not in cells  # the same in both
    assert cells.count("seed") == 1 and "method" not in cells
    assert "The same in all: method lods-embedding, " in page.text
    assert len(page.all("polyline", **{"class": "line1"})) == 2  # of the plot and of its key


def test_runs_of_one_name_are_called_after_the_folders_that_they_are_in(tmp_path):
    runs = [run_folder(tmp_path / folder / "run" / "1f") for folder in ("red", "red-2")]
    page = Page(write_page(runs, tmp_path / "both.html"))
    assert [e[2] for e in page.all("h3")] == [f"{PROMPT} (red)", f"{PROMPT} (red-2)"]


def test_what_was_changed_on_the_way_is_told_beside_the_object(run):
    line = '{"step": %d, "what": "prompt", "old": "a", "new": "a snowman"}\n'
    (run / "interventions.jsonl").write_text("".join(line % step for step in range(5)))
    told = Page(write_page([run])).rows()["changed on the way"]
    assert told.startswith("prompt to a snowman before step 0; ") and told.endswith("; 2 more")


def test_more_runs_than_a_browser_draws_are_refused(tmp_path):
    with pytest.raises(UserError, match="1 to 12 runs, not 13"):
        write_page([tmp_path] * 13, tmp_path / "x.html")


def test_the_picture_of_a_run_without_an_object_is_shown(run):
    (run / "save/it30-export/gaussians.ply").unlink()
    picture(run / "save/it30-test/0.png", (0, 0, 255))
    page = Page(write_page([run]))
    [stage] = [e for e in page.all("div") if "stage" in e[1].get("class", "")]
    assert "data-object" not in stage[1] and page.all("img", alt=f"A view of {PROMPT}")


# --- in a run -----------------------------------------------------------------------------------


def test_a_run_ends_with_its_page(cli):  # noqa: F811
    status, out, _ = train(cli)
    page = Page(Path("outputs/toy/p/report.html"))
    assert status == 0 and "  page: outputs/toy/p/report.html\n" in out
    assert page.rows()["steps"] == "4"
    command = page.all("pre", **{"class": "command"})[0][2]
    assert command == Path("outputs/toy/p/cmd.txt").read_text().partition("\n")[0]
    cells = [e[2] for e in page.elements if e[0] == "td"]
    assert cells[:2] == ["system.prompt", "p"]
    assert f"torch {version('torch')}" in page.text


def test_a_page_shows_the_command_that_was_typed_and_how_long_it_was_paused(tmp_path):
    run = run_folder(tmp_path / "r")
    record = json.loads((run / "run.json").read_text())
    record["trainings"][0] |= {"asked": "lods make 'a <b>car</b>'", "seconds": 60, "paused": 300}
    (run / "run.json").write_text(json.dumps(record))
    page = Page(write_page([run]))
    commands = [text for _, _, text in page.all("pre", **{"class": "command"})]
    assert commands[0] == "lods make 'a <b>car</b>'"
    assert commands[1] == (run / "cmd.txt").read_text().partition("\n")[0]
    assert page.rows()["training"] == "60 s, and 5 min paused"


def test_the_command_that_repeats_a_run_repeats_it(cli):  # noqa: F811
    assert train(cli, "trainer.max_steps=3", "seed=5")[0] == 0
    page = Page(Path("outputs/toy/p/report.html"))
    again = shlex.split(page.all("pre", **{"class": "command"})[1][2])
    assert again[:2] == ["python", "launch.py"]
    kept = [word for word in again[2:] if word not in ("--extensions", "custom")]
    assert cli(*kept)[0] == 0
    losses = [read_facts(f"outputs/toy/{name}").curves["train/loss_toy"] for name in ("p", "p-002")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_run_is_recorded_with_each_of_its_trainings(cli):  # noqa: F811
    assert train(cli)[0] == 0
    assert train(cli, "resume=outputs/toy/p", "trainer.max_steps=6")[0] == 0
    record = read_record("outputs/toy/p")
    assert [(t["from_step"], t["to_step"]) for t in record] == [(0, 4), (4, 6)]
    for training in record:
        assert training["device"] == "cpu" and training["seconds"] >= 0
        assert training["versions"]["torch"] == version("torch")


def test_a_page_that_is_not_wanted_is_not_made(cli):  # noqa: F811
    status, out, _ = train(cli, "report=false")
    assert status == 0 and "page" not in out
    assert not Path("outputs/toy/p/report.html").exists()


def test_a_run_whose_page_cannot_be_made_is_a_good_run(cli, monkeypatch, caplog):  # noqa: F811
    def fail(*args):
        raise RuntimeError("kaputt")

    monkeypatch.setattr("threestudio.run.page.read_facts", fail)
    status, out, err = train(cli)
    assert status == 0 and "no report.html: kaputt" in caplog.text
    assert "Traceback" not in err and "page" not in out and Path(last()).is_file()


# --- a run of somebody else ---


def safetensors(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "a length that no float holds": (
        "run.json",
        b'{"trainings": [{"seconds": 1%s}]}' % (b"0" * 400),
    ),
    "what is no text": ("run.json", rb'{"trainings": [{"machine": "\ud800", "started": [1]}]}'),
    "a size that no text holds": (
        "save/it30-export/prior.safetensors",
        safetensors({"a": {"shape": [10**4000] * 2}}),
    ),
    "a view that no float holds": (
        "configs/parsed.yaml",
        b"data: {eval_fovy_deg: 1%s}\nsystem: {background: {color: [1%s]}}"
        % (b"0" * 399, b"0" * 399),
    ),
    "more columns than a plot": (
        "csv_logs/version_0/metrics.csv",
        b"step," + b",".join(b"c%d" % k for k in range(2000)) + b"\n" + b"1\n" * 9,
    ),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_told_is_left_out_and_the_rest_is_a_page(run, tmp_path, what, several):
    name, content = HOSTILE[what]
    (run / name).write_bytes(content)
    runs = [run, run_folder(tmp_path / "other")] if several else [run]
    page = Page(write_page(runs, tmp_path / "page.html"))
    assert page.all("script", type="application/octet-stream") and page.all("footer")
    if what not in ("what is no text", "a view that no float holds"):
        assert "Left out" in page.text


def test_a_long_log_is_thinned_over_all_of_its_steps(run, monkeypatch):
    monkeypatch.setattr(curves, "MAX_VALUES", 60)
    log = run / "csv_logs/version_0/metrics.csv"
    log.write_text("step,train/loss\n" + "".join(f"{k},{k}\n" for k in range(300)))
    steps = [step for step, _ in read_facts(run).curves["train/loss"]]
    assert len(steps) <= 30 and steps[0] == 0 and steps[-1] >= 285


def test_of_many_changes_the_first_are_listed(run, monkeypatch):
    monkeypatch.setattr("threestudio.run.page.sections.MAX_CHANGES", 2)
    line = {"step": 1, "what": "guidance_scale", "old": 1, "new": 2}
    (run / "interventions.jsonl").write_text(f"{json.dumps(line)}\n" * 5)
    assert "3 more are in interventions.jsonl" in Page(write_page([run])).text


def test_a_file_whose_name_is_not_text_is_linked_by_its_bytes(run):
    with open(os.fsencode(run / "save/it30-export") + b"/caf\xe9.glb", "wb"):
        pass
    page = Page(write_page([run]))
    assert any("caf%E9.glb" in e[1]["href"] for e in page.all("a"))
