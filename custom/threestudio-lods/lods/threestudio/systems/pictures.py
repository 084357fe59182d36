"""The pictures of validation and test, the video and the contact sheet."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lods.threestudio.systems.coverage import Coverage
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import threestudio
from threestudio.systems.base import BaseLift3DSystem


class Pictures(BaseLift3DSystem):
    """What a system draws of its views. ``configure`` is followed by :meth:`begin_pictures`."""

    coverage: Coverage
    _results: dict[str, str]  # what a result is -> its file

    def begin_pictures(self) -> None:
        self._sheet: dict[int, tuple[float, int, Tensor]] = {}
        self.views = 0  # of a test, where its data tell
        self._drawn_at = -1  # the step of the last validation or early preview

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
        self._drawn_at = self.true_global_step

    def on_train_batch_start(self, batch: Any, batch_idx: int, unused: int = 0) -> None:
        """Draw the early previews too: here the schedules are those of this step, and nothing of
        it has been computed."""
        super().on_train_batch_start(batch, batch_idx, unused)
        step = self.true_global_step
        if step in self.cfg.early_previews and step != self._drawn_at:
            self._drawn_at = step
            self._draw_preview()

    def _draw_preview(self) -> None:
        """The pictures of a validation, drawn by the first process between two training steps,
        which see nothing of it; none in a training that has no validations."""
        loader = self.trainer.val_dataloaders
        if not isinstance(loader, DataLoader) or self.global_rank != 0:
            return
        data, size = loader.dataset, loader.batch_size or 1
        parts = (self.geometry, self.material, self.background, self.renderer)
        with torch.no_grad(), _undisturbed_random_streams(self.device), _evaluating(parts):
            for first in range(0, len(data), size):
                rows = [data[i] for i in range(first, min(first + size, len(data)))]
                batch = self.trainer.strategy.batch_to_device(loader.collate_fn(rows))
                self.preprocess_data(batch, "validation")
                with self.trainer.precision_plugin.val_step_context():
                    self.validation_step(batch, first // size)

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


@contextlib.contextmanager
def _undisturbed_random_streams(device: torch.device) -> Iterator[None]:
    """Within this, what is drawn from Python's, numpy's or torch's random state is put back."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


@contextlib.contextmanager
def _evaluating(parts: tuple[torch.nn.Module, ...]) -> Iterator[None]:
    """Within this, the modules are in evaluation mode; afterwards each is as it was."""
    before = {module: module.training for part in parts for module in part.modules()}
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for part in parts:  # some change more than the flag in train()
            part.train(before[part])
        for module, training in before.items():
            module.training = training


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
