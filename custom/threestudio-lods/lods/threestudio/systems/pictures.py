"""The pictures of validation and test, the video and the contact sheet."""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lods.gaussians.backends import uncompiled
from lods.threestudio.systems.coverage import Coverage
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import threestudio
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.misc import get_device


class Pictures(BaseLift3DSystem):
    """What a system draws of its views. ``configure`` is followed by :meth:`begin_pictures`."""

    coverage: Coverage
    _results: dict[str, str]  # what a result is -> its file

    def begin_pictures(self) -> None:
        self._sheet: dict[int, tuple[float, int, Tensor]] = {}
        self.views = 0  # of a test, where its data tell
        self._drawn_at = -1  # the step of the last validation or early preview
        self._drawn_of: list[tuple[int, int]] = []  # see _versions, of the first picture

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
        if step not in self.cfg.early_previews or step == self._drawn_at:
            return
        self._drawn_at = step
        if step == 0 and self._drawn_of and self._drawn_of == self._versions():
            return  # the first picture shows what there is
        self._draw_preview()

    @property
    def _parts(self) -> tuple[torch.nn.Module, ...]:
        return (self.background, self.geometry, self.material, self.renderer)

    def _versions(self) -> list[tuple[int, int]]:
        """What is another list once a parameter of the object was replaced, or changed in place."""
        found = [p for part in self._parts for p in part.parameters()]
        return [(id(p), p._version) for p in found]

    def draw_first_picture(self, make_loader: Callable[[], DataLoader]) -> list[str]:
        """The first pictures of a validation at step 0, drawn where the object is built and nothing
        else is; their paths. ``make_loader()`` gives the views, of which the first batch is drawn:
        further ones can wait. None are, and the list is empty, if step 0 is not one of
        ``early_previews``, or if the object is not yet what it will start as. Everything is left
        as it was: the random states, the modules' modes and buffers.
        """
        if 0 not in self.cfg.early_previews or self.cfg.weights is not None:
            return []
        parts, device = self._parts, get_device()
        with (
            torch.no_grad(),
            _undisturbed_random_streams(device),
            _kept_buffers(parts),
            uncompiled(),
        ):
            loader = make_loader()
            for part in parts:  # as before the first step, which a preview follows
                part.do_update_step(0, 0)
            with _evaluating(parts):
                batch = _moved(next(_batches(loader)), device)
                self.preprocess_data(batch, "validation")
                self.validation_step(batch, 0)
        views = batch["index"].tolist()
        if len(views) == len(loader.dataset):
            self._drawn_of = self._versions()
        return [self.get_save_path(f"it0-{view}.png") for view in views]

    def _draw_preview(self) -> None:
        """The pictures of a validation, drawn by the first process between two training steps,
        which see nothing of it; none in a training that has no validations."""
        loader = self.trainer.val_dataloaders
        if not isinstance(loader, DataLoader) or self.global_rank != 0:
            return
        with torch.no_grad(), _undisturbed_random_streams(self.device), _evaluating(self._parts):
            for number, batch in enumerate(_batches(loader)):
                batch = self.trainer.strategy.batch_to_device(batch)
                self.preprocess_data(batch, "validation")
                with self.trainer.precision_plugin.val_step_context():
                    self.validation_step(batch, number)

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
            self._keep_for_sheet(float(batch["azimuth"][i]), index, self.sheet_picture(out, i))

    def sheet_picture(self, out: dict[str, Any], i: int) -> Float[Tensor, "H W 3"]:
        """What the contact sheet shows of image ``i``."""
        return out["comp_rgb"][i]

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
def _kept_buffers(parts: tuple[torch.nn.Module, ...]) -> Iterator[None]:
    """Within this, the modules' buffers may change; afterwards each is as it was."""
    before = [
        (module, name, buffer, buffer.clone())
        for part in parts
        for module in part.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in before:
            setattr(module, name, buffer.copy_(values))


def _batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader of views, which itself is not iterated: it might draw a seed."""
    data: Any = loader.dataset
    size = loader.batch_size or 1
    for first in range(0, len(data), size):
        yield loader.collate_fn([data[i] for i in range(first, min(first + size, len(data)))])


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


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
