"""The pictures of validation and test, the video and the contact sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lods.threestudio.systems.coverage import Coverage
from PIL import Image
from torch import Tensor

import threestudio
from threestudio.systems.base import BaseLift3DSystem


class Pictures(BaseLift3DSystem):
    """What a system draws of its views. ``configure`` is followed by :meth:`begin_pictures`."""

    coverage: Coverage
    _results: dict[str, str]  # what a result is -> its file

    def begin_pictures(self) -> None:
        self._sheet: dict[int, tuple[float, int, Tensor]] = {}
        self.views = 0  # of a test, where its data tell

    def panels(self, out: dict[str, Any], i: int) -> list[dict[str, Any]]:
        """The cells of the validation picture of image ``i``."""
        return [rgb_cell(out["comp_rgb"][i]), grey_cell(out["opacity"][i, ..., 0], (0, 1))]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        out = self(batch)
        for i, index in enumerate(batch["index"].tolist()):
            self.save_image_grid(
                f"it{self.true_global_step}-{index}.png",
                self.panels(out, i),
                name="validation_step",
                step=self.true_global_step,
            )

    def on_validation_epoch_end(self) -> None:
        pass

    def on_test_epoch_start(self) -> None:
        self._count_views(self.trainer.test_dataloaders)

    def on_predict_epoch_start(self) -> None:
        self._count_views(self.trainer.predict_dataloaders)

    def _count_views(self, loaders) -> None:
        self.views = len(loaders.dataset) if hasattr(loaders, "dataset") else 0

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        out = self(batch)
        self.coverage.see_view(out["opacity"])
        for i, index in enumerate(batch["index"].tolist()):
            image = out["comp_rgb"][i]
            self.save_rgb_image(f"it{self.true_global_step}-test/{index}.png", image)
            self._keep_for_sheet(float(batch["azimuth"][i]), index, image)

    def _keep_for_sheet(self, azimuth: float, index: int, image: Float[Tensor, "H W 3"]) -> None:
        """Keep the frame if it is the nearest so far to one of the sheet's azimuths."""
        for view in range(self.cfg.sheet_views):
            wanted = 360.0 * view / self.cfg.sheet_views
            gap = abs((azimuth - wanted + 180.0) % 360.0 - 180.0)
            if view not in self._sheet or gap < self._sheet[view][0]:
                self._sheet[view] = (gap, index, image.detach().cpu())

    def _remove_frames_from(self, count: int, folder: str) -> None:
        """Those that an earlier test of the same step with more views has left."""
        for path in Path(self.get_save_path(folder)).glob("*.png"):
            if path.stem.isdigit() and int(path.stem) >= count:
                path.unlink(missing_ok=True)

    def _frames_of_sheet(self, folder: str) -> list[Float[Tensor, "H W 3"]]:
        """The pictures of the sheet, each once. Of several processes, which have rendered a part of
        the views each, all have to call this, and all their frames are in ``folder`` afterwards."""
        # with fewer frames than views, each frame stands on the sheet once
        own = {view: frame[:2] for view, frame in self._sheet.items()}
        images = {index: image for _, index, image in self._sheet.values()}
        self._sheet = {}
        ranks = torch.distributed
        if not (ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1):
            return list(images.values())
        found: list[Any] = [None] * ranks.get_world_size()
        ranks.all_gather_object(found, own)
        if self.global_rank != 0:
            return []
        nearest = [
            min(one[view] for one in found if view in one)[1]
            for view in sorted(set().union(*found))
        ]
        path = Path(self.get_save_path(folder))
        missing = [i for i in range(self.views) if not (path / f"{i}.png").exists()]
        if missing:
            threestudio.warn(
                f"{len(missing)} of {self.views} frames are not in {path}: processes on several "
                "machines need a folder that all of them see (exp_root_dir)"
            )
        return [_read(path / f"{i}.png") for i in dict.fromkeys(nearest) if i not in missing]

    def on_test_epoch_end(self) -> None:
        """The video and the contact sheet, written by the first process of the frames of all."""
        name = f"it{self.true_global_step}-test"
        frames = self._frames_of_sheet(name)
        if self.global_rank != 0:
            return
        if self.views:
            self._remove_frames_from(self.views, name)
        self._results["video"] = self.save_img_sequence(
            name,
            name,
            r"(\d+)\.png",
            save_format="mp4",
            fps=self.cfg.video_fps,
            name="test",
            step=self.true_global_step,
        )
        if not frames:
            return
        cells = [rgb_cell(image) for image in frames]
        columns = min(self.cfg.sheet_columns, len(cells))
        blank = rgb_cell(torch.ones_like(cells[0]["img"]))
        cells += [blank] * (-len(cells) % columns)
        self._results["contact sheet"] = self.save_image_grid(
            f"{name}-sheet.png",
            [cells[i : i + columns] for i in range(0, len(cells), columns)],
            name="contact_sheet",
            step=self.true_global_step,
        )


def _read(path: Path) -> Float[Tensor, "H W 3"]:
    with Image.open(path) as file:
        return torch.from_numpy(np.asarray(file.convert("RGB"), np.float32) / 255)


def rgb_cell(image: Float[Tensor, "H W 3"]) -> dict[str, Any]:
    """A colour picture in a grid of ``save_image_grid``."""
    return {"type": "rgb", "img": image, "kwargs": {"data_format": "HWC", "data_range": (0, 1)}}


def grey_cell(
    image: Float[Tensor, "H W"], data_range: tuple[float, float] | None
) -> dict[str, Any]:
    """A grey picture in such a grid; ``data_range`` None: stretched from its minimum to maximum."""
    return {"type": "grayscale", "img": image, "kwargs": {"cmap": None, "data_range": data_range}}
