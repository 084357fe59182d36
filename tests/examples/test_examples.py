"""The numbered examples run, in any folder, and make what they say. (That of the Gaussians alone is
in tests/gaussians.)"""

import importlib.util
import math
import time
from xml.etree import ElementTree

import lods
import pytest
import torch
from PIL import Image

from tests.runs import ROOT

SIZES = {"01_distil": (1024, 256), "02_your": (512, 512), "03_a_method": (1024, 256)}
SIZES["05_compare"] = (256, 512)
LESS = {"05_compare_two_methods": {"prompts": ("a teddy bear",)}}  # of what takes a while


def load(name):
    (file,) = (ROOT / "examples").glob(f"{name}*.py")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names():
    found = [file.stem for file in sorted((ROOT / "examples").glob("*.py"))]
    return [name for name in found if name != "04_gaussians_on_a_cpu"]


@pytest.fixture(scope="module")
def small():
    return lods.models.load("pocket", "cpu")


@pytest.fixture(autouse=True)
def in_a_folder(registered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", names())
def test_an_example_makes_its_picture_and_opens_as_a_notebook(small, tmp_path, monkeypatch, name):
    monkeypatch.setattr(lods.models, "load", lambda *args, **settings: small)
    load(name).main(steps=2, out="folder/picture.png", **LESS.get(name, {}))
    (size,) = (size for start, size in SIZES.items() if name.startswith(start))
    with Image.open(tmp_path / "folder/picture.png") as picture:
        assert picture.size == size and len(picture.getcolors(1 << 20)) > 10
    text = (ROOT / "examples" / f"{name}.py").read_text()
    for cell in text.split("\n# %%")[1:]:  # each is whole: no marker stands within a function
        compile(cell.partition("\n")[2], name, "exec")
    assert "    # %%" not in text


def test_the_triangles_are_drawn_in_their_colours_and_hidden_by_those_before_them():
    triangles = load("02_your").Triangles(2)
    large = torch.tensor([[-3.0, -2.0], [3.0, -2.0], [0.0, 4.0]])
    with torch.no_grad():
        triangles.corners.copy_(torch.stack([0.2 * large.flip(0), large]))  # either way round
        triangles.colors.copy_(torch.tensor([[20.0, -20.0, -20.0], [-20.0, -20.0, 20.0]]))
        triangles.opacities.fill_(20.0)
        picture = triangles(64, sharpness=500.0)[0]
    assert torch.allclose(picture[:, 32, 32], torch.tensor([1.0, 0.0, 0.0]), atol=1e-3)
    assert torch.allclose(picture[:, 60, 32], torch.tensor([0.0, 0.0, 1.0]), atol=1e-3)
    svg = ElementTree.fromstring(triangles.svg())
    assert [shape.get("fill") for shape in svg] == ["rgb(0,0,255)", "rgb(255,0,0)"]


def test_the_method_of_its_own_is_sds_at_one_end_and_csd_at_the_other(small):
    load("03_a_method")
    load("03_a_method")  # as a notebook's cell that is run again
    latents = torch.randn(1, *small.latent_shape)

    def loss(name, **settings):
        method = lods.load(name, small, "a snowman", guidance_scale=5, **settings)
        torch.manual_seed(0)
        return float(method(latents=latents).total)

    assert math.isclose(loss("my-mix", mix=1.0), loss("sds"), rel_tol=1e-4)
    scaled = loss("csd") * 5**2  # the loss is quadratic in the gradient
    assert math.isclose(loss("my-mix", mix=0.0), scaled, rel_tol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_an_example_takes_a_minute_at_most(tmp_path, name):
    start = time.process_time()
    load(name).main(out="picture.png")
    assert time.process_time() - start < 120  # of two cores
    assert (tmp_path / "picture.png").exists()
