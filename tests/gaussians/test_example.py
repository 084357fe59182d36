"""The example of the Gaussians; a few steps of it."""

import importlib.util

import pytest
from PIL import Image

from tests.runs import ROOT


@pytest.mark.slow
def test_the_example_without_a_host_writes_its_files(tmp_path):
    path = ROOT / "examples" / "04_gaussians_on_a_cpu.py"
    spec = importlib.util.spec_from_file_location("example_of_gaussians", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before = example.main(steps=1, folder=tmp_path / "before")
    after = example.main(steps=40, folder=tmp_path / "after")
    assert 0 < after < 0.7 * before
    for ending in ("png", "ply", "glb"):
        assert (tmp_path / "after" / f"knot.{ending}").stat().st_size > 10_000
    assert Image.open(tmp_path / "after" / "knot.png").size == (3 * 192, 2 * 192)
