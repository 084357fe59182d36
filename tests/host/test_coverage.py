"""A run in which nothing of the object can be seen says so, and ends."""

import importlib

import pytest
import torch

from tests.runs import ROOT, fit, small_run

EMPTY, SHOWN = torch.zeros(2, 4, 4, 1), torch.zeros(2, 4, 4, 1)
SHOWN[1, 2, 3] = 0.01


@pytest.fixture
def module(lods):
    return importlib.import_module("lods.threestudio.systems.coverage")


@pytest.fixture
def said(module, monkeypatch):
    lines = []
    monkeypatch.setattr(module.threestudio, "warn", lines.append)
    return lines


def test_it_warns_once_and_stops_after_a_hundred_batches(module, said):
    coverage = module.Coverage()
    for _ in range(24):
        coverage.see(EMPTY)
    assert not said
    for _ in range(75):
        coverage.see(EMPTY)
    [line] = said
    assert line.startswith("nothing of the object was visible in the last 25 batches")
    assert "data.camera_distance_range" in line and "near_plane" in line and "\n" not in line
    with pytest.raises(ValueError, match=r"in the last 100 batches .* not trained: look at"):
        coverage.see(EMPTY)


def test_one_visible_pixel_is_enough(module, said):
    coverage = module.Coverage()
    for i in range(400):
        coverage.see(SHOWN if i % 90 == 3 else EMPTY)
    coverage.finish()
    assert len(said) > 1, "it warns again after the object was seen in between"


def test_the_end_of_a_short_training_without_any_is_an_error(module):
    coverage = module.Coverage()
    coverage.finish()  # nothing was trained, and nothing is wrong
    for _ in range(3):
        coverage.see(EMPTY)
    with pytest.raises(ValueError, match="visible in the last 3 batches"):
        coverage.finish()
    coverage.finish(everywhere=lambda here: False)  # another process has seen it
    coverage.see(SHOWN)
    coverage.finish()


def test_a_process_does_not_stop_alone(module, said):
    coverage = module.Coverage()
    asked = []
    for _ in range(120):
        coverage.see(EMPTY, lambda here: bool(asked.append(here)))
    assert not said and asked == [False, True] * 3 + [True, True]


def test_an_empty_test_is_told(module, said):
    coverage = module.Coverage()
    coverage.finish_views()
    coverage.see_view(EMPTY), coverage.see_view(SHOWN), coverage.finish_views()
    assert not said
    coverage.see_view(EMPTY), coverage.finish_views()
    assert len(said) == 1 and "data.eval_camera_distance" in said[0]


def test_a_training_without_a_visible_object_fails(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [str(ROOT / f"configs/{name}.yaml") for name in ("lods-gs-embedding", "pocket-shapes")]
    more = ["system.geometry.ball.n_points=50", "system.renderer.far_plane=0.5"]
    with pytest.raises(ValueError, match="nothing of the object was visible in the last 2 batches"):
        fit(files, [*small_run(tiny_sd()), *more])
