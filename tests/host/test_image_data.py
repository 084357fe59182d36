"""``single-image-datamodule``: the picture, its camera and rays, and random cameras beside them."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

import threestudio
from tests.host.test_data import Recorder
from tests.runs import QUIET
from threestudio.utils.errors import UserError


@pytest.fixture
def picture(tmp_path):
    """A 8 x 8 picture: red left of green, see-through above; its depth and normals beside it."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4, 0], rgba[:, 4:, 1] = 255, 255
    rgba[2:, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "toy_rgba.png")
    depth = np.repeat(np.arange(8, dtype=np.uint8)[:, None] * 30, 8, axis=1)
    Image.fromarray(depth).save(tmp_path / "toy_depth.png")
    normal = np.full((8, 8, 3), (0, 128, 255), np.uint8)
    Image.fromarray(normal).save(tmp_path / "toy_normal.png")
    return tmp_path / "toy_rgba.png"


@pytest.fixture
def make(picture):
    def build(**cfg):
        fields = {"height": 4, "width": 4, "image_path": str(picture), "rays_noise_scale": 0.0}
        fields["random_camera"] = {"height": 6, "width": 5, "batch_size": 2, "n_test_views": 3}
        data = threestudio.find("single-image-datamodule")({**fields, **cfg})
        data.setup()
        return data

    return build


def batch_of(data):
    return next(iter(data.train_dataloader()))


def test_the_picture_is_averaged_to_the_size(make):
    batch = batch_of(make())
    assert batch["rgb"].shape == (1, 4, 4, 3) and batch["mask"].dtype == torch.bool
    assert batch["rgb"][0, 1].tolist() == [[1, 0, 0]] * 2 + [[0, 1, 0]] * 2
    assert batch["mask"][0, :, 0, 0].tolist() == [False, True, True, True]
    assert batch["ref_depth"] is None and batch["ref_normal"] is None
    assert make().train_dataset.get_all_images().shape == (1, 4, 4, 3)


def test_depth_and_normals_stand_beside_it(make):
    batch = batch_of(make(requires_depth=True, requires_normal=True))
    assert batch["ref_depth"].shape == (1, 4, 4, 1) and batch["ref_normal"].shape == (1, 4, 4, 3)
    expected = torch.tensor([15.0, 75.0, 135.0, 195.0]) / 255
    torch.testing.assert_close(batch["ref_depth"][0, :, 0, 0], expected)
    torch.testing.assert_close(batch["ref_normal"][0, 0, 0], torch.tensor([0, 128, 255]) / 255)


def test_the_camera_is_the_random_cameras_at_its_angles(make):
    """With the same angles as an evaluation view of the other data module, the same rays."""
    angles = {"default_elevation_deg": 20.0, "default_azimuth_deg": 0.0}
    batch = batch_of(make(**angles, default_camera_distance=1.4, default_fovy_deg=50.0))
    other = threestudio.find("random-camera-datamodule")(
        {
            "eval_height": 4,
            "eval_width": 4,
            "eval_elevation_deg": 20.0,
            "eval_camera_distance": 1.4,
            "eval_fovy_deg": 50.0,
        }
    )
    other.setup()
    view = next(iter(other.val_dataloader()))
    for key in ("rays_o", "rays_d", "c2w", "mvp_mtx", "camera_positions", "light_positions"):
        torch.testing.assert_close(batch[key], view[key])
    assert batch["elevation"].item() == 20 and batch["camera_distances"].item() == pytest.approx(
        1.4
    )
    behind = batch_of(make())["camera_positions"]  # at -180 degrees
    torch.testing.assert_close(behind, torch.tensor([[-1.2, 0.0, 0.0]]), atol=1e-6, rtol=0)


def test_the_noise_of_the_rays_is_one_offset_of_the_seed_alone(make):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    noisy, plain = batch_of(make(rays_noise_scale=0.1)), batch_of(make())
    offset = noisy["rays_o"] - plain["rays_o"]
    assert 0 < offset.abs().max() < 1 and torch.allclose(offset, offset[:, :1, :1], atol=1e-6)
    torch.rand(4)
    assert torch.equal(batch_of(make(rays_noise_scale=0.1))["rays_o"], noisy["rays_o"])
    torch.set_rng_state(state)
    batch_of(make(rays_noise_scale=0.1))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_cameras_come_along_unless_switched_off(make):
    random = batch_of(make())["random_camera"]
    assert random["rays_d"].shape == (2, 6, 5, 3) and random["elevation"].shape == (2,)
    assert "random_camera" not in batch_of(make(use_random_camera=False))
    views = list(make().test_dataloader())
    assert len(views) == 3 and views[0]["rays_d"].shape == (1, 512, 512, 3)


def test_sizes_follow_the_steps(make):
    data = make(height=[4, 8], width=[4, 2], resolution_milestones=[3])
    assert batch_of(data)["rgb"].shape == (1, 4, 4, 3)
    data.train_dataset.update_step(0, 3)
    batch = batch_of(data)
    assert batch["rgb"].shape == batch["rays_d"].shape == (1, 8, 2, 3)
    assert (batch["height"], batch["width"]) == (8, 2)


class Both(Recorder):
    """Trains one number on the picture and the random cameras, and notes the cameras."""

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["random_camera"]["azimuth"].tolist())
        return (batch["rgb"].mean() - self.weight).square()


def test_a_resumed_run_sees_the_cameras_of_a_whole_one(make, tmp_path):
    def fit(steps, resume=None):
        pl.seed_everything(1)
        system, data = Both(), make()
        assert isinstance(system.weight, nn.Parameter)
        trainer = pl.Trainer(max_steps=steps, enable_checkpointing=False, **QUIET)
        trainer.fit(system, datamodule=data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return system.seen

    whole = fit(5)
    assert len({tuple(a) for a in whole}) == 5
    assert fit(2) == whole[:2]
    assert fit(5, resume=tmp_path / "2.ckpt") == whole[2:]


@pytest.mark.parametrize(
    "cfg, text",
    [
        ({"image_path": ""}, "image_path is missing"),
        ({"image_path": "/nowhere_rgba.png"}, "/nowhere_rgba.png is not there"),
        ({"height": [4, 8]}, "as many sizes"),
        ({"height": 0}, "from 1 to 16384"),
        ({"height": "tall"}, "must be a whole number"),
        ({"height": [4, 8], "width": [4, 8]}, "needs 1 steps for 2 sizes"),
        ({"batch_size": 2}, "batch_size must be 1, not 2"),
        ({"use_mixed_camera_config": True}, "not supported"),
        ({"random_camera": {"elevation": 3}}, "has no field 'random_camera.elevation'"),
    ],
)
def test_mistakes_are_one_line(make, cfg, text):
    with pytest.raises(UserError, match=text):
        make(**cfg)


def test_other_pictures_are_one_line(make, tmp_path):
    (tmp_path / "broken_rgba.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken_rgba\.png cannot be read"):
        make(image_path=str(tmp_path / "broken_rgba.png"))
    Image.new("RGB", (3, 3)).save(tmp_path / "plain.png")
    assert batch_of(make(image_path=str(tmp_path / "plain.png")))["mask"].all()
    with pytest.raises(UserError, match=r"_depth\.png beside <name>_rgba\.png"):
        make(image_path=str(tmp_path / "plain.png"), requires_depth=True)
