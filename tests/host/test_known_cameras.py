"""``lods-known-camera-datamodule``: training from the cameras of renders."""

import numpy as np
import pytest
import torch
from lods.models import renders

import threestudio
from threestudio.utils.config import parse_structured

KNOWN = [[0, 0, 3.6, 40], [20, 90, 3.3, 38], [40, 180, 3.9, 42], [10, -90, 3.5, 44]]
SMALL = {"height": 8, "width": 6, "batch_size": 3, "camera_perturb": 0.0, "center_perturb": 0.0,
         "up_perturb": 0.0, "camera_distance_range": [3.2, 4.0], "fovy_range": [36, 44],
         "elevation_range": [-10, 45]}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rgba = np.full((len(KNOWN), 4, 4, 4), 255, np.uint8)
    renders.write(tmp_path, {("ball", None): (KNOWN, rgba)})
    return str(tmp_path)


def dataset(folder, kind="lods-known-camera-datamodule", **more):
    given = {"renders": folder} if kind.startswith("lods") else {}
    module = threestudio.find(kind)({**SMALL, **given, **more})
    module.setup("fit")
    return module.train_dataset


def numbers(batch):
    return torch.stack(
        [batch["elevation"], batch["azimuth"], batch["camera_distances"], batch["fovy"].rad2deg()],
        dim=-1,
    )


def test_each_drawn_camera_becomes_the_nearest_known_one(folder):
    torch.manual_seed(3)
    known, random = dataset(folder), dataset(folder, "random-camera-datamodule")
    for _ in range(4):
        here, drawn = known.collate(None), random.collate(None)
        for found, wanted in zip(numbers(here), numbers(drawn)):
            place = int((torch.tensor(KNOWN) - found).abs().sum(1).argmin())
            torch.testing.assert_close(found, torch.tensor(KNOWN[place], dtype=torch.float32))
            # the known azimuths are a quarter of a turn apart, and nothing else is as far
            away = (torch.tensor(KNOWN)[:, 1] - wanted[1] + 180) % 360 - 180
            assert place == int(away.abs().argmin()) or away.abs().sort().values[:2].diff() < 25


def test_a_batch_is_what_the_host_makes_of_these_cameras(folder):
    moved = dataset(folder).collate(None)
    for row, (e, a, d, f) in enumerate(numbers(moved).tolist()):
        # drawn by the host from ranges without any width
        exact = {"elevation_range": [e, e], "azimuth_range": [a, a], "batch_size": 1,
                 "camera_distance_range": [d, d], "fovy_range": [f, f]}  # fmt: skip
        wanted = dataset(folder, "random-camera-datamodule", **exact).collate(None)
        assert moved.keys() == wanted.keys()
        for key in set(wanted) - {"light_positions", "height", "width"}:
            torch.testing.assert_close(moved[key][row], wanted[key][0], atol=2e-5, rtol=1e-5)


def test_a_resumed_run_sees_the_cameras_that_it_would_have_seen(folder):
    torch.manual_seed(5)
    through = dataset(folder)
    batches = [numbers(through.collate(None)) for _ in range(3)]
    torch.manual_seed(5)
    resumed = dataset(folder)
    resumed.batch_index = 2
    assert torch.equal(numbers(resumed.collate(None)), batches[2])


def test_without_renders_it_says_what_is_missing(tmp_path):
    for given in ("", str(tmp_path)):
        with pytest.raises(ValueError, match="renders"):
            dataset(given)
    with pytest.raises(Exception, match="renderz"):
        parse_structured(threestudio.find("lods-known-camera-datamodule").Config, {"renderz": 1})
