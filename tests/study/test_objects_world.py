"""The world of real objects: its names, captions and cameras, its files, colours and pictures."""

import dataclasses
import importlib
import itertools
import re
import sys
import zipfile

import numpy as np
import pytest
import torch

from pocket import assets, colours, credits, render, world
from pocket.world import COLOURS, LIBRARIES, NAMES, OBJECTS, TEMPLATES, VIEWS

RNG = np.random.default_rng(0)
CAR = OBJECTS[NAMES.index("car")]


def test_objects_are_distinct_and_enough():
    assert len(set(NAMES)) == len(OBJECTS) >= 40
    assert len({(o.library, o.entry) for o in OBJECTS}) == len(OBJECTS)
    assert len({o.slug for o in OBJECTS}) == len(OBJECTS)
    assert sum(len(o.colours) >= 4 for o in OBJECTS) >= 11
    assert {o.library for o in OBJECTS} == set(LIBRARIES)
    assert all(o.like in (None, *o.colours) for o in OBJECTS)


@pytest.mark.parametrize("thing", OBJECTS, ids=NAMES)
def test_a_caption_asks_for_what_it_names(thing):
    for colour, view, template in itertools.product(
        (None, *thing.colours), range(-1, len(VIEWS)), TEMPLATES
    ):
        text = world.caption(RNG, thing.name, colour, view, template)
        assert world.asked(text) == world.asked(text.upper()) == (thing, colour)
        assert text.endswith(f", {VIEWS[view]} view") == (view >= 0)


def test_articles_are_those_of_english():
    asked = ("armchair", None), ("car", None), ("armchair", "red"), ("sneakers", None)
    named = [world.caption(RNG, *words, template="{}") for words in (*asked, ("sneakers", "blue"))]
    assert named == ["an armchair", "a car", "a red armchair", "sneakers", "blue sneakers"]


def test_a_template_is_drawn_where_none_is_given():
    said = {world.caption(np.random.default_rng(i), "car") for i in range(200)}
    assert said == {template.format("a car") for template in TEMPLATES}


@pytest.mark.parametrize(
    "prompt, reason",
    [
        ("a car and a dog", "must name exactly one of: hamburger, "),
        ("a spaceship", "must name exactly one of: hamburger, "),
        ("a carpet", "must name exactly one of: hamburger, "),
        ("a red and blue car", "must name one colour at most"),
        ("a red hamburger", "a hamburger comes in its own colours only"),
    ],
)
def test_a_prompt_that_asks_for_nothing_in_the_world_costs_one_line(prompt, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        world.asked(prompt)
    assert "\n" not in str(refused.value)


def test_cameras_are_within_the_ranges_of_the_overlays():
    elevation, azimuth, distance, fovy = world.cameras(4000).T
    high = elevation > 45
    assert high.mean() == pytest.approx(0.15, abs=0.002)
    assert elevation[high].min() >= 60 and elevation[high].max() <= 89
    assert elevation.min() >= -10
    assert azimuth.min() >= -180 and azimuth.max() < 180
    assert distance.min() >= 3.2 and distance.max() <= 4.0
    assert fovy.min() >= 36 and fovy.max() <= 44


def test_fewer_cameras_are_the_first_of_more():
    assert np.array_equal(world.cameras(60), world.cameras(400)[:60])
    assert not np.array_equal(world.cameras(60), world.cameras(60, seed=1))


@pytest.mark.parametrize("seed", [0, render.SEED])
@pytest.mark.parametrize("count", [60, 200, 400])
def test_cameras_cover_angles_more_evenly_than_chance(count, seed):
    """Every box [0, a) x [0, b) of (elevation's rank, azimuth) holds a b of the cameras."""
    elevation, azimuth = world.cameras(count, seed)[:, :2].T
    low = elevation <= 45
    u = np.where(low, 0.85 * (elevation + 10) / 55, 0.85 + 0.15 * (elevation - 60) / 29)
    points = np.stack([u, (azimuth + 180) / 360], 1)
    rng = np.random.default_rng(1)

    def discrepancy(x):
        corners = np.stack(np.meshgrid(*[np.linspace(0.1, 1, 10)] * 2), -1).reshape(-1, 2)
        inside = (x[None] < corners[:, None]).all(-1).mean(1)
        return np.abs(inside - corners.prod(1)).max()

    chance = np.mean([discrepancy(rng.uniform(size=(count, 2))) for _ in range(50)])
    assert discrepancy(points) < 0.6 * chance


@pytest.mark.parametrize(
    "elevation, azimuth, view",
    [
        (0, 0, "front"), (15, 44.9, "front"), (15, -44.9, "front"), (15, 359, "front"),
        (0, 46, "side"), (0, -90, "side"), (0, 134, "side"), (0, 270, "side"),
        (0, 136, "back"), (0, 180, "back"), (0, -180, "back"), (0, 540, "back"),
        (60, 0, "front"), (61, 0, "overhead"), (89, 180, "overhead"),
    ],
)  # fmt: skip
def test_the_word_of_a_view(elevation, azimuth, view):
    assert VIEWS[world.view_of(elevation, azimuth)] == view


def test_view_words_follow_the_prompt_processors_rules(tiny_sd):
    from tests.study.test_shapes import _directions

    directions = _directions(
        importlib.import_module("threestudio.models.prompt_processors.base"), tiny_sd
    )
    elevation, azimuth = torch.from_numpy(world.cameras(500)[:, :2]).T
    said = torch.zeros(500, dtype=torch.long)
    for i, direction in enumerate(directions):
        said[direction.condition(elevation, azimuth, torch.ones(500))] = i
    assert said.tolist() == [world.view_of(float(e), float(a)) for e, a in zip(elevation, azimuth)]


# ------------------------------------------------------------------------------------ colours


def _picture(rgb) -> np.ndarray:
    """A straight opaque picture of the colours ``rgb`` (N, 3) in a row."""
    rgb = np.asarray(rgb, np.uint8)[None]
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 255, np.uint8)], -1)


def _red(brightness) -> np.ndarray:
    """Pixels of one dark red paint under different lights."""
    return _picture(np.asarray(brightness)[:, None] * np.array([[1.0, 0.2, 0.25]]))


@pytest.mark.parametrize("colour", COLOURS)
def test_painted_pixels_get_the_paints_hue_and_keep_their_shading(colour):
    light = np.array([40, 80, 120, 160, 200])
    m = colours.level([_red(light)], CAR)
    made = colours.paint(_red(light), CAR, colour, m)[0, :, :3].astype(float)
    wanted = np.minimum(np.array(colours.PAINTS[colour]) * (light / m)[:, None], 255)
    assert np.abs(made - wanted).max() <= 0.5
    assert made[-2].max() / made[0].max() == pytest.approx(light[-2] / light[0], rel=0.03)


@pytest.mark.parametrize("colour", COLOURS)
def test_painting_a_darker_picture_is_darkening_the_painted_one(colour):
    rgb = 2 * np.random.default_rng(3).integers(0, 100, (500, 3))
    bright, dark = _picture(rgb), _picture(rgb // 2)
    m = 0.95  # nothing is clipped
    both = [colours.paint(p, CAR, colour, m)[..., :3].astype(float) for p in (bright, dark)]
    assert np.abs(both[0] / 2 - both[1]).max() <= 1
    assert 50 < colours.painted_part(bright, CAR).sum() < 450


def test_only_the_hues_that_are_named_are_painted():
    names = ("red", "grey", "blue", "pale", "pink")
    picture = _picture([(200, 20, 30), (90, 90, 90), (20, 20, 200), (200, 190, 190), (200, 10, 90)])
    assert colours.painted_part(picture, CAR)[0].tolist() == [n in ("red", "pink") for n in names]
    made = colours.paint(picture, CAR, "green", 0.8)
    assert np.array_equal(made[0, 1:4], picture[0, 1:4])
    assert np.array_equal(made[..., 3], picture[..., 3])
    clear = picture.copy()
    clear[..., 3] = 0
    assert not colours.painted_part(clear, CAR).any()


def test_hues_of_a_range_through_zero():
    angle = np.radians(np.arange(0, 360, 5) + 2)
    # hue runs linearly along the edges of the cube; here by colorsys, a second implementation
    import colorsys

    hues = np.degrees(angle)
    rgb = [[255 * c for c in colorsys.hsv_to_rgb(h / 360, 0.8, 0.9)] for h in hues]
    first, last = CAR.paint
    wanted = (hues >= first) | (hues <= last)
    assert first > last and colours.painted_part(_picture(rgb), CAR)[0].tolist() == wanted.tolist()
    other = dataclasses.replace(CAR, paint=(90.0, 180.0))
    wanted = (hues >= 90) & (hues <= 180)
    assert colours.painted_part(_picture(rgb), other)[0].tolist() == wanted.tolist()


def test_what_cannot_be_painted_is_refused():
    with pytest.raises(ValueError, match="A hamburger comes in its own colours only"):
        colours.paint(_red([9]), OBJECTS[NAMES.index("hamburger")], "red", 1.0)
    with pytest.raises(ValueError, match="Nothing of the car has the hues"):
        colours.level([_picture([(20, 20, 200)])], CAR)


# ------------------------------------------------------------------------------------- files


def _library(folder, files=None, catalogue=None, version="1.8", name="KatorLegaz"):
    """A furniture library with a model of a cube, number 59, with a face of each colour."""
    lines = catalogue or ["name#59=Cube", "creator#59=Someone", "model#59=/things/cube/cube.obj"]
    archive = folder / f"{name}.sh3f"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(assets.CATALOGUE, "\n".join([f"version={version}", *lines]))
        for path, text in (files or _cube()).items():
            opened.writestr(path, text)
    return archive


FACES = {  # direction: colour
    (0, 0, 1): (1, 0, 0), (1, 0, 0): (0, 1, 0), (0, 0, -1): (0, 0, 1),
    (-1, 0, 0): (1, 1, 0), (0, 1, 0): (1, 1, 1), (0, -1, 0): (0, 1, 1),
}  # fmt: skip


def _cube(half=3.0, centre=(10.0, 3.0, -4.0)) -> dict[str, str]:
    obj, mtl = ["mtllib cube.mtl"], []
    for i, (normal, colour) in enumerate(FACES.items()):
        normal = np.array(normal)
        across = np.roll(normal, 1)
        up = np.cross(normal, across)
        mtl.append(f"newmtl m{i}\nKd {' '.join(map(str, colour))}")
        for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
            obj.append("v {} {} {}".format(*(centre + half * (normal + a * across + b * up))))
        obj.append(f"usemtl m{i}\nf {' '.join(str(4 * i + k) for k in (1, 2, 3, 4))}")
    return {"things/cube/cube.obj": "\n".join(obj), "things/cube/cube.mtl": "\n".join(mtl),
            "things/cube/sub/readme.txt": "-", "things/other/other.obj": "-"}  # fmt: skip


def test_a_model_is_unpacked_with_the_files_of_its_folder_only(tmp_path):
    archive = _library(tmp_path)
    obj = assets.unpack(archive, assets.find_entry(archive, 59), tmp_path / "out")
    assert obj == tmp_path / "out" / "cube.obj" and obj.is_file()
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert found == {"cube.obj", "cube.mtl", "sub/readme.txt"}


@pytest.mark.parametrize(
    "files, reason",
    [
        ({**_cube(), "things/cube/../../evil": "-"}, "leads out of its folder"),
        ({"things/other.obj": "-"}, "the model of 'Cube' is not there"),
    ],
)
def test_a_model_that_is_not_there_or_leads_elsewhere_is_refused(tmp_path, files, reason):
    archive = _library(tmp_path, files)
    entry = assets.find_entry(archive, 59)
    with pytest.raises(ValueError, match=reason):
        assets.unpack(archive, entry, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()


def test_a_model_that_is_too_large_is_refused(tmp_path, monkeypatch):
    archive = _library(tmp_path)
    entry = assets.find_entry(archive, 59)
    size = sum(len(text) for path, text in _cube().items() if path.startswith("things/cube/"))
    monkeypatch.setattr(assets, "LARGEST", size)
    assets.unpack(archive, entry, tmp_path / "fits")
    monkeypatch.setattr(assets, "LARGEST", size - 1)
    with pytest.raises(ValueError, match="the model of 'Cube' is too large"):
        assets.unpack(archive, entry, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_library_is_told_in_one_line(tmp_path):
    archive = _library(tmp_path)
    entry = assets.find_entry(archive, 59)
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"usemtl m0", b"usemtl m9"))  # the checksum differs
    with pytest.raises(ValueError, match="the model of 'Cube' is damaged"):
        assets.unpack(archive, entry, tmp_path / "out")
    for broken in (b"no zip", content[: len(content) // 2]):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match="is not a furniture library of Sweet Home 3D"):
            assets.catalogue(archive)


def test_another_version_of_the_libraries_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is of version 1\.9: the world is made of version 1\.8"):
        assets.catalogue(_library(tmp_path, version="1.9"))
    with pytest.raises(ValueError, match="has no model number 60"):
        assets.find_entry(_library(tmp_path), 60)


def test_a_rotation_is_read_by_rows():
    assert np.array_equal(assets.rotation({}), np.eye(3))
    turned = assets.rotation({"modelRotation": "0 -1 0 1 0 0 0 0 1"})
    assert np.array_equal(turned @ [1, 0, 0], [0, 1, 0])
    with pytest.raises(ValueError, match="has a rotation of '1 0'"):
        assets.rotation({"name": "Cube", "modelRotation": "1 0"})


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without the package and without Debian's tools."""
    monkeypatch.setattr(assets, "INSTALLED", tmp_path / "usr")
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)


def test_where_the_models_are(bare, tmp_path):
    work = tmp_path / "work"
    with pytest.raises(ValueError, match="no apt-get here: unpack the package and give the folder"):
        assets.find(None, work)
    for folder, reason in ((tmp_path / "none", "is not a folder"), (tmp_path, "has neither")):
        with pytest.raises(ValueError, match=reason) as refused:
            assets.find(folder, work)
        assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    (tmp_path / "sweethome3d-furniture_1.8-1_all.deb").write_text("no package")
    with pytest.raises(ValueError, match="needs dpkg-deb to be unpacked"):
        assets.find(tmp_path, work)
    _library(tmp_path)
    assert assets.find(tmp_path, work) == tmp_path
    (tmp_path / "usr").mkdir()
    _library(tmp_path / "usr")
    assert assets.find(None, work) == tmp_path / "usr"


def _command(folder, name, text):
    """An executable for the search path that stands in for one of Debian's."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def test_debians_tools_fetch_the_package_once(tmp_path, monkeypatch):
    bin_, work = tmp_path / "bin", tmp_path / "work"
    bin_.mkdir()
    monkeypatch.setattr(assets, "INSTALLED", assets.Path("/nowhere/furniture"))
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    _command(bin_, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    _command(bin_, "dpkg-deb", "exit 2")
    with pytest.raises(ValueError, match=r"failed \(E: Unable to locate package\): give --assets"):
        assets.find(None, work)
    _command(bin_, "apt-get", 'echo . >> ../calls; : > "$2_1.8-1_all.deb"')
    with pytest.raises(ValueError, match="or damaged: remove it"):
        assets.find(None, work)
    _command(bin_, "dpkg-deb", 'mkdir -p "$3/nowhere/furniture"; : > "$3/nowhere/furniture/a.sh3f"')
    found = assets.find(None, work)
    assert (found / "a.sh3f").exists() and found.is_relative_to(work)
    next(work.rglob("*.deb")).unlink()
    assert assets.find(None, work) == found
    assert (work / "calls").read_text() == ".\n"  # one download, and none of what is unpacked


# ----------------------------------------------------------------------------------- pictures


def test_a_picture_is_reduced_to_means_of_four_pixels():
    straight = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    made = render.reduce(straight)
    assert made.shape == (4, 4, 4) and made.dtype == np.uint8
    for i, j in itertools.product(range(4), range(4)):
        block = straight[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(float).reshape(4, 4)
        colour = (block[:, :3] * block[:, 3:] / 255).mean(0)
        assert np.abs(made[i, j, :3] - colour).max() <= 0.51
        assert abs(made[i, j, 3] - block[:, 3].mean()) <= 0.51


def test_where_pyvista_is_missing_one_line_says_so(tmp_path, monkeypatch):
    _library(tmp_path)
    monkeypatch.setitem(sys.modules, "pyvista", None)
    with pytest.raises(ValueError, match=r"pip install pyvista$"):
        render.render_all(tmp_path, tmp_path / "work", 2, 1, only=["car"])


class _Photographer:
    """Stands in for VTK: each picture is of one colour, by azimuth."""

    taken = 0

    def picture(self, elevation, azimuth, distance, fovy):
        type(self).taken += 1
        return np.full((4, 4, 4), (200, 10 + int(azimuth) % 50, 20, 255), np.uint8)

    def close(self):
        pass


@pytest.fixture
def photographer(monkeypatch):
    monkeypatch.setattr(_Photographer, "taken", 0)
    monkeypatch.setattr(render, "stage_of", lambda *a: _Photographer())
    monkeypatch.setattr(render, "LEVEL_VIEWS", 3)
    return _Photographer


def _read(folder):
    return {f.stem: np.load(f) for f in sorted((folder / "renders" / "car").iterdir())}


def test_rendering_goes_on_where_it_stopped(tmp_path, photographer):
    render.render(CAR, tmp_path, tmp_path / "once", 7, 3)
    whole = _read(tmp_path / "once")
    assert {k: len(v) for k, v in whole.items()} == {
        "cameras": 7, "rgba": 7, **{f"rgba-{c}": 3 for c in COLOURS},
    }  # fmt: skip
    assert np.array_equal(whole["cameras"], world.cameras(7, render.SEED))
    for count, painted in ((2, 2), (5, 2), (7, 3)):
        render.render(CAR, tmp_path, tmp_path / "thrice", count, painted)
    parts = _read(tmp_path / "thrice")
    assert all(np.array_equal(parts[k], whole[k]) for k in whole)
    before = photographer.taken
    render.render(CAR, tmp_path, tmp_path / "thrice", 7, 3)
    assert photographer.taken == before


def test_fewer_views_take_no_cameras_from_more(tmp_path, photographer):
    render.render(CAR, tmp_path, tmp_path, 7, 0)
    render.render(CAR, tmp_path, tmp_path, 4, 4)
    made = _read(tmp_path)
    assert len(made["cameras"]) == len(made["rgba"]) == 7 and len(made["rgba-red"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0.0, -90.0])
def test_a_cube_is_seen_as_large_as_it_is_and_from_the_side_that_is_asked_for(tmp_path, turn):
    pytest.importorskip("pyvista")
    thing = dataclasses.replace(CAR, turn=turn)
    _library(tmp_path)
    stage = render.stage_of(thing, tmp_path, tmp_path / "out", size=64)
    for azimuth, elevation in ((0, 0), (90, 0), (180, 0), (-90, 0), (0, 89.9)):
        picture = render.reduce(stage.picture(elevation, azimuth, 3.6, 40.0)).astype(float)
        a = np.radians(azimuth - turn)
        side = (0, 1, 0) if elevation else (round(np.sin(a)), 0, round(np.cos(a)))
        seen = picture[32, 32, :3]
        assert ((seen > 0.5 * seen.max()) == np.array(FACES[side], bool)).all(), (azimuth, seen)
        # The near face hides the others: its side over that of the frame, squared.
        near = 0.87 / ((3.6 - 0.87) * np.tan(np.radians(20)))
        assert picture[..., 3].mean() / 255 == pytest.approx(near**2, rel=0.02)
        covered = picture[..., 3] > 127
        assert abs(covered[32].sum() - covered[:, 32].sum()) <= 1
    stage.close()


# ------------------------------------------------------------------------------------- credits


def _table() -> list[dict[str, str]]:
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")] if not line.endswith("| |\n") else
        [cell.strip() for cell in line.strip("\n ")[1:-1].split("|")]
        for line in credits.FILE.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.startswith("| ")
    ]  # fmt: skip
    return [dict(zip(credits.COLUMNS, row, strict=True)) for row in rows[1:]]


def test_every_object_is_credited():
    table = _table()
    assert [row["Object"] for row in table] == list(NAMES)
    for row, thing in zip(table, OBJECTS, strict=True):
        assert row["Library"] == thing.library
        assert row["Also changed"] == credits.changes(thing)
        assert row["Author"] and row["Model"]
        name, address = re.fullmatch(r"\[(.*)\]\((.*)\)", row["Licence"]).groups()
        assert credits.LICENCES[name] == address
        # a model's own licence file may ask for more than its library's, not for less
        assert name == LIBRARIES[thing.library] or LIBRARIES[thing.library] == "CC0 1.0"


def test_every_library_is_credited_as_it_asks_for():
    text = credits.FILE.read_text(encoding="utf-8")
    for library in LIBRARIES:
        assert f"- {library}: {credits.MAKERS[library]}; [{LIBRARIES[library]}]" in text


OWN = "Released under Creative Commons {} http://www.blendswap.com/blends/view/12"


@pytest.mark.parametrize(
    "files, licence, page",
    [
        ({}, "CC-BY 3.0 US", None),
        ({"things/cube/LICENSE.txt": OWN.format("Zero")}, "CC0 1.0", 12),
        ({"things/cube/1 - License.html": OWN.format("Attribution 3.0")}, "CC-BY 3.0", 12),
        ({"things/other/LICENSE.txt": OWN.format("Zero")}, "CC-BY 3.0 US", None),
    ],
)
def test_a_models_own_licence_goes_before_its_librarys(tmp_path, files, licence, page):
    _library(tmp_path, {**_cube(), **files})
    row = credits.row(CAR, tmp_path)
    assert row["Licence"] == f"[{licence}]({credits.LICENCES[licence]})"
    link = f"[Cube](http://www.blendswap.com/blends/view/{page})" if page else "Cube"
    assert (row["Model"], row["Author"], row["Library"]) == (link, "Someone", "KatorLegaz")


def test_a_licence_that_is_not_known_is_refused(tmp_path):
    _library(
        tmp_path, {**_cube(), "things/cube/LICENSE.txt": OWN.format("Attribution-NonCommercial")}
    )
    with pytest.raises(ValueError, match="names no licence that is known"):
        credits.row(CAR, tmp_path)
