"""Rasterisers that others bring: registered by a program, or announced by an installed package."""

import sys
from types import SimpleNamespace

import pytest
import torch
from lods.gaussians import backend_names, backends, rasterization, register_backend
from lods.threestudio.renderer import GaussianRasterizer

import threestudio
from tests.gaussians.clouds import cameras, made
from tests.gaussians.scenes import make_scene


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(backends, "_registered", {})
    backends.announce.cache_clear()


def painting(color, **more):
    """A backend that paints everything in one colour."""
    calls = []

    def draw(means, viewmats, width, height, **rest):
        calls.append(rest)
        shape = (len(viewmats), height, width)
        image = means.new_tensor(color).expand(*shape, len(color))
        return image, torch.ones(*shape, 1), {"means2d": means[None, :, :2]}

    return SimpleNamespace(rasterization=draw, calls=calls, **more)


def scene():
    given = make_scene(0, n=5, cameras=2)
    return {k: v.float() if torch.is_tensor(v) else v for k, v in given.items()}


def test_a_registered_rasteriser_draws():
    backend = painting([0.1, 0.2, 0.3])
    register_backend("mine", backend)
    image, alpha, info = rasterization(**scene(), backend="mine", radius_clip=2.0)
    assert image.shape == (2, 21, 37, 3)
    assert torch.equal(image[1, 3, 4], torch.tensor([0.1, 0.2, 0.3]))
    assert (alpha == 1).all() and info["eps2d"] == 0.3
    [rest] = backend.calls
    assert rest["radius_clip"] == 2.0 and rest["sh_degree"] is None and "backend" not in rest
    assert "mine" in backend_names()


def test_it_is_a_value_of_a_configuration():
    register_backend("mine", painting([0.5, 0.5, 0.5, 2.0]))
    geometry = made([[0.0, 0, 0]] * 4, [[0.1] * 3] * 4, [0.5] * 4, [[0.5] * 3] * 4)
    background = threestudio.find("solid-color-background")({})
    material = threestudio.find("no-material")({"n_output_dims": 0})
    parts = {"geometry": geometry, "material": material, "background": background}
    out = GaussianRasterizer({"backend": "mine"}, **parts)(**cameras([0.0], size=8))
    assert (out["comp_rgb"] == 0.5).all() and (out["depth"] == 2).all()
    with pytest.raises(ValueError, match=r"backend must be one of auto.*mine, not 'mime'") as e:
        GaussianRasterizer({"backend": "mime"}, **parts)
    assert "\n" not in str(e.value) and "did you mean 'mine'" in str(e.value)


def test_what_it_cannot_do_is_said_in_its_words():
    why = {"missing": "", "refuses": ""}
    register_backend(
        "mine",
        painting([0.0], missing=lambda: why["missing"], refuses=lambda width, **_: why["refuses"]),
    )
    rasterization(**scene(), backend="mine")
    why["refuses"] = "37 pixels are too many"
    with pytest.raises(ValueError, match="'mine' is not usable: 37 pixels are too many"):
        rasterization(**scene(), backend="mine")
    why["missing"] = "buy a card"
    with pytest.raises(ValueError, match="'mine' is not usable: buy a card"):
        rasterization(**scene(), backend="mine")


def test_names_of_ours_are_not_given_away():
    for name in ("auto", "cpu", "torch", "gsplat"):
        with pytest.raises(ValueError, match=f"{name!r} is this library's"):
            register_backend(name, painting([0.0]))
    with pytest.raises(TypeError, match="has no function 'rasterization'"):
        register_backend("mine", SimpleNamespace())
    assert not backends._registered


# --- packages -------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(code)``: an installed package with that module, which announces it as 'theirs'."""

    def install(code):
        (tmp_path / "a_rasteriser_of_others.py").write_text(code)
        about = tmp_path / "a_rasteriser_of_others-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(
            "[lods.rasterizers]\ntheirs = a_rasteriser_of_others\ncpu = a_rasteriser_of_others\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "a_rasteriser_of_others", raising=False)

    return install


CODE = """
import torch

def rasterization(means, viewmats, width, height, **rest):
    shape = (len(viewmats), height, width, 1)
    return torch.full(shape, 7.0), torch.ones(shape), {}
"""


def test_an_installed_package_brings_a_rasteriser(package):
    assert "theirs" not in backend_names()
    package(CODE)
    assert "theirs" in backend_names() and backends.is_known("theirs")
    image, _, _ = rasterization(**scene(), backend="theirs")
    assert (image == 7).all()


def test_an_installed_package_takes_no_name_of_ours(package):
    package(CODE)
    image, _, _ = rasterization(**scene(), backend="cpu")
    assert image.shape[-1] == 3 and backend_names().count("cpu") == 1


def test_a_package_that_cannot_be_loaded_is_one_line(package):
    package("import a_module_that_is_not_there\n")
    assert "theirs" in backend_names()  # nothing is loaded for that
    with pytest.raises(ValueError, match=r"'theirs' \(a_rasteriser_of_others\) cannot be") as error:
        rasterization(**scene(), backend="theirs")
    assert "a_module_that_is_not_there" in str(error.value) and "\n" not in str(error.value)
