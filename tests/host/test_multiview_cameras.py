"""``lods-multiview-camera-datamodule``: the views that belong together."""

import pytest
import torch

import threestudio
from tests.runs import ROOT
from threestudio.utils.config import load_config

SMALL = {"height": 8, "width": 6, "batch_size": 8}


def dataset(**more):
    module = threestudio.find("lods-multiview-camera-datamodule")({**SMALL, **more})
    module.setup("fit")
    return module.train_dataset


def batch_of(**more):
    torch.manual_seed(3)
    return dataset(**more).collate(None)


def test_views_are_a_quarter_of_a_turn_apart_and_alike_otherwise():
    batch = batch_of()
    for object_ in range(2):
        rows = slice(4 * object_, 4 * object_ + 4)
        turns = batch["azimuth"][rows].diff() % 360
        torch.testing.assert_close(turns, torch.full((3,), 90.0), atol=1e-3, rtol=0)
        for key in ("elevation", "camera_distances", "fovy", "light_positions"):
            assert (batch[key][rows] == batch[key][rows][:1]).all()
    assert (batch["elevation"][:4] != batch["elevation"][4:]).all()
    assert batch["azimuth"].abs().max() <= 180


def test_views_are_as_far_apart_as_they_are_told_to_be():
    turns = [0, 45, 90, 180, 270, 315]
    told = {"n_view": 6, "view_azimuths": turns, "batch_size": 12, "azimuth_range": [-15, 15]}
    azimuth = batch_of(**told)["azimuth"].reshape(2, 6)
    wanted = torch.tensor(turns, dtype=torch.float32)
    found = (azimuth - azimuth[:, :1]) % 360
    torch.testing.assert_close(found, wanted.expand(2, 6), atol=1e-3, rtol=0)
    assert azimuth[:, 0].abs().max() <= 15 and azimuth[0, 0] != azimuth[1, 0]


def test_cameras_are_of_the_published_ranges():
    batches = [dataset().collate(None) for _ in range(20)]
    elevation, fovy, distance = (
        torch.cat([each[key] for each in batches])
        for key in ("elevation", "fovy", "camera_distances")
    )
    assert elevation.min() >= 0 and elevation.max() <= 30
    assert fovy.rad2deg().min() + 1e-3 >= 15 and fovy.rad2deg().max() <= 60 + 1e-3
    relative = distance * torch.tan(fovy / 2)
    assert relative.min() >= 0.8 - 1e-4 and relative.max() <= 1.0 + 1e-4
    assert dataset(relative_radius=False).collate(None)["camera_distances"].max() <= 1.0


def test_every_azimuth_comes():
    data = dataset(batch_size=16)
    torch.manual_seed(0)
    turns = torch.cat([data.collate(None)["azimuth"] for _ in range(40)]) % 90
    assert torch.histc(turns, 9, 0, 90).min() > 20


def test_matrices_and_rays_are_those_of_the_host(tmp_path):
    batch = batch_of()
    for row in (1, 6):
        e, a, d = (float(batch[key][row]) for key in ("elevation", "azimuth", "camera_distances"))
        f = float(batch["fovy"][row].rad2deg())
        exact = {"elevation_range": [e, e], "azimuth_range": [a, a], "batch_size": 1,
                 "camera_distance_range": [d, d], "fovy_range": [f, f], "camera_perturb": 0.0,
                 "center_perturb": 0.0, "up_perturb": 0.0}  # fmt: skip
        module = threestudio.find("random-camera-datamodule")({**SMALL, **exact})
        module.setup("fit")
        wanted = module.train_dataset.collate(None)
        assert batch.keys() == wanted.keys()
        for key in set(wanted) - {"light_positions", "height", "width"}:
            torch.testing.assert_close(batch[key][row], wanted[key][0], atol=5e-5, rtol=1e-4)


def test_a_batch_has_as_many_pictures_as_it_is_asked_for_at_each_resolution():
    data = dataset(batch_size=[8, 4], height=[8, 16], width=[8, 16], resolution_milestones=[5])
    sizes = []
    for step in (0, 5):
        data.update_step(0, step)
        sizes.append(tuple(data.collate(None)["rays_d"].shape[:3]))
    assert sizes == [(8, 8, 8), (4, 16, 16)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 6}, "batch_size counts pictures, 4 .n_view. of each object"),
        ({"up_perturb": 0.1}, "up_perturb must be 0"),
        ({"view_azimuths": [0, 90]}, "view_azimuths.* has 2 numbers for n_view=4 cameras"),
        (
            {"view_azimuths": "odd"},
            "view_azimuths must be a list .* or even, not 'odd'",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(Exception, match=message):
        dataset(**options)


def test_a_random_background_is_one_for_all_pictures():
    """And the map itself is as it was."""
    kinds = ("lods-shared-environment-map-background", "neural-environment-map-background")
    shared, usual = (
        threestudio.find(kind)({"random_aug": True, "random_aug_prob": 0.5}) for kind in kinds
    )
    usual.load_state_dict(shared.state_dict())
    dirs = torch.nn.functional.normalize(torch.randn(4, 3, 3, 3), dim=-1)
    torch.testing.assert_close(shared.eval()(dirs), usual.eval()(dirs))
    own = shared.eval()(dirs)
    shared.train()
    found = [shared(dirs) for _ in range(40)]
    drawn = [each for each in found if not torch.equal(each, own)]
    assert 5 < len(drawn) < 35
    assert all((each == each[0, 0, 0]).all() for each in drawn)
    assert (drawn[0] != drawn[1]).any() and drawn[0].requires_grad
    assert shared.cfg.random_aug


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.batch_size=[8,6]"], "data.batch_size=.8, 6.: .* sees 4 views of an object at once"),
        (["system.guidance.cameras=words"], "is told their cameras: set system.guidance.cameras="),
        ([], None),
    ],
)
def test_a_run_that_could_not_go_well_ends_before_anything_is_loaded(
    tiny_multiview, words, message
):
    from lods.preflight import check_views

    model = f"system.prompt_processor.pretrained_model_name_or_path={tiny_multiview()}"
    files = [str(ROOT / "configs" / f"{n}.yaml") for n in ("lods-ngp-lora", "mvdream-sd21")]
    words = [*words, model, "system.prompt_processor.prompt=x", "data.n_view=2"]
    cfg = load_config(*files, cli_args=words)
    if message is None:
        assert check_views(cfg) is None
    else:
        with pytest.raises(ValueError, match=message) as error:
            check_views(cfg)
        assert "\n" not in str(error.value)
