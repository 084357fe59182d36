"""Files that others damaged or made to do harm: one line each, little memory, nothing outside."""

import gzip
import json
import os
import resource
import struct

import numpy as np
import pytest
import torch
from lods import assets
from lods.gaussians import Gaussians
from lods.gaussians.spz_file import MAX_GAUSSIANS

from tests.assets.test_gaussian_files import spz, spz4
from tests.assets.test_meshes import RED_BLUE, SQUARE, UV, gltf
from tests.assets.things import shell
from tests.glb_files import glb

MUTATIONS = 50  # of each kind


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """``{name: content}`` of files that are read."""
    folder = tmp_path_factory.mktemp("good")
    made = shell(20, degree=1)
    for name in ("a.ply", "b.compressed.ply", "c.splat", "d.spz"):
        assets.write(folder / name, made)
    gltf(folder / "e.glb", [(SQUARE, UV, None, ((1, 1, 1), RED_BLUE, {}))])
    square = assets.read(folder / "e.glb")
    square.colours = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    assets.write(folder / "f.ply", square)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(data, rng):
    """A few bytes changed, a piece cut out, repeated or left off, numbers made huge."""
    data = bytearray(data)
    kind = rng.integers(5)
    at = int(rng.integers(len(data)))
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] = rng.integers(256)
    elif kind == 1:
        del data[at : at + int(rng.integers(1, 60))]
    elif kind == 2:
        data[at:at] = data[at : at + int(rng.integers(1, 60))]
    elif kind == 3:
        del data[at:]
    else:
        digits = [i for i in range(min(len(data), 3000)) if chr(data[i]).isdigit()]
        if digits:
            place = int(rng.choice(digits))
            data[place : place + 1] = [b"999999999", b"-1", b"1e400", b"0", b"x"][rng.integers(5)]
    return bytes(data)


def refused_or_whole(path, **options):
    """The message of the refusal, which is one line that names the file; or "" for an asset whose
    values are finite."""
    try:
        found = assets.read(path, **options)
    except ValueError as error:
        assert "\n" not in str(error) and path.name in str(error), repr(error)
        assert len(str(error)) < 600, str(error)
        return str(error)
    if isinstance(found, Gaussians):
        assert all(value.isfinite().all() for value in found.export().values())
    else:
        assert found.faces.min() >= 0 and found.faces.max() < len(found.vertices)
        assert found.vertices[found.faces].isfinite().all()
        assert found.shown_colours().isfinite().all()
    return ""


@pytest.mark.parametrize(
    "name", ["a.ply", "b.compressed.ply", "c.splat", "d.spz", "e.glb", "f.ply"]
)
def test_damaged_files_are_refused_in_one_line_or_read(good, tmp_path, monkeypatch, name):
    monkeypatch.setattr("lods.assets.atlas.SIDE", 64)
    monkeypatch.setattr("lods.log.warn", lambda text: None)
    rng = np.random.default_rng(sum(name.encode()))
    data = good[name]
    if name == "d.spz":  # else hardly anything comes behind the checksum
        data = gzip.decompress(data)
    refusals = 0
    for _ in range(MUTATIONS):
        damaged = mutated(data, rng)
        if name == "d.spz":
            damaged = gzip.compress(damaged, 1)
        (tmp_path / name).write_bytes(damaged)
        refusals += bool(refused_or_whole(tmp_path / name))
    assert refusals > 5
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "uri",
    ["../../etc/passwd", "/etc/passwd", "http://127.0.0.1:9/a.bin", "file:///etc/passwd", "a\0b"],
)
@pytest.mark.parametrize("where", ["buffers", "images"])
def test_what_is_outside_of_the_folder_is_not_read(tmp_path, monkeypatch, uri, where):
    import socket

    def nothing(*args, **kwargs):
        raise AssertionError("a file shall not open connections")

    monkeypatch.setattr(socket, "socket", nothing)
    gltf(tmp_path / "a.glb", [(SQUARE, UV, None, ((1, 1, 1), RED_BLUE, {}))])
    data = (tmp_path / "a.glb").read_bytes()
    size = struct.unpack_from("<I", data, 12)[0]
    tree, blob = json.loads(data[20 : 20 + size]), data[28 + size :]
    folder = tmp_path / "inner"
    folder.mkdir()
    if where == "buffers":
        tree["buffers"][0]["uri"] = uri
    else:
        tree["images"] = [{"uri": uri}]
    (folder / "b.glb").write_bytes(glb(tree, blob))
    message = refused_or_whole(folder / "b.glb")
    assert "which is not a file in its folder" in message or "null byte" in message


def grown_by(read):
    """By how many bytes the peak of memory grows."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


HEAD = "ply\nformat binary_little_endian 1.0\nelement {}\n"
PACKED = "".join(
    f"property uint packed_{name}\n" for name in ("position", "rotation", "scale", "color")
)
HUGE = {
    "a.ply": HEAD.format("vertex 1000000000") + "property float f_dc_0\nend_header\n",
    "b.ply": HEAD.format("chunk 1\nproperty float min_x\nelement vertex 1000000000")
    + PACKED
    + "end_header\n",
    "c.spz": spz(3, b"", n=10**9),
    "d.spz": spz(2, b"", n=MAX_GAUSSIANS),
    "e.splat": bytes(31),
    "f.gltf": json.dumps(
        {
            "asset": {"version": "2.0"},
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
            "accessors": [{"componentType": 5126, "count": 10**9, "type": "VEC3"}],
        }
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_header_that_promises_a_thousand_million_things_takes_no_memory(tmp_path, name):
    data = HUGE[name]
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    assert refused_or_whole(tmp_path / name)  # with what it imports
    message: list[str] = []
    assert grown_by(lambda: message.append(refused_or_whole(tmp_path / name))) < 20_000_000
    assert message[0]


def test_what_unpacks_to_more_than_its_header_says_is_not_unpacked(tmp_path):
    """A hundred megabytes behind one Gaussian."""
    body = bytes(20)
    (tmp_path / "a.spz").write_bytes(spz(3, body + bytes(100_000_000), n=1))
    assert (tmp_path / "a.spz").stat().st_size < 1_000_000
    assert grown_by(lambda: assets.read(tmp_path / "a.spz", half_side=None)) < 50_000_000


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x1f\x8b" + bytes(30), "not a readable spz file"),
        (b"NGSP" + bytes(40), "of version 0: versions 1 to 4 are read"),
        (gzip.decompress(spz(3, bytes(20))), "of version 3: versions"),  # not compressed
        (spz(4, bytes(20)), "of version 4: versions"),  # compressed by gzip
        (spz(5, bytes(20)), "of version 5: versions 1 to 4 are read"),
        (spz(3, bytes(20), magic=b"NGSQ"), "does not begin as an spz file does"),
        (spz(3, bytes(20), degree=5), "harmonics of degree 5"),
        (spz(3, bytes(20), bits=60), "60 fractional bits"),
        (spz(3, bytes(20), n=0), "it promises 0 Gaussians"),
        (spz(3, bytes(19)), "it promises 20 bytes, and has 19"),
        (gzip.compress(b"NGSP"), "shorter than its header"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a gzip holds the time
)
def test_what_is_wrong_with_an_spz_is_said(tmp_path, data, text):
    (tmp_path / "a.spz").write_bytes(data)
    assert text in refused_or_whole(tmp_path / "a.spz")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"streams": 4}, "it has 4 tables, and shall have 5"),
        ({"sizes": [9, 1, 3, 3, 5]}, "a table of 5 bytes, and shall have one of 4"),
        ({"table": 10**9}, "not a readable spz file"),
        ({"lengths": 10**12}, "a table of 9 bytes"),
        ({"body": [9, 1, 3, 3, 3]}, "a table of 3 bytes, and shall have 4"),
        ({"raw": bytes(30)}, "a table of it is damaged"),
    ],
)
def test_what_is_wrong_with_an_spz_of_version_4_is_said(tmp_path, changes, text):
    (tmp_path / "a.spz").write_bytes(spz4([bytes(n) for n in (9, 1, 3, 3, 4)], **changes))
    assert text in refused_or_whole(tmp_path / "a.spz")


def test_a_table_of_version_4_is_not_unpacked_beyond_its_size(tmp_path):
    """Whose own header asks for a hundred megabytes."""
    tables = [bytes(100_000_000), bytes(1), bytes(3), bytes(3), bytes(4)]
    data = spz4(tables, sizes=[9, 1, 3, 3, 4])
    (tmp_path / "a.spz").write_bytes(data)
    assert len(data) < 100_000
    assert grown_by(lambda: assets.read(tmp_path / "a.spz", half_side=None)) < 50_000_000


def test_a_picture_that_cannot_be_decoded_leaves_a_grey_mesh(tmp_path, monkeypatch):
    said: list = []
    monkeypatch.setattr("lods.log.warn", said.append)
    broken = RED_BLUE[:60] + bytes(len(RED_BLUE) - 60)
    gltf(tmp_path / "a.glb", [(SQUARE, UV, None, ((1, 1, 1), broken, {}))])
    found = assets.read(tmp_path / "a.glb")
    assert found.texture is None and len(said) == 1
    torch.testing.assert_close(found.colours, torch.full((4, 3), 0.5), atol=1e-4, rtol=0)


def test_many_pictures_that_cannot_be_decoded_take_no_time(tmp_path, monkeypatch):
    said: list = []
    monkeypatch.setattr("lods.log.warn", said.append)
    broken = RED_BLUE[:60] + bytes(len(RED_BLUE) - 60)
    parts = [(SQUARE + [i, 0, 0], UV, None, ((1, 1, 1), broken, {})) for i in range(40)]
    found = assets.read(gltf(tmp_path / "a.glb", parts))
    assert found.texture is None and len(found.faces) == 80 and 0 < len(said) < 10
    torch.testing.assert_close(found.colours, torch.full((160, 3), 0.5), atol=1e-4, rtol=0)


def test_a_file_without_triangles_is_one_line(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    assert "no triangles" in refused_or_whole(tmp_path / "a.obj")


def test_an_svg_or_a_page_is_no_picture(tmp_path):
    gltf(tmp_path / "a.glb", [(SQUARE, UV, None, ((1, 1, 1), b"<svg onload='x()'/>", {}))])
    assert "of no known format" in refused_or_whole(tmp_path / "a.glb")
