"""Files of Gaussians, out and in again: what is drawn stays the same."""

import gzip
import math
import struct

import numpy as np
import pytest
import torch
from lods import assets
from lods.gaussians import Gaussians
from lods.gaussians.compressed_ply import CHUNK
from lods.gaussians.files import read_gaussians, write_gaussians
from plyfile import PlyData, PlyElement

from tests.assets.things import picture, psnr, shell

EXACT, ROUNDED = 45.0, 35.0  # decibels


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["a.ply", "a.compressed.ply", "a.splat", "a.spz"])
def test_what_is_written_and_read_is_drawn_the_same(tmp_path, name, degree):
    made = shell(degree=degree)
    assets.write(tmp_path / name, made)
    found = assets.read(tmp_path / name, half_side=None)
    assert isinstance(found, Gaussians) and found.count == made.count
    expected = made
    if name == "a.splat":  # has no harmonics
        expected = shell()
        assert found.sh_degree == 0
    else:
        assert found.sh_degree == degree
    assert psnr(picture(found), picture(expected)) > (EXACT if name == "a.ply" else ROUNDED)


@pytest.mark.parametrize("axes", ["y-down", "y-up"])
@pytest.mark.parametrize("name", ["a.ply", "a.compressed.ply", "a.splat"])
def test_axes_of_a_file_can_be_chosen(tmp_path, name, axes):
    made = shell(300, degree=1)
    made.means.data[0] = torch.tensor([3.0, 0, 0])  # far on the front
    assets.write(tmp_path / name, made, axes=axes)
    raw = read_gaussians(tmp_path / name)
    front = raw["means"][raw["means"].norm(dim=1).argmax()]
    wanted = {"y-down": [0, 0, -3.0], "y-up": [0, 0, 3.0]}[axes]
    torch.testing.assert_close(front, torch.tensor(wanted), atol=2e-2, rtol=0)
    upright = assets.read(tmp_path / name, axes, half_side=None)
    plain = shell(300) if name == "a.splat" else shell(300, degree=1)
    plain.means.data[0] = made.means.data[0]
    assert psnr(picture(upright), picture(plain)) > ROUNDED
    if name != "a.splat":  # which cannot say its axes
        assert psnr(picture(assets.read(tmp_path / name, half_side=None)), picture(plain)) > ROUNDED


def test_an_spz_has_y_up(tmp_path):
    made = shell(200)
    assets.write(tmp_path / "a.spz", made)
    raw = read_gaussians(tmp_path / "a.spz")
    torch.testing.assert_close(raw["means"], made.means.data[:, [1, 2, 0]], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="a spz is y-up always"):
        assets.write(tmp_path / "a.spz", made, axes="z-up")


def test_a_compressed_ply_is_laid_out_as_others_read_it(tmp_path):
    """One Gaussian, whose words are worked out by hand: it is alone in its chunk, so that all that
    lies between ends is at the lower one."""
    made = {
        "means": torch.tensor([[1.0, 2, 3]]),
        "scales": torch.tensor([[-1.0, -2, -30]]),  # the last is limited to -20
        "quats": torch.tensor([[0.5, -0.5, 0.5, 0.5]]) * 2,
        "opacities": torch.tensor([math.log(51 / 204)]),  # 1/5
        "sh0": torch.zeros(1, 1, 3),
        "shN": torch.tensor([[[0.0, -4, 5], [1, 0, 0], [0, 0, 0]]]),
    }
    assert write_gaussians(tmp_path / "a.compressed.ply", made) == 1
    data = PlyData.read(str(tmp_path / "a.compressed.ply"))
    assert [element.name for element in data.elements] == ["chunk", "vertex", "sh"]
    chunk, [vertex] = data["chunk"], data["vertex"].data
    assert [p.name for p in chunk.properties][:6] == [
        *("min_x", "min_y", "min_z", "max_x", "max_y", "max_z")
    ]
    assert chunk.data[0].tolist() == (1, 2, 3, 1, 2, 3, -1, -2, -20, -1, -2, -20, *[0.5] * 6)
    assert vertex["packed_position"] == 0 and vertex["packed_scale"] == 0
    assert vertex["packed_color"] == 51
    word = int(vertex["packed_rotation"])
    unit = [((word >> shift) & 1023) / 1023 for shift in (20, 10, 0)]
    assert word >> 30 == 0  # w is the largest, and positive
    assert np.allclose((np.array(unit) - 0.5) * 2**0.5, [-0.5, 0.5, 0.5], atol=1e-3)
    # channel after channel: red of the three coefficients first
    bytes_ = [128, 160, 128, 0, 128, 128, 255, 128, 128]
    assert [int(data["sh"][f"f_rest_{i}"][0]) for i in range(9)] == bytes_


def test_chunks_of_a_compressed_ply_hold_neighbours(tmp_path):
    made = shell(16 * CHUNK)
    write_gaussians(tmp_path / "a.compressed.ply", made.export())
    chunk = PlyData.read(str(tmp_path / "a.compressed.ply"))["chunk"]
    assert chunk.count == 16
    sides = np.stack([chunk[f"max_{a}"] - chunk[f"min_{a}"] for a in "xyz"], axis=1)
    means = made.means.detach()
    assert sides.mean() < 0.7 * float((means.amax(0) - means.amin(0)).mean())


def words_to_ply(path, words, chunk):
    names = ["packed_position", "packed_rotation", "packed_scale", "packed_color"]
    vertex = np.zeros(len(words), [(name, "u4") for name in names])
    for i, name in enumerate(names):
        vertex[name] = [word[i] for word in words]
    columns = [f"{end}_{a}" for end in ("min", "max") for a in "xyz"]
    columns += [f"{end}_scale_{a}" for end in ("min", "max") for a in "xyz"]
    table = np.zeros(1, [(name, "f4") for name in columns])
    for name, value in chunk.items():
        table[name] = value
    elements = [PlyElement.describe(table, "chunk"), PlyElement.describe(vertex, "vertex")]
    PlyData(elements).write(str(path))


def test_an_older_compressed_ply_without_ends_of_colours_is_read(tmp_path):
    ends = {"min_x": -1, "max_x": 1, "min_y": 0, "max_y": 2, "min_z": 5, "max_z": 5}
    position = (2047 << 21) | (0 << 11) | 7
    color = (255 << 24) | (51 << 16) | (0 << 8) | 128
    turned = (3 << 30) | (512 << 20) | (512 << 10) | 512  # z the largest
    words_to_ply(tmp_path / "a.ply", [(position, turned, 0, color)], ends)
    found = read_gaussians(tmp_path / "a.ply")
    assert found["means"].tolist() == [[1, 0, 5]]
    shown = 0.5 + 0.28209479177387814 * found["sh0"][0, 0]
    torch.testing.assert_close(shown, torch.tensor([1.0, 0.2, 0.0]), atol=1e-6, rtol=0)
    assert float(found["opacities"].sigmoid()) == pytest.approx(128 / 255, abs=1e-6)
    assert found["quats"][0].abs().argmax() == 3 and float(found["quats"][0, 3]) > 0.99


def spz(version, body, n=1, degree=0, bits=12, magic=b"NGSP"):
    head = struct.pack("<4sIIBBBB", magic, version, n, degree, bits, 0, 0)
    return gzip.compress(head + body)


def spz4(
    tables, n=1, degree=0, sizes=None, body=None, streams=None, table=32, lengths=None, raw=None
):
    """A file of version 4, with what is wrong with it."""
    import zstandard

    tables = tables if body is None else [bytes(length) for length in body]
    packed = [raw or zstandard.ZstdCompressor().compress(each) for each in tables]
    said = sizes or [9, 1, 3, 3, 4, 9][: len(tables)]
    head = struct.pack("<4sIIBBBB", b"NGSP", 4, n, degree, 12, 0, streams or len(tables))
    head += struct.pack("<I", table) + bytes(12)
    for each, size in zip(packed, said):
        head += struct.pack("<QQ", lengths or len(each), size)
    return head + b"".join(packed)


def test_an_spz_is_read_as_its_format_says(tmp_path):
    """One Gaussian of each version, byte after byte."""
    place = {
        1: np.array([1.5, -2, 0.25], "<f2").tobytes(),
        2: b"".join(struct.pack("<i", round(x * 4096))[:3] for x in (1.5, -2, 0.25)),
    }
    place[3] = place[2]
    look = bytes([51]) + bytes([255, 0, 128]) + bytes([160, 144, 0])
    turned = {1: bytes([255, 128, 128]), 3: struct.pack("<I", (0 << 30) | (1 << 29) | 5)}
    turned[2] = turned[1]
    rest = bytes([128, 192, 64]) + bytes(6 * [128])
    place[4], turned[4] = place[3], turned[3]
    for version in (1, 2, 3, 4):
        tables = [place[version], look[:1], look[1:4], look[4:], turned[version], rest]
        made = spz(version, b"".join(tables), degree=1)
        made = spz4(tables, degree=1) if version == 4 else made
        (tmp_path / "a.spz").write_bytes(made)
        found = read_gaussians(tmp_path / "a.spz")
        assert found["means"].tolist() == [[1.5, -2, 0.25]]
        assert found["axes"] == ("+z", "+y")
        assert float(found["opacities"].sigmoid()) == pytest.approx(0.2, abs=1e-6)
        dc = torch.tensor([[[0.5 / 0.15, -0.5 / 0.15, (128 / 255 - 0.5) / 0.15]]])
        torch.testing.assert_close(found["sh0"], dc)
        assert found["scales"].tolist() == [[0, -1, -10]]
        assert found["shN"][0].tolist() == [[0, 0.5, -0.5], [0, 0, 0], [0, 0, 0]]
        w, x, y, z = found["quats"][0].tolist()
        if version < 3:
            assert x == pytest.approx(1, abs=1e-6) and abs(w) < 0.01
        else:  # x is left out; y has the sign bit and no size, z none, w 5/511 of 1/sqrt(2)
            assert (y, z) == (0, 0) and w == pytest.approx(5 / 511 / 2**0.5)
            assert x == pytest.approx(1, abs=1e-4)


def test_a_splat_is_read_as_its_format_says(tmp_path):
    row = struct.pack("<6f", 1, 2, 3, 0.5, 1, 2) + bytes([255, 0, 51, 128, 128, 255, 128, 128])
    (tmp_path / "a.splat").write_bytes(row)
    found = read_gaussians(tmp_path / "a.splat")
    assert found["means"].tolist() == [[1, 2, 3]] and "shN" not in found
    torch.testing.assert_close(found["scales"].exp(), torch.tensor([[0.5, 1, 2]]))
    assert found["quats"][0].tolist() == pytest.approx([0, 127 / 128, 0, 0])
    assert float(found["opacities"].sigmoid()) == pytest.approx(128 / 255, abs=1e-6)


def test_rows_that_are_not_finite_are_left_out_of_every_format(tmp_path, monkeypatch):
    said: list = []
    monkeypatch.setattr("lods.log.warn", said.append)
    made = shell(50).export()
    made["means"][7, 1] = math.nan
    for name in ("a.ply", "a.compressed.ply", "a.splat", "a.spz"):
        assert write_gaussians(tmp_path / name, made) == 49
        assert len(read_gaussians(tmp_path / name)["means"]) == 49
    assert len(said) == 4 and all("1 of 50 Gaussians are not finite" in text for text in said)


def test_a_run_starts_from_any_of_them(tmp_path):
    made = shell(60)
    for name in ("a.ply", "a.compressed.ply", "a.splat", "a.spz"):
        assets.write(tmp_path / name, made)
        begun = Gaussians.file(tmp_path / name)
        near = torch.cdist(begun.means, made.means).amin(1)
        assert begun.count == 60 and near.max() < 0.01
