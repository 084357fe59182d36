"""``lods-multiview-camera-datamodule``: training from several cameras around the object at once, as
multi-view models see it."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from lods.threestudio.data import camera_batch

import threestudio
from threestudio.data.uncond import (
    RandomCameraDataModule,
    RandomCameraDataModuleConfig,
    RandomCameraIterableDataset,
)
from threestudio.utils.config import parse_structured

PERTURBATIONS = ("camera_perturb", "center_perturb", "up_perturb")


@dataclass
class MultiviewCameraDataModuleConfig(RandomCameraDataModuleConfig):
    """Those of ``random-camera-datamodule``, of which ``batch_size`` counts pictures, ``n_view`` of
    each camera that is drawn; the defaults of its ranges are MVDream's (arXiv:2308.16512)."""

    batch_size: Annotated[Any, "whole each [1, 65536]"] = 4
    n_view: Annotated[int, "[1, 64]"] = 4
    # degrees that are added to the azimuth that is drawn, one number for each of n_view cameras;
    # even: those of n_view equal steps around the object
    view_azimuths: Annotated[Any, "list [-720, 720] or even"] = "even"
    # camera_distance_range is in units of 1 / tan(fovy / 2): a ball of radius 1 then looks alike
    # under every field of view
    relative_radius: bool = True
    elevation_range: Annotated[tuple[float, float], "ordered [-90, 90]"] = (0, 30)
    camera_distance_range: Annotated[tuple[float, float], "ordered (0, 1e6]"] = (0.8, 1.0)
    fovy_range: Annotated[tuple[float, float], "ordered (0, 180)"] = (15, 60)
    camera_perturb: Annotated[float, "[0, 1e6]"] = 0.0
    center_perturb: Annotated[float, "[0, 1e6]"] = 0.0
    up_perturb: Annotated[float, "[0, 1e6]"] = 0.0

    def contradictions(self):
        """See the base."""
        base = getattr(super(), "contradictions", None)  # not in upstream's threestudio
        yield from base() if base else ()
        yield from wrong(self)


def wrong(cfg: Any):
    """What cannot be meant: (field, text)."""
    sizes = cfg.batch_size if hasattr(cfg.batch_size, "__len__") else [cfg.batch_size]
    if any(size % cfg.n_view for size in sizes):
        yield (
            "batch_size",
            f"counts pictures, {cfg.n_view} (n_view) of each object: give a multiple of "
            f"{cfg.n_view}",
        )
    given = cfg.view_azimuths
    if not isinstance(given, str) and len(given) != cfg.n_view:
        yield "view_azimuths", f"has {len(given)} numbers for n_view={cfg.n_view} cameras"
    for name in PERTURBATIONS:
        if getattr(cfg, name):
            yield name, "must be 0: views that belong together look at the origin, z up"


class MultiviewCameraIterableDataset(RandomCameraIterableDataset):
    """Of ``batch_size`` / ``n_view`` cameras drawn as by the base, each stands for ``n_view``: at
    its azimuth, and at 360 / ``n_view`` degrees more each, or at ``view_azimuths`` more, with its
    elevation, distance, field of view and light. They are consecutive rows of the batch."""

    def __init__(self, cfg: Any) -> None:
        for field, text in wrong(cfg):
            raise ValueError(f"data.{field} {text}")
        super().__init__(cfg)
        self.batch_sizes = [size // cfg.n_view for size in self.batch_sizes]
        if isinstance(getattr(self, "batch_size", None), int):  # set by the base
            self.batch_size = self.batch_sizes[0]

    def collate(self, batch: Any) -> dict[str, Any]:
        """The next batch, with the base's keys."""
        cfg: Any = self.cfg
        drawn, n = super().collate(batch), cfg.n_view
        fovy, distance = drawn["fovy"], drawn["camera_distances"]
        if cfg.relative_radius:
            distance = distance / torch.tan(0.5 * fovy)
        numbers = [drawn["elevation"], drawn["azimuth"], distance, torch.rad2deg(fovy)]
        cameras = torch.stack(numbers, dim=-1).repeat_interleave(n, dim=0)
        given = cfg.view_azimuths
        even = [360.0 / n * view for view in range(n)]
        turns = cameras.new_tensor(even if isinstance(given, str) else list(given))
        turned = cameras[:, 1] + turns.repeat(len(drawn["azimuth"]))
        cameras[:, 1] = (turned + 180.0) % 360.0 - 180.0
        found = camera_batch(cameras, drawn)
        found["light_positions"] = drawn["light_positions"].repeat_interleave(n, dim=0)
        return {**drawn, **found}


@threestudio.register("lods-multiview-camera-datamodule")
class MultiviewCameraDataModule(RandomCameraDataModule):
    """``random-camera-datamodule`` with :class:`MultiviewCameraIterableDataset` to train with."""

    Config = MultiviewCameraDataModuleConfig

    def __init__(self, cfg: Any = None) -> None:
        pl.LightningDataModule.__init__(self)  # upstream's own would not know the new fields
        self.cfg = parse_structured(MultiviewCameraDataModuleConfig, {} if cfg is None else cfg)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage in (None, "fit"):
            self.train_dataset = MultiviewCameraIterableDataset(self.cfg)
