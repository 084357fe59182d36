"""The cpu backend before it has compiled: the reference, one tile after the other."""

import pytest
import torch
from lods.gaussians import backends, rasterization
from lods.gaussians.backends import cpu, kernels, tiles

from tests.gaussians.scenes import make_scene


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """No compiled kernel is found."""
    monkeypatch.setattr(cpu, "is_compiled", lambda: False)


def scene():
    return make_scene(3, cameras=2, width=37, height=21)


def test_it_draws_what_the_reference_draws():
    g = scene()
    arguments = {**g, "render_mode": "RGB+ED"}
    expected = rasterization(**arguments, backend="reference")
    with backends.uncompiled():
        found = rasterization(**arguments, backend="cpu")
    assert expected[1].max() > 0.5
    for a, b in zip(found[:2], expected[:2]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (found[2]["radii"] == expected[2]["radii"]).all()


def test_cpu_is_without_kernels_where_they_would_have_to_be_compiled_only(monkeypatch):
    with backends.uncompiled():
        assert backends.get("cpu") is tiles
        monkeypatch.setattr(cpu, "is_compiled", lambda: True)
        assert backends.get("cpu") is cpu
    assert backends.get("cpu") is cpu


def test_the_cpu_backend_knows_whether_its_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert not cpu.is_compiled()
    asked = []
    monkeypatch.setattr(
        kernels.blend._cache.__class__, "holds", lambda cache, _: asked.append(cache) or True
    )
    assert cpu.is_compiled()
    assert kernels.blend._cache in asked and cpu.project_forward._cache in asked


def test_a_picture_of_very_many_pairs_is_left_to_the_kernels(monkeypatch):
    monkeypatch.setattr(tiles, "MOST_PAIRS", 1.0)
    monkeypatch.setattr(cpu, "composite", lambda *args: 1 / 0)
    with backends.uncompiled(), pytest.raises(ZeroDivisionError):
        rasterization(**scene(), backend="cpu")
