import math
import random
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import threestudio
from threestudio.data.uncond import (
    RandomCameraDataModuleConfig,
    RandomCameraDataset,
    RandomCameraIterableDataset,
)
from threestudio.utils.config import parse_structured
from threestudio.utils.misc import get_device, get_rank
from threestudio.utils.ops import (
    get_mvp_matrix,
    get_projection_matrix,
    get_ray_directions,
    get_rays,
)
from threestudio.utils.typing import *


@dataclass
class RingCameraDataModuleConfig(RandomCameraDataModuleConfig):
    n_view: int = 2
    zoom_range: Tuple[float, float] = (1.0, 1.0)


class RingCameraIterableDataset(RandomCameraIterableDataset):
    """n_view cameras on a ring per object; draws from the global random generators."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.zoom_range = self.cfg.zoom_range
        self.step = -1

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False):
        super().update_step(epoch, global_step, on_load_weights)
        self.step = global_step

    def collate(self, batch) -> Dict[str, Any]:
        n, size = self.cfg.n_view, self.batch_size * self.cfg.n_view
        lo, hi = self.elevation_range
        elevation_deg = (torch.rand(self.batch_size) * (hi - lo) + lo).repeat_interleave(n)
        start = random.random() * 360 - 180
        azimuth_deg = start + torch.arange(size) * 360 / n
        lo, hi = self.camera_distance_range
        camera_distances = (torch.rand(self.batch_size) * (hi - lo) + lo).repeat_interleave(n)
        zoom = np.random.uniform(*self.zoom_range)  # noqa: NPY002
        fovy = torch.full((size,), math.radians(self.fovy_range[0])) * zoom

        elevation, azimuth = torch.deg2rad(elevation_deg), torch.deg2rad(azimuth_deg)
        camera_positions = camera_distances[:, None] * torch.stack(
            [
                torch.cos(elevation) * torch.cos(azimuth),
                torch.cos(elevation) * torch.sin(azimuth),
                torch.sin(elevation),
            ],
            dim=-1,
        )
        lookat = F.normalize(-camera_positions, dim=-1)
        up = torch.tensor([0.0, 0.0, 1.0]).expand(size, 3)
        right = F.normalize(torch.cross(lookat, up, dim=-1), dim=-1)
        up = F.normalize(torch.cross(right, lookat, dim=-1), dim=-1)
        c2w3x4 = torch.cat(
            [torch.stack([right, up, -lookat], dim=-1), camera_positions[:, :, None]], dim=-1
        )
        c2w = torch.cat([c2w3x4, torch.zeros_like(c2w3x4[:, :1])], dim=1)
        c2w[:, 3, 3] = 1.0

        directions = get_ray_directions(H=self.height, W=self.width, focal=1.0)
        directions = directions[None].repeat(size, 1, 1, 1)
        focal_length = 0.5 * self.height / torch.tan(0.5 * fovy)
        directions[..., :2] = directions[..., :2] / focal_length[:, None, None, None]
        rays_o, rays_d = get_rays(directions, c2w, keepdim=True)
        proj_mtx = get_projection_matrix(fovy, self.width / self.height, 0.1, 1000.0)
        return {
            "rays_o": rays_o,
            "rays_d": rays_d,
            "mvp_mtx": get_mvp_matrix(c2w, proj_mtx),
            "camera_positions": camera_positions,
            "light_positions": camera_positions,
            "c2w": c2w,
            "elevation": elevation_deg,
            "azimuth": azimuth_deg,
            "camera_distances": camera_distances,
            "height": self.height,
            "width": self.width,
            "fovy": fovy,
            "drawn_at": self.step,
        }


@threestudio.register("ring-camera-datamodule")
class RingCameraDataModule(pl.LightningDataModule):
    cfg: RingCameraDataModuleConfig

    def __init__(self, cfg: Optional[Union[dict, DictConfig]] = None) -> None:
        super().__init__()
        self.cfg = parse_structured(RingCameraDataModuleConfig, cfg)
        threestudio.debug(f"rank {get_rank()} on {get_device()}")

    def setup(self, stage=None) -> None:
        if stage in [None, "fit"]:
            self.train_dataset = RingCameraIterableDataset(self.cfg)
        if stage in [None, "fit", "validate"]:
            self.val_dataset = RandomCameraDataset(self.cfg, "val")
        if stage in [None, "test", "predict"]:
            self.test_dataset = RandomCameraDataset(self.cfg, "test")

    def general_loader(self, dataset, batch_size, collate_fn=None) -> DataLoader:
        return DataLoader(dataset, num_workers=0, batch_size=batch_size, collate_fn=collate_fn)

    def train_dataloader(self) -> DataLoader:
        return self.general_loader(
            self.train_dataset, batch_size=None, collate_fn=self.train_dataset.collate
        )

    def val_dataloader(self) -> DataLoader:
        return self.general_loader(
            self.val_dataset, batch_size=1, collate_fn=self.val_dataset.collate
        )

    def test_dataloader(self) -> DataLoader:
        return self.general_loader(
            self.test_dataset, batch_size=1, collate_fn=self.test_dataset.collate
        )

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()
