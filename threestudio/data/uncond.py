"""``random-camera-datamodule``: endless random cameras to train with, fixed orbits to look at.

Exact resume. A batch is a function of (seed of the run, index of the batch) and of nothing else:
its own ``torch.Generator`` draws it, and the schedules (resolution, progressive views) are those
of the step at which the batch will be *used*, however many batches the loader has prefetched. A
resumed run starts at the number of batches already processed and so sees the batches that the
uninterrupted run would have seen. No loader draws from the global random state.
"""

import bisect
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

import threestudio
from threestudio.data.cameras import camera_batch, sample_cameras
from threestudio.utils.base import Updateable
from threestudio.utils.config import parse_structured
from threestudio.utils.errors import UserError
from threestudio.utils.ops import get_ray_directions
from threestudio.utils.ranges import is_list
from threestudio.utils.typing import *

LIGHT_STRATEGIES = {  # accepted name -> what is sampled
    "dreamfusion": "dreamfusion",
    "magic3d": "magic3d",
    "dreamfusion3dgs": "dreamfusion",  # the name that GaussianDreamer's data module added
}


@dataclass
class RandomCameraDataModuleConfig:
    """Fields and defaults of threestudio 0.2.3. ``height``, ``width`` and ``batch_size`` may be
    lists of L entries; entry i is in use from step ``resolution_milestones[i - 1]``."""

    height: Annotated[Any, "whole each [1, 16384]"] = 64
    width: Annotated[Any, "whole each [1, 16384]"] = 64
    batch_size: Annotated[Any, "whole each [1, 65536]"] = 1
    resolution_milestones: Annotated[List[int], "ordered [1, 1e12]"] = field(default_factory=list)
    eval_height: Annotated[int, "[1, 16384]"] = 512
    eval_width: Annotated[int, "[1, 16384]"] = 512
    eval_batch_size: Annotated[int, "[1, 65536]"] = 1
    n_val_views: Annotated[int, "[1, 100000]"] = 1
    n_test_views: Annotated[int, "[1, 100000]"] = 120
    elevation_range: Annotated[Tuple[float, float], "ordered [-90, 90]"] = (-10, 90)  # degrees
    azimuth_range: Annotated[Tuple[float, float], "ordered [-720, 720]"] = (-180, 180)  # degrees
    camera_distance_range: Annotated[Tuple[float, float], "ordered (0, 1e6]"] = (1, 1.5)
    fovy_range: Annotated[Tuple[float, float], "ordered (0, 180)"] = (40, 70)  # degrees, vertical
    camera_perturb: Annotated[float, "[0, 1e6]"] = 0.1  # uniform in +-value
    center_perturb: Annotated[float, "[0, 1e6]"] = 0.2  # standard deviation
    up_perturb: Annotated[float, "[0, 1e6]"] = 0.02  # standard deviation
    light_position_perturb: Annotated[float, "[0, 1e6]"] = 1.0  # standard deviation
    light_distance_range: Annotated[Tuple[float, float], "ordered (0, 1e6]"] = (0.8, 1.5)
    eval_elevation_deg: Annotated[float, "[-90, 90]"] = 15.0
    eval_camera_distance: Annotated[float, "(0, 1e6]"] = 1.5
    eval_fovy_deg: Annotated[float, "(0, 180)"] = 70.0
    light_sample_strategy: Annotated[str, tuple(LIGHT_STRATEGIES)] = "dreamfusion"
    batch_uniform_azimuth: bool = True
    # views open from the evaluation's front view to the full ranges over this many steps; 0: off
    progressive_until: Annotated[int, "[0, 1e12]"] = 0
    rays_d_normalize: bool = True
    rays: bool = True  # whether batches have rays_o and rays_d, which a rasterizer does not need

    def contradictions(self):
        """See :mod:`threestudio.utils.ranges`."""
        sizes = _sizes(self)
        n, steps = max(len(v) for v in sizes), len(self.resolution_milestones)
        if any(len(v) != n for v in sizes):
            yield "height", "needs the same length as width and batch_size, or one value each"
        if n > 1 and steps != n - 1:
            yield "resolution_milestones", f"needs {n - 1} steps for {n} resolutions, not {steps}"


def _sizes(cfg: RandomCameraDataModuleConfig) -> Tuple[List[int], List[int], List[int]]:
    """``height``, ``width`` and ``batch_size`` of each resolution."""
    sizes = [cfg.height, cfg.width, cfg.batch_size]
    sizes = [list(v) if is_list(v) else [v] for v in sizes]
    # one value is for all resolutions, and one batch size however often it stands there
    n = max(len(v) for v in sizes[:2] + [v for v in sizes[2:] if len(set(v)) > 1])
    return tuple(v[:1] * n if len(set(v)) == 1 else v for v in sizes)


class RandomCameraIterableDataset(IterableDataset, Updateable):
    """Yields ``{}`` for ever; ``collate`` makes the batch (keys: see ``camera_batch``).

    ``batch_index`` is the number of the next batch. It is set by whoever resumes, or read from
    ``position`` whenever an iterator is made: a function giving (batches processed, steps taken,
    batches processed since the last step), which the data module takes from the trainer.

    The schedules of a batch are those of :meth:`step_of` it. Without ``position``, as upstream
    uses the dataset, they are those of the last ``update_step``, once there was one.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg: RandomCameraDataModuleConfig = cfg
        self.heights, self.widths, self.batch_sizes = _sizes(cfg)
        self.resolution_milestones = list(cfg.resolution_milestones)
        if len(self.heights) == 1 and self.resolution_milestones:
            threestudio.warn("data.resolution_milestones has no effect with one resolution")
            self.resolution_milestones = []
        self.directions_unit_focals = [
            get_ray_directions(h, w, focal=1.0) for h, w in zip(self.heights, self.widths)
        ]
        self.camera_distance_range = list(cfg.camera_distance_range)
        self.fovy_range = list(cfg.fovy_range)
        self.seed = torch.initial_seed()
        self.batch_index = 0
        self.batches_per_step = 1  # gradient accumulation
        self.position: Optional[Callable[[], Tuple[int, int, int]]] = None
        self._origin = (0, 0, 0)
        self._told: Optional[int] = None  # the step of the last update_step
        self.update_step(0, 0)
        self._told = None

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set resolution, batch size and view ranges to those of ``global_step``."""
        self._told = global_step
        i = bisect.bisect_right(self.resolution_milestones, global_step)
        self.height, self.width = self.heights[i], self.widths[i]
        self.batch_size = self.batch_sizes[i]
        self.directions_unit_focal = self.directions_unit_focals[i]
        self.progressive_view(global_step)

    def progressive_view(self, global_step: int) -> None:
        """With r = min(1, step / (progressive_until + 1)): elevation within
        ``(1 - r) eval_elevation_deg + r elevation_range``, azimuth within ``r azimuth_range``."""
        until = self.cfg.progressive_until
        r = min(1.0, global_step / (until + 1)) if until > 0 else 1.0
        start = (1 - r) * self.cfg.eval_elevation_deg
        self.elevation_range = [start + r * e for e in self.cfg.elevation_range]
        self.azimuth_range = [r * a for a in self.cfg.azimuth_range]

    def step_of(self, batch_index: int) -> int:
        """The global step at which a batch is used."""
        batches, steps, since_step = self._origin
        return steps + (batch_index - batches + since_step) // self.batches_per_step

    def __iter__(self):
        if self.position is not None:
            self._origin = self.position()
            self.batch_index = self._origin[0]
        while True:
            yield {}

    def collate(self, batch: Any) -> Dict[str, Any]:
        """The next batch."""
        told = None if self.position is not None else self._told
        self.update_step(0, self.step_of(self.batch_index) if told is None else told)
        self._told = told
        state = np.random.SeedSequence([self.seed, self.batch_index]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        cameras = sample_cameras(
            generator,
            self.batch_size,
            elevation_range=self.elevation_range,
            azimuth_range=self.azimuth_range,
            camera_distance_range=self.camera_distance_range,
            fovy_range=self.fovy_range,
            batch_uniform_azimuth=self.cfg.batch_uniform_azimuth,
            camera_perturb=self.cfg.camera_perturb,
            center_perturb=self.cfg.center_perturb,
            up_perturb=self.cfg.up_perturb,
            light_sample_strategy=LIGHT_STRATEGIES[self.cfg.light_sample_strategy],
            light_distance_range=self.cfg.light_distance_range,
            light_position_perturb=self.cfg.light_position_perturb,
        )
        self.batch_index += 1
        return camera_batch(
            **cameras,
            height=self.height,
            width=self.width,
            rays=self.cfg.rays,
            rays_d_normalize=self.cfg.rays_d_normalize,
            directions_unit_focal=self.directions_unit_focal,
        )


class RandomCameraDataset(Dataset):
    """An orbit at ``eval_elevation_deg`` and ``eval_camera_distance``, azimuth from 0.

    ``val``: ``n_val_views`` views over a full turn; ``test``: ``n_test_views``. Both begin at
    azimuth 0 and end one step before it, so that no view comes twice and a video that is played in
    a loop moves evenly. (In threestudio 0.2.3 the last test view is the first again.) The light is
    at the camera.
    """

    def __init__(self, cfg: Any, split: str) -> None:
        super().__init__()
        self.cfg: RandomCameraDataModuleConfig = cfg
        self.split = split
        self.n_views = cfg.n_val_views if split == "val" else cfg.n_test_views
        turn = torch.linspace(0, 360, self.n_views + 1)
        self.azimuth = turn[: self.n_views]
        self.directions_unit_focal = get_ray_directions(cfg.eval_height, cfg.eval_width, focal=1.0)

    def __len__(self) -> int:
        return self.n_views

    def __getitem__(self, index: int) -> Dict[str, Any]:
        azimuth = self.azimuth[index : index + 1]
        if len(azimuth) == 0:
            raise IndexError(index)
        item = camera_batch(
            elevation=torch.full_like(azimuth, self.cfg.eval_elevation_deg),
            azimuth=azimuth,
            camera_distances=torch.full_like(azimuth, self.cfg.eval_camera_distance),
            fovy=torch.deg2rad(torch.full_like(azimuth, self.cfg.eval_fovy_deg)),
            height=self.cfg.eval_height,
            width=self.cfg.eval_width,
            rays=self.cfg.rays,
            rays_d_normalize=self.cfg.rays_d_normalize,
            directions_unit_focal=self.directions_unit_focal,
        )
        item = {k: v[0] if isinstance(v, Tensor) else v for k, v in item.items()}
        return {"index": index, **item}

    def collate(self, batch: List[Dict[str, Any]]) -> Dict[str, Any]:
        """Stacked items; ``index`` (B,) is a tensor, ``height`` and ``width`` stay ints."""
        size = {"height": self.cfg.eval_height, "width": self.cfg.eval_width}
        return {**default_collate(batch), **size}


@threestudio.register("random-camera-datamodule")
class RandomCameraDataModule(pl.LightningDataModule):
    """Loaders over :class:`RandomCameraIterableDataset` and :class:`RandomCameraDataset`."""

    Config = RandomCameraDataModuleConfig
    endless = True  # an epoch of training has no end

    def __init__(self, cfg: Optional[Union[dict, DictConfig]] = None) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, {} if cfg is None else cfg)

    def setup(self, stage: Optional[str] = None) -> None:
        if stage in (None, "fit"):
            self.train_dataset = RandomCameraIterableDataset(self.cfg)
        if stage in (None, "fit", "validate"):
            self.val_dataset = RandomCameraDataset(self.cfg, "val")
        if stage in (None, "test", "predict"):
            self.test_dataset = RandomCameraDataset(self.cfg, "test")

    def prepare_data(self) -> None:
        pass

    def general_loader(
        self, dataset: Any, batch_size: Optional[int], collate_fn: Optional[Callable] = None
    ) -> DataLoader:
        """No workers, so that the dataset can change while it is iterated; a generator of its
        own, because a loader otherwise draws a seed from the global random state."""
        return DataLoader(
            dataset,
            num_workers=0,
            batch_size=batch_size,
            collate_fn=collate_fn,
            generator=torch.Generator(),
        )

    def train_dataloader(self) -> DataLoader:
        if self.trainer is not None:
            self.train_dataset.batches_per_step = self.trainer.accumulate_grad_batches
            self.train_dataset.position = self._position
        return self.general_loader(
            self.train_dataset, batch_size=None, collate_fn=self.train_dataset.collate
        )

    def _position(self) -> Tuple[int, int, int]:
        # 'processed' is raised after the training step and before the hooks that save: unlike
        # 'ready' it does not count a batch whose step was interrupted, unlike 'completed' it
        # counts the batch at whose end the checkpoint is written
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        since_step = progress.current.processed % self.trainer.accumulate_grad_batches
        return progress.total.processed, self.trainer.global_step, since_step

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_dataset)

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_dataset)

    def _eval_loader(self, dataset: RandomCameraDataset) -> DataLoader:
        return self.general_loader(dataset, self.cfg.eval_batch_size, dataset.collate)


@dataclass
class GaussianCameraDataModuleConfig(RandomCameraDataModuleConfig):
    """Defaults of the data module that LODS and GaussianDreamer use for Gaussians."""

    height: Any = 512
    width: Any = 512
    elevation_range: Tuple[float, float] = (-10, 60)
    camera_distance_range: Tuple[float, float] = (4, 6)
    camera_perturb: float = 0.0
    center_perturb: float = 0.0
    up_perturb: float = 0.0
    eval_camera_distance: float = 6.0
    rays: bool = False  # at this size they cost more than everything else in the batch
    # of GaussianDreamer; 1 (avatars from a body mesh) is not supported
    load_type: Annotated[int, "[0, 1]"] = 0


@threestudio.register("random-camera-datamodule-gs")
class GaussianCameraDataModule(RandomCameraDataModule):
    """The same cameras under the name and with the defaults of LODS' data module for Gaussians.

    Its batches also have ``c2w_3dgs``, an alias of ``c2w``. In the original that key describes
    another camera than ``c2w`` does (mirrored, without perturbations); here both are the true one.
    """

    Config = GaussianCameraDataModuleConfig

    def __init__(self, cfg: Optional[Union[dict, DictConfig]] = None) -> None:
        super().__init__(cfg)
        if self.cfg.load_type != 0:
            raise UserError("data.load_type=1 (avatars) is not supported: leave it at 0")

    def general_loader(
        self, dataset: Any, batch_size: Optional[int], collate_fn: Optional[Callable] = None
    ) -> DataLoader:
        def with_alias(items: Any) -> Dict[str, Any]:
            batch = collate_fn(items)
            return {**batch, "c2w_3dgs": batch["c2w"]}

        return super().general_loader(dataset, batch_size, with_alias)
