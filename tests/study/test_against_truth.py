"""Runs against the true object: what is loaded, from where it is seen, and what is refused."""

import csv

import numpy as np
import pytest
import torch
from lods.gaussians import Gaussians
from lods.models import renders

from evaluation import against_truth
from tests.study.launched import launched_run

SIZE = 24
CAMERAS = np.tile(np.array([15.0, 0.0, 3.6, 40.0], np.float32), (8, 1))
CAMERAS[:, 1] = np.arange(8) * 45


def gaussians():
    """Solid, and different from all sides."""
    made = Gaussians.ball(300, radius=0.6, seed=1, opacity=0.95)
    with torch.no_grad():
        made.sh0[:, 0] = made.means
        made.means[:, 0] *= 1.3
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return launched_run(folder, "a photo of a hamburger", gaussians(), "reference")


@pytest.fixture(scope="module")
def truth(run, tmp_path_factory):
    """True views: those that the run itself renders."""
    _, parts = against_truth.load_run(run)
    rgb, opacity = against_truth.views_of(parts.renderer, CAMERAS, SIZE)
    rgba = torch.cat([rgb, opacity[..., None]], -1).clamp(0, 1)
    folder = tmp_path_factory.mktemp("truth")
    pictures = (rgba * 255).round().byte().numpy()
    renders.write(folder, {("hamburger", None): (CAMERAS, pictures)})
    return folder


def test_a_run_is_compared_from_the_true_cameras(run, truth, tmp_path):
    out = tmp_path / "table.csv"
    assert against_truth.main([str(run), "--truth", str(truth), "--out", str(out)]) == 0
    (row,) = csv.DictReader(out.open())
    assert row["prompt"] == "a photo of a hamburger" and row["turn"] == "0"
    assert float(row["psnr"]) > 50 and float(row["iou"]) > 0.99  # but for 8 bits
    assert row["janus_rate"] == ""  # a hamburger has no front


def test_views_are_what_the_library_renders_from_there(run):
    _, parts = against_truth.load_run(run)
    rgb, opacity = against_truth.views_of(parts.renderer, CAMERAS, SIZE)
    from lods.gaussians import orbit

    images, alphas, _ = gaussians().render(
        orbit(8, 3.6, 15.0), SIZE, SIZE, fovy=40.0, backend="reference"
    )
    torch.testing.assert_close(rgb, images[..., :3].detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(opacity, alphas[..., 0].detach(), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_compared_costs_one_line_and_nothing_finished(run, truth, tmp_path, capsys):
    out = tmp_path / "table.csv"
    words = [str(tmp_path), str(run), "--truth", str(truth), "--out", str(out)]
    assert against_truth.main(words) == 2
    assert len(list(csv.DictReader(out.open()))) == 1
    assert "is no run" in capsys.readouterr().err
    assert against_truth.main([str(run), "--truth", str(truth), "--prompt", "a spaceship"]) == 2
    err = capsys.readouterr().err
    assert "must name exactly one of" in err and err.count("\n") == 1
    assert against_truth.main([str(run), "--truth", str(truth), "--prompt", "a bulldog"]) == 2
    assert "has no bulldog: make the truth anew" in capsys.readouterr().err
