"""Damaged mesh and ply files of others: one line in words, and no colour that is none."""

import io

import numpy as np
import pytest
from lods.gaussians.initialize import FileInit
from lods.gaussians.mesh_parts import Picture
from PIL import Image

TRIANGLE = "v 0 0 0 {0} 0 0\nv 1 0 0 {0} 0 0\nv 0 1 0 {0} 0 0\nf 1 2 {1}\n"
POINTS = "ply\nformat ascii 1.0\n{}end_header\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n"
FOO = "element foo 4\nproperty float x\nproperty float y\nproperty float z\n"
GLTF = '{{"asset":{{"version":"2.0"}},"nodes":[{{"mesh":0}}],"meshes":{}}}'


@pytest.fixture
def load():
    """``load(path)``: the points of a file."""
    return lambda path: FileInit(str(path), n_points=10).load(np.random.default_rng(0))


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.gltf", GLTF.format("[{}]"), "it is damaged, or refers to what it does not hold"),
        ("a.gltf", GLTF.format("5"), "it is damaged, or refers to what it does not hold"),
        ("a.obj", TRIANGLE.format(0, 9), "it is damaged, or refers to what it does not hold"),
        ("a.ply", POINTS.format(FOO), "it has no element or type 'vertex'"),
        ("a.ply", POINTS.format("property float x\n"), "its header is damaged"),
    ],
)
def test_a_damaged_file_is_told_in_words(load, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_colours_that_are_not_finite_are_grey_and_said(load, tmp_path, monkeypatch):
    said: list = []
    monkeypatch.setattr("lods.log.warn", said.append)
    (tmp_path / "a.obj").write_text(TRIANGLE.format("nan", 3))
    assert (load(tmp_path / "a.obj").rgb == 0.5).all()
    assert len(said) == 1 and "are not finite in places" in said[0]
    (tmp_path / "a.obj").write_text(TRIANGLE.format("1", 3))
    assert (load(tmp_path / "a.obj").rgb == [1, 0, 0]).all() and len(said) == 1


def test_a_grey_picture_of_16_bits_is_scaled_and_not_clipped():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 32896], [257, 65535]], np.uint16)).save(file, "png")
    pixels = Picture(file.getvalue()).pixels()
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 2, 3)
    assert (pixels[..., 0] == [[0, 128], [1, 255]]).all()


def test_a_picture_that_is_none_is_told_without_an_address():
    with pytest.raises(ValueError, match=r"cannot be read \(of no known format\)"):
        Picture(b"no picture")
