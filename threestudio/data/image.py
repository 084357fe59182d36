"""``single-image-datamodule``: a picture and the camera that it is from, beside random cameras."""

import bisect
import math
import os
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

import threestudio
from threestudio.data.cameras import camera_batch
from threestudio.data.uncond import (
    RandomCameraDataModule,
    RandomCameraDataModuleConfig,
    RandomCameraDataset,
    RandomCameraIterableDataset,
)
from threestudio.utils.base import Updateable
from threestudio.utils.config import parse_structured
from threestudio.utils.errors import UserError
from threestudio.utils.ops import get_ray_directions, get_rays
from threestudio.utils.ranges import is_list
from threestudio.utils.typing import *

MAX_PIXELS = 2**26  # of a picture that is read; it is made smaller at once
MASK_ABOVE = 0.5  # of the alpha channel


@dataclass
class SingleImageDataModuleConfig:
    """Fields and defaults of threestudio 0.2.3. ``height`` and ``width`` may be lists of L sizes;
    entry i is in use from step ``resolution_milestones[i - 1]``."""

    height: Annotated[Any, "whole each [1, 16384]"] = 96
    width: Annotated[Any, "whole each [1, 16384]"] = 96
    resolution_milestones: Annotated[List[int], "ordered [1, 1e12]"] = field(default_factory=list)
    # the camera of the picture: degrees, and the distance from the origin
    default_elevation_deg: Annotated[float, "[-90, 90]"] = 0.0
    default_azimuth_deg: Annotated[float, "[-720, 720]"] = -180.0
    default_camera_distance: Annotated[float, "(0, 1e6]"] = 1.2
    default_fovy_deg: Annotated[float, "(0, 180)"] = 60.0
    image_path: str = ""  # a picture with an alpha channel, <name>_rgba.png
    use_random_camera: bool = True
    # as of random-camera-datamodule
    random_camera: Annotated[dict, RandomCameraDataModuleConfig] = field(default_factory=dict)
    # deviation of one offset of all origins, and of one of all directions
    rays_noise_scale: Annotated[float, "[0, 1e6]"] = 2e-3
    batch_size: Annotated[int, "[1, 1]"] = 1  # there is one picture
    requires_depth: bool = False  # from <name>_depth.png
    requires_normal: bool = False  # from <name>_normal.png
    rays_d_normalize: bool = True
    use_mixed_camera_config: bool = False


def _read(path: str, mode: str, width: int, height: int) -> Float[Tensor, "1 H W C"]:
    """A picture in 0..1, averaged to the size (bilinear where it has to grow)."""
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"the picture {path} has more than {MAX_PIXELS} pixels")
            if picture.mode.startswith(("I", "F")):  # 16 bits: PIL would cut off, not scale
                values = np.asarray(picture, dtype=np.float32) / 65535
                picture = Image.fromarray((values * 255).round().astype(np.uint8))
            picture = picture.convert(mode)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"the picture {path} is not there (from {os.getcwd()})") from None
    except Exception as error:  # of many kinds, by format
        detail = " ".join(str(error).split())[:160]
        raise UserError(f"the picture {path} cannot be read: {detail}") from None
    smaller = width <= picture.width and height <= picture.height
    picture = picture.resize((width, height), Image.BOX if smaller else Image.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float32).reshape(1, height, width, -1) / 255
    return torch.from_numpy(pixels)


class SingleImageDataBase:
    """The picture at one of its sizes: ``rgb`` (1, H, W, 3), ``mask`` (1, H, W, 1), ``depth``
    (1, H, W, 1) and ``normal`` (1, H, W, 3) or None, and ``rays_o``, ``rays_d`` (1, H, W, 3)."""

    def read(self, cfg: SingleImageDataModuleConfig) -> None:
        """Read what the config names and set the first size."""
        self.image_cfg = cfg
        if not cfg.image_path:
            raise UserError("data.image_path is missing: the path of a picture <name>_rgba.png")
        if cfg.use_mixed_camera_config:
            raise UserError("data.use_mixed_camera_config is not supported: set it to false")
        self.heights, self.widths = (
            list(cfg[name]) if is_list(cfg[name]) else [cfg[name]] for name in ("height", "width")
        )
        if len(self.heights) != len(self.widths):
            raise UserError("data.height and data.width take as many sizes as each other")
        self.image_milestones = list(cfg.resolution_milestones)
        if len(self.image_milestones) != len(self.heights) - 1:
            raise UserError(
                f"data.resolution_milestones needs {len(self.heights) - 1} steps for "
                f"{len(self.heights)} sizes, not {len(self.image_milestones)}"
            )
        angles = (cfg.default_elevation_deg, cfg.default_azimuth_deg, cfg.default_camera_distance)
        self.elevation_deg, self.azimuth_deg, self.camera_distance = (
            torch.tensor([float(value)]) for value in angles
        )
        self.fovy = torch.tensor([math.radians(cfg.default_fovy_deg)])
        self._sizes: Dict[int, Dict[str, Any]] = {}
        self.set_size(0)

    def set_size(self, index: int) -> None:
        """Use the sizes at this index."""
        if index not in self._sizes:
            self._sizes[index] = self._at(self.heights[index], self.widths[index])
        for name, value in self._sizes[index].items():
            setattr(self, name, value)

    def _at(self, height: int, width: int) -> Dict[str, Any]:
        cfg = self.image_cfg
        rgba = _read(cfg.image_path, "RGBA", width, height)
        camera = camera_batch(
            elevation=self.elevation_deg,
            azimuth=self.azimuth_deg,
            camera_distances=self.camera_distance,
            fovy=self.fovy,
            height=height,
            width=width,
            rays=False,
        )
        directions = get_ray_directions(height, width, focal=1.0)[None].clone()
        directions[..., :2] /= 0.5 * height / torch.tan(0.5 * self.fovy)
        with torch.random.fork_rng(devices=[]):  # whatever else is drawn, and however often
            torch.manual_seed(torch.initial_seed())
            rays_o, rays_d = get_rays(
                directions,
                camera["c2w"],
                keepdim=True,
                noise_scale=cfg.rays_noise_scale,
                normalize=cfg.rays_d_normalize,
            )
        return {
            "image_camera": camera,
            "rgb": rgba[..., :3].contiguous(),
            "mask": rgba[..., 3:] > MASK_ABOVE,
            "depth": self._beside("depth", "L", width, height) if cfg.requires_depth else None,
            "normal": self._beside("normal", "RGB", width, height) if cfg.requires_normal else None,
            "rays_o": rays_o,
            "rays_d": rays_d,
        }

    def _beside(self, what: str, mode: str, width: int, height: int) -> Float[Tensor, "1 H W C"]:
        path, end = self.image_cfg.image_path, "_rgba.png"
        if not path.endswith(end):
            raise UserError(
                f"data.requires_{what} reads <name>_{what}.png beside <name>{end}, but "
                f"data.image_path is {path}"
            )
        return _read(path.removesuffix(end) + f"_{what}.png", mode, width, height)

    def get_all_images(self) -> Float[Tensor, "1 H W 3"]:
        """The picture at its size now."""
        return self.rgb


class SingleImageIterableDataset(IterableDataset, SingleImageDataBase, Updateable):
    """For ever the picture with its camera, under ``random_camera`` a batch of random cameras."""

    def __init__(self, cfg: Any, split: str) -> None:
        super().__init__()
        self.cfg, self.split = cfg, split
        self.read(cfg)
        self.random_pose_generator = RandomCameraIterableDataset(_random_camera(cfg))

    def position_from(self, data: RandomCameraDataModule, batches_per_step: int) -> None:
        """Let the random cameras be those of the trainer's batch (see
        :class:`RandomCameraIterableDataset`)."""
        self.random_pose_generator.position = data._position
        self.random_pose_generator.batches_per_step = batches_per_step

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set the sizes to those of ``global_step``."""
        self.set_size(bisect.bisect_right(self.image_milestones, global_step))
        self.random_pose_generator.update_step(epoch, global_step, on_load_weights)

    def __iter__(self):
        return iter(self.random_pose_generator)

    def collate(self, batch: Any) -> Dict[str, Any]:
        """``rgb``, ``mask``, ``ref_depth``, ``ref_normal`` (None where not required), the camera as
        of ``camera_batch``, and ``random_camera`` unless that is switched off."""
        made = {
            **self.image_camera,
            "rays_o": self.rays_o,
            "rays_d": self.rays_d,
            "rgb": self.rgb,
            "mask": self.mask,
            "ref_depth": self.depth,
            "ref_normal": self.normal,
        }
        if self.cfg.use_random_camera:
            made["random_camera"] = self.random_pose_generator.collate(None)
        return made


class SingleImageDataset(RandomCameraDataset, SingleImageDataBase):
    """The fixed orbits of ``random_camera``, and the picture."""

    def __init__(self, cfg: Any, split: str) -> None:
        super().__init__(_random_camera(cfg), split)
        self.read(cfg)


def _random_camera(cfg: SingleImageDataModuleConfig) -> RandomCameraDataModuleConfig:
    return parse_structured(RandomCameraDataModuleConfig, cfg.random_camera)


@threestudio.register("single-image-datamodule")
class SingleImageDataModule(RandomCameraDataModule):
    """Loaders over :class:`SingleImageIterableDataset` and :class:`SingleImageDataset`."""

    Config = SingleImageDataModuleConfig

    def setup(self, stage: Optional[str] = None) -> None:
        if stage in (None, "fit"):
            self.train_dataset = SingleImageIterableDataset(self.cfg, "train")
        if stage in (None, "fit", "validate"):
            self.val_dataset = SingleImageDataset(self.cfg, "val")
        if stage in (None, "test", "predict"):
            self.test_dataset = SingleImageDataset(self.cfg, "test")

    def train_dataloader(self):
        if self.trainer is not None:
            self.train_dataset.position_from(self, self.trainer.accumulate_grad_batches)
        return self.general_loader(self.train_dataset, None, self.train_dataset.collate)

    def _eval_loader(self, dataset: SingleImageDataset):
        return self.general_loader(dataset, dataset.cfg.eval_batch_size, dataset.collate)
