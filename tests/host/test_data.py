"""Random cameras: geometry of the cameras, their distribution, schedules and exact resume."""

import math
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn

import threestudio
from tests.runs import ROOT
from threestudio.data.cameras import (
    camera_batch,
    look_at,
    sample_azimuth,
    sample_cameras,
    sample_elevation,
    sample_lights,
    spherical_to_cartesian,
)
from threestudio.data.uncond import RandomCameraIterableDataset
from threestudio.utils.config import load_config
from threestudio.utils.errors import UserError

RANGES = {
    "elevation_range": (-10, 90),
    "azimuth_range": (-180, 180),
    "camera_distance_range": (1.0, 1.5),
    "fovy_range": (40, 70),
}
SMALL = {"height": 8, "width": 8, "eval_height": 6, "eval_width": 4}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def module(**cfg):
    dm = threestudio.find("random-camera-datamodule")({**SMALL, **cfg})
    dm.setup()
    return dm


def assert_orthonormal(c2w):
    rotation = c2w[:, :3, :3]
    eye = torch.eye(3).expand_as(rotation)
    torch.testing.assert_close(rotation.mT @ rotation, eye, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(len(c2w)))
    assert torch.equal(c2w[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(len(c2w), 4))


# --- one camera ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_camera_axes_are_orthonormal_for_any_batch_size(n):
    # a cross product without 'dim' picks the batch axis when n is 3
    cameras = sample_cameras(
        rng(n), n, **RANGES, camera_perturb=0.1, center_perturb=0.2, up_perturb=0.3
    )
    assert_orthonormal(camera_batch(**cameras, height=4, width=4)["c2w"])


def test_perturbed_cameras_see_their_centre_in_the_middle_of_the_image():
    cameras = sample_cameras(
        rng(), 5, **RANGES, camera_perturb=0.1, center_perturb=0.2, up_perturb=0.3
    )
    assert cameras["center"].norm(dim=-1).min() > 0.01
    batch = camera_batch(**cameras, height=4, width=6)
    clip = batch["mvp_mtx"] @ torch.cat([cameras["center"], torch.ones(5, 1)], -1)[..., None]
    torch.testing.assert_close(clip[:, :2, 0], torch.zeros(5, 2), atol=1e-5, rtol=0)
    assert (clip[:, 3, 0] > 0).all()


def test_up_is_up_and_right_is_right():
    # from azimuth 0 (on +x) the world's +y is at the right, z upwards
    batch = camera_batch(*torch.tensor([[0.0], [0.0], [2.0], [1.0]]), height=4, width=4)
    expected = torch.tensor([[0.0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(batch["c2w"][0], expected)


def test_positions_follow_the_angles():
    p = spherical_to_cartesian(*torch.tensor([[0.0, 0, 90, -30], [0, 90, 10, 180], [1, 2, 3, 2]]))
    expected = [[1, 0, 0], [0, 2, 0], [0, 0, 3], [-math.sqrt(3), 0, -1]]
    torch.testing.assert_close(p, torch.tensor(expected), atol=1e-6, rtol=0)


def test_rays_go_through_the_pixels_of_the_projection():
    h, w = 5, 8
    cameras = sample_cameras(rng(1), 3, **RANGES, camera_perturb=0.1, center_perturb=0.2)
    batch = camera_batch(**cameras, height=h, width=w)
    points = batch["rays_o"] + 1.7 * batch["rays_d"]
    clip = torch.einsum(
        "bij,bhwj->bhwi", batch["mvp_mtx"], torch.cat([points, torch.ones(3, h, w, 1)], -1)
    )
    ndc = clip[..., :2] / clip[..., 3:]
    x = (torch.arange(w) + 0.5) / w * 2 - 1
    y = (torch.arange(h) + 0.5) / h * 2 - 1  # image y down
    expected = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).expand(3, h, w, 2)
    torch.testing.assert_close(ndc, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fovy_deg", [20.0, 60.0, 90.0])
def test_fovy_is_the_vertical_angle_in_radians(fovy_deg):
    h = 400
    fovy = torch.tensor([math.radians(fovy_deg)])
    angles = torch.tensor([[10.0], [20.0], [2.0]])
    batch = camera_batch(*angles, fovy, height=h, width=3, rays_d_normalize=False)
    forward = -batch["c2w"][0, :3, 2]
    # unnormalised rays advance by one in depth
    torch.testing.assert_close(batch["rays_d"] @ forward, torch.ones(1, h, 3))
    up = (batch["rays_d"] @ batch["c2w"][0, :3, 1])[0, :, 1]
    edge = up[0] + 0.5 * (up[0] - up[1])  # from the first pixel's centre to the image's edge
    torch.testing.assert_close(torch.atan(edge), fovy[0] / 2, atol=1e-5, rtol=0)
    normalized = camera_batch(*angles, fovy, height=h, width=3)["rays_d"]
    torch.testing.assert_close(normalized.norm(dim=-1), torch.ones(1, h, 3))


@pytest.mark.parametrize("pole", [90.0, -90.0])
def test_the_pole_is_the_limit_of_its_neighbours(pole):
    azimuth = torch.tensor([-170.0, -30.0, 0.0, 45.0, 100.0])
    one = torch.ones(5)

    def c2w(elevation):
        return camera_batch(one * elevation, azimuth, 2 * one, one, height=2, width=2)["c2w"]

    assert_orthonormal(c2w(pole))
    torch.testing.assert_close(c2w(pole), c2w(pole * 0.9999), atol=1e-3, rtol=0)


def test_a_camera_on_the_pole_with_a_perturbed_centre_is_still_orthonormal():
    position = torch.tensor([[0.0, 0.0, 2.0]])
    centre = torch.tensor([[0.3, -0.2, 0.0]])
    up = centre - position  # along the view: no direction from it
    assert_orthonormal(look_at(position, centre, up, torch.tensor([30.0])))


# --- distributions ------------------------------------------------------------------------------


def test_elevation_is_within_its_range_and_half_of_the_batches_are_uniform_in_area():
    low, high = -10.0, 90.0
    area = 0
    for seed in range(60):
        e = sample_elevation(4000, (low, high), rng(seed))
        assert low <= e.min() < low + 1 and high - 3 < e.max() <= high
        degrees = (e - low) / (high - low)
        s = torch.sin(torch.deg2rad(e))
        sine = (s - math.sin(math.radians(low))) / (1 - math.sin(math.radians(low)))
        # Kolmogorov-Smirnov distance to the uniform distribution; 0.03 is 1.9 / sqrt(4000)
        grid = torch.arange(4000) / 4000
        distances = [(torch.sort(u).values - grid).abs().max() for u in (degrees, sine)]
        assert min(distances) < 0.03 < 0.1 < max(distances)
        area += distances[1] < distances[0]
    assert 18 <= area <= 42  # 30 +- 3 standard deviations


def test_elevation_exactly_at_the_pole_is_possible():
    e = sample_elevation(50, (90, 90), rng())
    assert torch.equal(e, torch.full((50,), 90.0))


@pytest.mark.parametrize("n", [1, 3, 8])
def test_stratified_azimuth_has_one_sample_per_bin(n):
    for seed in range(20):
        a = sample_azimuth(n, (-180, 180), rng(seed), stratified=True)
        assert torch.equal(torch.floor((a + 180) / (360 / n)), torch.arange(n).float())


def test_plain_azimuth_is_not_stratified():
    bins = [
        len(torch.unique(torch.floor((sample_azimuth(8, (-180, 180), rng(s)) + 180) / 45)))
        for s in range(20)
    ]
    assert min(bins) < 8


def test_recorded_values_are_the_sampled_ones():
    cameras = sample_cameras(rng(), 2000, **RANGES)
    d, f = cameras["camera_distances"], torch.rad2deg(cameras["fovy"])
    assert 1.0 <= d.min() < 1.01 and 1.49 < d.max() <= 1.5
    assert 40 <= f.min() < 40.1 and 69.9 < f.max() <= 70.001
    expected = spherical_to_cartesian(cameras["elevation"], cameras["azimuth"], d)
    torch.testing.assert_close(cameras["camera_positions"], expected)
    moved = sample_cameras(rng(), 2000, **RANGES, camera_perturb=0.1)["camera_positions"]
    shift = (moved - expected).abs()
    assert shift.max() <= 0.1 + 1e-6 and shift.mean() == pytest.approx(0.05, rel=0.1)


def test_lights():
    n = 3000
    position = sample_cameras(rng(), n, **RANGES)["camera_positions"]
    toward = torch.nn.functional.normalize(position, dim=-1)
    azimuth = torch.zeros(n)

    def lights(strategy, perturb=0.0):
        light = sample_lights(strategy, position, azimuth, (0.8, 1.5), perturb, rng())
        r = light.norm(dim=-1)
        assert r.min() >= 0.8 - 1e-5 and r.max() <= 1.5 + 1e-5
        return (light / r[:, None] * toward).sum(-1)

    torch.testing.assert_close(lights("dreamfusion"), torch.ones(n))
    assert lights("dreamfusion", perturb=1.0).min() < 0
    cosine = lights("magic3d")
    assert cosine.min() >= 0.5 - 1e-5 and cosine.min() < 0.51 and cosine.max() > 0.999
    # the angle above the camera's plane is uniform in 30..90 degrees
    assert torch.rad2deg(torch.asin(cosine.clamp(max=1))).mean() == pytest.approx(60, abs=1.5)


# --- the data module ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_batch_keys_and_shapes(n):
    batch = next(iter(module(batch_size=n, width=5).train_dataloader()))
    shapes = {
        "rays_o": (n, 8, 5, 3),
        "rays_d": (n, 8, 5, 3),
        "mvp_mtx": (n, 4, 4),
        "proj_mtx": (n, 4, 4),
        "c2w": (n, 4, 4),
        "camera_positions": (n, 3),
        "light_positions": (n, 3),
        "elevation": (n,),
        "azimuth": (n,),
        "camera_distances": (n,),
        "fovy": (n,),
    }
    assert {k: tuple(v.shape) for k, v in batch.items() if isinstance(v, torch.Tensor)} == shapes
    assert all(batch[k].dtype == torch.float32 for k in shapes)
    assert (batch["height"], batch["width"]) == (8, 5)


def test_defaults_of_the_two_data_modules():
    nerf = threestudio.find("random-camera-datamodule")({}).cfg
    gs = threestudio.find("random-camera-datamodule-gs")({}).cfg
    assert (nerf.height, nerf.camera_perturb, nerf.eval_camera_distance) == (64, 0.1, 1.5)
    assert list(nerf.elevation_range) == [-10, 90] and list(nerf.camera_distance_range) == [1, 1.5]
    assert (gs.height, gs.camera_perturb, gs.eval_camera_distance) == (512, 0.0, 6.0)
    assert list(gs.elevation_range) == [-10, 60] and list(gs.camera_distance_range) == [4, 6]
    assert gs.n_test_views == nerf.n_test_views == 120


def test_the_gaussian_alias_is_the_true_camera():
    cfg = {**SMALL, "camera_perturb": 0.1, "light_sample_strategy": "dreamfusion3dgs"}
    dm = threestudio.find("random-camera-datamodule-gs")(cfg)
    dm.setup()
    for loader in (dm.train_dataloader(), dm.val_dataloader(), dm.test_dataloader()):
        batch = next(iter(loader))
        assert torch.equal(batch["c2w_3dgs"], batch["c2w"])
        assert "rays_d" not in batch  # a rasterizer does without, unless it is asked for
    dm = threestudio.find("random-camera-datamodule-gs")({**cfg, "rays": True})
    dm.setup()
    assert next(iter(dm.train_dataloader()))["rays_d"].shape == (1, 8, 8, 3)


def test_resolution_and_batch_size_change_at_their_milestones():
    dm = module(
        height=[8, 16, 4], width=[8, 8, 2], batch_size=[1, 2, 3], resolution_milestones=[2, 3]
    )
    batches = iter(dm.train_dataloader())
    shapes = [tuple(next(batches)["rays_d"].shape[:3]) for _ in range(5)]
    assert shapes == [(1, 8, 8), (1, 8, 8), (2, 16, 8), (3, 4, 2), (3, 4, 2)]


def test_progressive_views_open_over_the_given_steps_and_are_off_by_default():
    narrow = iter(module(progressive_until=9, eval_elevation_deg=20.0).train_dataloader())
    batches = [next(narrow) for _ in range(11)]
    assert batches[0]["elevation"].item() == pytest.approx(20)
    assert batches[0]["azimuth"].item() == 0
    for step, batch in enumerate(batches):
        r = min(step / 10, 1)
        assert abs(batch["azimuth"].item()) <= 180 * r + 1e-3
        assert (1 - r) * 20 - 10 * r <= batch["elevation"].item() <= (1 - r) * 20 + 90 * r
    full = module(batch_size=64, progressive_until=0).train_dataloader()
    batch = next(iter(full))
    assert batch["azimuth"].max() > 150 and batch["elevation"].std() > 5


def test_evaluation_views():
    dm = module(n_val_views=4, n_test_views=3, eval_elevation_deg=30, eval_fovy_deg=60)
    val = list(dm.val_dataloader())
    assert [b["azimuth"].item() for b in val] == [0, 90, 180, 270]
    assert [b["index"].item() for b in val] == [0, 1, 2, 3]
    test = list(dm.test_dataloader())
    assert [b["azimuth"].item() for b in test] == [0, 120, 240]
    for batch in val + test:
        assert (batch["height"], batch["width"]) == (6, 4)
        assert batch["rays_d"].shape == (1, 6, 4, 3)
        assert batch["elevation"].item() == 30
        assert batch["fovy"].item() == pytest.approx(math.pi / 3)
        assert torch.equal(batch["light_positions"], batch["camera_positions"])
        assert_orthonormal(batch["c2w"])
    assert len(list(dm.predict_dataloader())) == 3


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 60, 120])
def test_no_evaluation_view_comes_twice_and_a_loop_moves_evenly(n):
    """The step from the last view to the first is the one between any others."""
    dm = module(n_val_views=n, n_test_views=n)
    for loader in (dm.val_dataloader(), dm.test_dataloader(), dm.predict_dataloader()):
        azimuth = torch.tensor([batch["azimuth"].item() for batch in loader])
        assert azimuth[0] == 0 and len(azimuth) == n
        steps = (azimuth.roll(-1) - azimuth) % 360
        torch.testing.assert_close(steps, torch.full((n,), 360.0 / n % 360), atol=1e-3, rtol=0)


def test_one_validation_view_is_the_front():
    assert next(iter(module().val_dataloader()))["azimuth"].item() == 0


def test_eval_batch_size_groups_the_same_views():
    single = list(module(n_test_views=3).test_dataloader())
    grouped = list(module(n_test_views=3, eval_batch_size=2).test_dataloader())
    assert [len(b["index"]) for b in grouped] == [2, 1]
    for key in ("c2w", "rays_d", "mvp_mtx", "index"):
        expected = torch.cat([b[key] for b in single])
        assert torch.equal(torch.cat([b[key] for b in grouped]), expected)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"elevation_range": [50, 10]}, "elevation_range"),
        ({"light_sample_strategy": "sun"}, "light_sample_strategy"),
        ({"height": [8, 16], "width": [8, 16, 32]}, "same length"),
        ({"height": [8, 16], "width": [8, 16], "batch_size": [1, 1]}, "resolution_milestones"),
        ({"n_test_views": 0}, "n_test_views"),
    ],
)
def test_bad_options_are_refused_by_name(cfg, words):
    with pytest.raises(UserError, match=words):
        module(**cfg)


# --- exact resume -------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_index_only():
    torch.manual_seed(3)
    a, b = module(batch_size=2), module(batch_size=2)
    torch.manual_seed(4)
    c = module(batch_size=2)
    first = iter(a.train_dataloader())
    batches = [next(first) for _ in range(4)]
    torch.rand(7)
    np.random.rand(3)  # noqa: NPY002
    b.train_dataset.batch_index = 3
    assert torch.equal(next(iter(b.train_dataloader()))["c2w"], batches[3]["c2w"])
    assert not torch.equal(batches[0]["c2w"], batches[1]["c2w"])
    assert not torch.equal(next(iter(c.train_dataloader()))["c2w"], batches[0]["c2w"])


def test_loaders_leave_the_global_random_state_alone():
    dm = module()
    before = torch.get_rng_state()
    next(iter(dm.train_dataloader()))
    list(dm.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_that_of_the_step_set_by_update_step():
    """As upstream, and a loop of one's own, use the dataset: without a trainer."""
    sizes = {"height": [8, 16], "width": [8, 16], "resolution_milestones": [5]}
    dataset = RandomCameraIterableDataset(module(**sizes, progressive_until=9).cfg)
    assert dataset.collate(None)["height"] == 8
    dataset.update_step(0, 7)
    for _ in range(3):
        assert dataset.collate(None)["height"] == 16
        assert dataset.azimuth_range == pytest.approx([-126.0, 126.0])
    dataset.update_step(0, 2)
    assert dataset.collate(None)["height"] == 8


def test_a_trainers_position_goes_before_a_step_that_was_set():
    dataset = module(height=[8, 16], width=8, resolution_milestones=[5]).train_dataset
    dataset.position = lambda: (6, 6, 0)
    iter(dataset).__next__()
    dataset.update_step(0, 2)  # the batch is prefetched for a later step than the one that runs
    assert dataset.collate(None)["height"] == 16


def test_a_subclass_may_have_schedules_of_its_own():
    class Wider(RandomCameraIterableDataset):
        def update_step(self, epoch, global_step, on_load_weights=False):
            super().update_step(epoch, global_step, on_load_weights)
            self.width = 8 + global_step

    dataset = Wider(module(height=8).cfg)
    assert [dataset.collate(None)["width"] for _ in range(2)] == [8, 9]
    dataset.update_step(0, 4)
    assert [dataset.collate(None)["width"] for _ in range(2)] == [12, 12]


class Recorder(pl.LightningModule):
    """Trains one number and notes what each training step was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch["height"], batch["azimuth"].tolist()))
        return (self.weight - batch["azimuth"].mean()) ** 2

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        # another loader over the same data, made in the middle of training, changes nothing
        self.trainer.datamodule.train_dataloader()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, max_steps, resume=None, **trainer):
    torch.manual_seed(11)
    system = Recorder()
    dm = threestudio.find("random-camera-datamodule")(
        {
            **SMALL,
            "height": [8, 4],
            "width": [8, 4],
            "batch_size": [2, 1],
            "resolution_milestones": [3],
            "progressive_until": 4,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = pl.Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **trainer,
        )
        loop.fit(system, dm, ckpt_path=resume)
    path = str(folder / f"{max_steps}.ckpt")
    loop.save_checkpoint(path)
    return system, path


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("limit", [None, 4])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(tmp_path, accumulate, limit):
    # 'limit' ends an epoch in the middle, where the loader has prefetched a batch too many
    options = {"accumulate_grad_batches": accumulate, "limit_train_batches": limit}
    whole, _ = fit(tmp_path, 6, **options)
    first, path = fit(tmp_path, 3, **options)
    second, _ = fit(tmp_path, 6, resume=path, **options)
    assert len(whole.seen) == 6 * accumulate
    assert first.seen == whole.seen[: 3 * accumulate]
    assert second.seen == whole.seen[3 * accumulate :]
    assert torch.equal(second.weight, whole.weight)
    # the schedule is that of the step, although the loader works one batch ahead
    assert [h for _, h, _ in whole.seen] == [8 if s < 3 else 4 for s, _, _ in whole.seen]
    azimuths = [a for _, _, a in whole.seen]
    assert all(abs(x) <= 180 * min(s / 5, 1) + 1e-3 for s, _, a in whole.seen for x in a)
    assert len({tuple(a) for a in azimuths[accumulate:]}) == 5 * accumulate


class Stop(Exception):
    pass


class StopAfter(pl.Callback):
    """Saves at the end of the batch that is number `at`, as a checkpoint callback does, and breaks
    the run off at the start of the next one."""

    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.at:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.at:
            raise Stop


class StopWithin(pl.Callback):
    """Breaks the run off within the training step of the batch that follows number `at`, and saves
    as it falls."""

    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_before_backward(self, trainer, module, loss):
        if trainer.fit_loop.epoch_loop.batch_idx == self.at:
            raise Stop

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("stop", [StopAfter, StopWithin])
@pytest.mark.parametrize(("at", "accumulate"), [(2, 1), (3, 1), (3, 2)])
def test_resume_in_the_middle(tmp_path, stop, at, accumulate):
    whole, _ = fit(tmp_path, 6, accumulate_grad_batches=accumulate)
    path = str(tmp_path / "middle.ckpt")
    with pytest.raises(Stop):
        fit(tmp_path, 6, accumulate_grad_batches=accumulate, callbacks=[stop(path, at)])
    rest, _ = fit(tmp_path, 6, resume=path, accumulate_grad_batches=accumulate)
    assert rest.seen == whole.seen[at:]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("lods-*.yaml")), ids=lambda p: p.stem
)
@pytest.mark.parametrize(
    "overrides", [[], ["data.batch_size=2"], ["data.width=128", "data.height=128"]], ids=str
)
def test_shipped_configurations_make_data_as_they_are(path, overrides):
    """Without the overlay, and with what docs/memory.md overrides."""
    if "data.width=128" in overrides:
        overrides = [*overrides, "data.resolution_milestones=[]"]
    cfg = load_config(path, cli_args=["system.prompt_processor.prompt=a", *overrides])
    data = threestudio.find(cfg.data_type)(cfg.data)
    data.setup("fit")
    batch = data.train_dataset.collate(None)
    want = OmegaConf.to_container(cfg.data, resolve=True)
    first = [v[0] if isinstance(v, list) else v for v in map(want.get, ("batch_size", "height"))]
    assert [len(batch["c2w"]), batch["height"]] == first


def test_one_value_is_for_all_resolutions():
    data = module(height=[8, 16], width=16, batch_size=3, resolution_milestones=[5])
    dataset = data.train_dataset
    assert dataset.widths == [16, 16] and dataset.batch_sizes == [3, 3]
    assert module(height=8, width=8, batch_size=[2, 2]).train_dataset.batch_sizes == [2]
    assert module(
        height=8, width=8, batch_size=[2, 4], resolution_milestones=[5]
    ).train_dataset.heights == [8, 8]
