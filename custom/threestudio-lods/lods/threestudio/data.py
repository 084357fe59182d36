"""``lods-known-camera-datamodule``: training from cameras from which a model has renders."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float
from lods.gaussians.cameras import orbit
from lods.models.cards import resolve
from lods.models.ideal import camera_distances
from lods.models.renders import Renders
from torch import Tensor

import threestudio
from threestudio.data.uncond import (
    RandomCameraDataModule,
    RandomCameraDataModuleConfig,
    RandomCameraIterableDataset,
)
from threestudio.utils.config import parse_structured
from threestudio.utils.ops import (
    get_mvp_matrix,
    get_projection_matrix,
    get_ray_directions,
    get_rays,
)

NEAR, FAR = 0.01, 100.0  # of the projection matrix


@dataclass
class KnownCameraDataModuleConfig(RandomCameraDataModuleConfig):
    """Those of ``random-camera-datamodule``, and the folder of renders (``renders.json``, see
    :mod:`lods.models.renders`)."""

    renders: str = ""


class KnownCameraIterableDataset(RandomCameraIterableDataset):
    """Cameras are drawn as by its base, and each becomes the nearest (by
    :func:`lods.models.ideal.camera_distances`) from which an object was rendered: an ideal denoiser
    with ``ideal_neighbours=1`` then knows each picture exactly. Perturbations have no effect."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        if not cfg.renders:
            raise ValueError("set data.renders to the folder of the renders (with renders.json)")
        objects = Renders.read(resolve(cfg.renders).path).objects
        cameras = np.unique(np.concatenate([each.cameras for each in objects]), axis=0)
        self.known = torch.from_numpy(cameras).double()

    def collate(self, batch: Any) -> dict[str, Any]:
        """The next batch, with the base's keys."""
        drawn = super().collate(batch)
        wanted = torch.stack(
            [
                drawn["elevation"],
                drawn["azimuth"],
                drawn["camera_distances"],
                torch.rad2deg(drawn["fovy"]),
            ],
            dim=-1,
        ).double()
        nearest = [int(camera_distances(camera, self.known).argmin()) for camera in wanted]
        return {**drawn, **camera_batch(self.known[nearest].float(), drawn)}


def camera_batch(cameras: Float[Tensor, "B 4"], drawn: dict[str, Any]) -> dict[str, Any]:
    """What a batch says of cameras (elevation, azimuth, distance, fovy; degrees), with rays if
    ``drawn`` has them. The light is at the camera."""
    elevation, azimuth, distance, fovy = cameras.unbind(-1)
    c2w = torch.cat(
        [
            orbit(1, *numbers)
            for numbers in zip(distance.tolist(), elevation.tolist(), azimuth.tolist())
        ]
    )
    fovy, height, width = torch.deg2rad(fovy), drawn["height"], drawn["width"]
    projection = get_projection_matrix(fovy, width / height, NEAR, FAR)
    found = {
        "elevation": elevation,
        "azimuth": azimuth,
        "camera_distances": distance,
        "fovy": fovy,
        "c2w": c2w,
        "proj_mtx": projection,
        "mvp_mtx": get_mvp_matrix(c2w, projection),
        "camera_positions": c2w[:, :3, 3],
        "light_positions": c2w[:, :3, 3],
    }
    if "rays_d" in drawn:
        directions = get_ray_directions(height, width, focal=1.0).repeat(len(c2w), 1, 1, 1)
        directions[..., :2] *= 2 * torch.tan(0.5 * fovy)[:, None, None, None] / height
        found["rays_o"], found["rays_d"] = get_rays(directions, c2w, keepdim=True)
    return found


@threestudio.register("lods-known-camera-datamodule")
class KnownCameraDataModule(RandomCameraDataModule):
    """``random-camera-datamodule`` with :class:`KnownCameraIterableDataset` to train with."""

    Config = KnownCameraDataModuleConfig

    def __init__(self, cfg: Any = None) -> None:
        pl.LightningDataModule.__init__(self)  # upstream's own would not know the new field
        self.cfg = parse_structured(KnownCameraDataModuleConfig, {} if cfg is None else cfg)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage in (None, "fit"):
            self.train_dataset = KnownCameraIterableDataset(self.cfg)
