"""What the systems of all representations share: losses and their weights, pictures, files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from lods.threestudio.systems.coverage import Coverage
from PIL import Image
from torch import Tensor

import threestudio
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.ops import binary_cross_entropy

# the guidances of this extension return some of these; a YAML may weigh all of them, so that the
# guidance can be changed in one line
GUIDANCE_LOSSES = ("sds", "lora", "embedding")
UPSTREAM_FORMATS = ("obj-mtl", "obj")  # of threestudio 0.2.3's mesh-exporter


class LODSSystem(BaseLift3DSystem):
    """Renders a batch of cameras, asks the guidance for its losses and adds regularisers.

    total = sum over all losses of C(system.loss.lambda_<name>) * loss, where the guidance gives
    ``sds`` and, if it learns, ``lora`` or ``embedding``, and with o the rendered opacity:

    - ``sparsity``: mean sqrt(o^2 + 0.01)
    - ``opaque``: binary cross entropy of o, clamped to 1e-3..1-1e-3, with itself

    A regulariser is computed when its lambda stands in the YAML. A backbone names its own in
    REGULARISERS and adds them in ``regularisers``.
    """

    REGULARISERS: tuple[str, ...] = ("sparsity", "opaque")

    @dataclass
    class Config(BaseLift3DSystem.Config):
        prompt_processor_type: str = "lods-prompt-processor"
        # views of the contact sheet, evenly around the object; 0: no sheet
        sheet_views: Annotated[int, "[0, 10000]"] = 12
        sheet_columns: Annotated[int, "[1, 1000]"] = 4
        video_fps: Annotated[int, "[1, 1000]"] = 30
        loss: Annotated[dict, dict[str, Annotated[float, "scheduled (-inf, inf)"]]] = field(
            default_factory=dict
        )

    cfg: Config

    def configure(self) -> None:
        if self.cfg.sheet_views < 0 or self.cfg.sheet_columns < 1:
            raise ValueError(
                "system.sheet_views must be 0 (no contact sheet) or more and system.sheet_columns "
                f"1 or more, not {self.cfg.sheet_views} and {self.cfg.sheet_columns}"
            )
        self._check_mesh_format()
        super().configure()
        if self.resumed and "weights" in self.cfg.guidance:
            # the checkpoint brings the learned part, and the file may be gone
            self.cfg.guidance["weights"] = None
        self.guidance = threestudio.find(self.cfg.guidance_type)(self.cfg.guidance)
        processor = threestudio.find(self.cfg.prompt_processor_type)
        if self.resumed and hasattr(processor.Config, "allow_unknown_words"):
            # what has been trained can be looked at and exported, whatever its prompt
            self.cfg.prompt_processor["allow_unknown_words"] = True
        self.prompt_processor = processor(self.cfg.prompt_processor)
        self.prompt_utils = self.prompt_processor()
        if hasattr(self.guidance, "initialize"):
            self.guidance.initialize(self.prompt_utils)
        self.on_predict_start()  # a mistake in the exporter's settings shall not cost a training
        for method in getattr(self.exporter, "geometry_needs", ()):
            if not hasattr(self.geometry, method):
                raise ValueError(
                    f"system.exporter_type={self.cfg.exporter_type} cannot export "
                    f"system.geometry_type={self.cfg.geometry_type}: set another exporter_type"
                )
        self._sheet: dict[int, tuple[float, int, Tensor]] = {}
        self._results: dict[str, str] = {}
        self.views = 0  # of a test, where its data tell
        self.coverage = Coverage()

    def _check_mesh_format(self) -> None:
        """threestudio 0.2.3 notices a format that it does not know when all is trained."""
        if self.cfg.exporter_type != "mesh-exporter":
            return
        known = getattr(threestudio.find("mesh-exporter"), "formats", UPSTREAM_FORMATS)
        fmt = self.cfg.exporter.get("fmt", known[0])
        if fmt not in known:
            raise ValueError(
                f"system.exporter.fmt={fmt!r}: this threestudio's mesh-exporter writes "
                f"{', '.join(known)}"
            )

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.renderer(**batch)

    # -- losses --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if scaled and hasattr(self.guidance, "loss_is_scaled"):
            self.guidance.loss_is_scaled()

    def loss_of(self, out: dict[str, Any], batch: dict[str, Any]) -> Float[Tensor, ""]:
        """The total loss of a rendered batch, with its parts logged."""
        self.coverage.see(out["opacity"], self._everywhere)
        image = self.guided_image(out)
        guided = self.guidance(image, self.prompt_utils, **batch, rgb_as_latents=False)
        for name, value in guided.items():
            if not name.startswith("loss_") and _is_scalar(value):
                self.note(f"train/{name}", value)
        losses = {k[len("loss_") :]: v for k, v in guided.items() if k.startswith("loss_")}
        loss = self.weigh(losses | self.regularisers(out))
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _everywhere(self, here: bool) -> bool:
        """Whether `here` is true in all processes."""
        return self.trainer.strategy.reduce_boolean_decision(here, all=True)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.coverage.finish(self._everywhere)

    def guided_image(self, out: dict[str, Any]) -> Float[Tensor, "B H W 3"]:
        """What of a rendered batch the guidance looks at."""
        return out["comp_rgb"]

    def note(self, name: str, value: Any) -> None:
        """``self.log``, on the steps that loggers write only (``trainer.log_every_n_steps``): a
        dozen calls take Lightning several milliseconds."""
        every = self.trainer.log_every_n_steps
        if every and (self.global_step + 1) % every == 0:
            self.log(name, float(value.detach() if isinstance(value, Tensor) else value))

    def regularisers(self, out: dict[str, Any]) -> dict[str, Float[Tensor, ""]]:
        """The losses of the class docstring whose lambda stands in the YAML, by name."""
        losses = {}
        if self.wants("sparsity"):
            losses["sparsity"] = (out["opacity"] ** 2 + 0.01).sqrt().mean()
        if self.wants("opaque"):
            clamped = out["opacity"].clamp(1e-3, 1 - 1e-3)
            losses["opaque"] = binary_cross_entropy(clamped, clamped)
        return losses

    def wants(self, name: str) -> bool:
        """Whether the YAML weighs this loss."""
        return f"lambda_{name}" in self.cfg.loss

    def weigh(self, losses: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """sum_i C(lambda_i) * loss_i, with losses and lambdas logged.

        Raises ValueError for a loss without a lambda, and for a lambda without a loss.
        """
        known = {f"lambda_{name}" for name in {*losses, *self.REGULARISERS, *GUIDANCE_LOSSES}}
        for key in self.cfg.loss:
            if key not in known:
                raise ValueError(
                    f"system.loss.{key} weighs a loss that does not exist: the keys are "
                    f"{', '.join(sorted(known))}"
                )
        total = 0.0
        self.loss_terms = {
            f"loss_{name}": torch.as_tensor(value).detach() for name, value in losses.items()
        }
        for name, value in losses.items():
            key = f"lambda_{name}"
            if key not in self.cfg.loss:
                raise ValueError(
                    f"{self.cfg.guidance_type} returns loss_{name} but system.loss has no {key}: "
                    f"add system.loss.{key}=1.0 to the configuration"
                )
            self.note(f"train/loss_{name}", value)
            total = total + value * self._weight(key)
        for key in self.cfg.loss:
            self.note(f"train_params/{key}", self._weight(key))
        return total

    def _weight(self, key: str) -> float:
        try:
            return self.C(self.cfg.loss[key])
        except TypeError as error:
            raise ValueError(f"system.loss.{key}: {error} (0 for none)") from None

    # -- pictures ------------------------------------------------------------------------------

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

    # -- files ---------------------------------------------------------------------------------

    def on_predict_epoch_end(self) -> None:
        """``--export``: the learned part of the guidance, and the exporter's files. They are the
        same on all processes, and the first one writes them."""
        if self.exporter.cfg.save_video:
            self.on_test_epoch_end()
            self.exporter.cfg.save_video = False
        if self.global_rank != 0:
            return
        if hasattr(self.guidance, "save_learned"):
            name = f"it{self.true_global_step}-export/prior.safetensors"
            path = self.guidance.save_learned(self.get_save_path(name))
            if path is not None:
                self._results["learned part"] = str(path)
        super().on_predict_epoch_end()

    def on_test_end(self) -> None:
        """The files of ``--export`` are written at the end of a test too; what cannot be (a mesh
        without a surface) is said, and does not spoil the test."""
        self.coverage.finish_views()
        self.on_predict_start()
        self.exporter.cfg.save_video = False  # the video has just been made
        try:
            self.on_predict_epoch_end()
        except ValueError as error:
            threestudio.warn(f"nothing exported: {error}")
        super().on_test_end()

    def save_obj(self, filename: str, *args, **kwargs) -> list[str]:
        """Also note where the mesh is."""
        self._results["mesh"] = self.get_save_path(filename)
        return super().save_obj(filename, *args, **kwargs)

    def save_mesh(self, filename: str, *args, **kwargs) -> str:
        """Also note where the mesh is."""
        self._results["mesh"] = self.get_save_path(filename)
        return super().save_mesh(filename, *args, **kwargs)

    def result_summary(self) -> list[str]:
        """Where the results of the last test or export are: lines like 'video: <path>'."""
        return [f"{what}: {path}" for what, path in self._results.items()]


def _read(path: Path) -> Float[Tensor, "H W 3"]:
    with Image.open(path) as file:
        return torch.from_numpy(np.asarray(file.convert("RGB"), np.float32) / 255)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def rgb_cell(image: Float[Tensor, "H W 3"]) -> dict[str, Any]:
    """A colour picture in a grid of ``save_image_grid``."""
    return {"type": "rgb", "img": image, "kwargs": {"data_format": "HWC", "data_range": (0, 1)}}


def grey_cell(
    image: Float[Tensor, "H W"], data_range: tuple[float, float] | None
) -> dict[str, Any]:
    """A grey picture in such a grid; ``data_range`` None: stretched from its minimum to maximum."""
    return {"type": "grayscale", "img": image, "kwargs": {"cmap": None, "data_range": data_range}}
