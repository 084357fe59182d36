"""What the systems of all representations share: their parts, and their files."""

import shutil
from dataclasses import dataclass, field
from typing import Annotated, Any

from lods.models import renamed
from lods.preflight import named_models
from lods.threestudio.systems.coverage import Coverage
from lods.threestudio.systems.losses import Losses
from lods.threestudio.systems.pictures import Pictures
from lods.threestudio.systems.turntable import (
    FRAMES,
    WEBM,
    WEBP,
    frames_in,
    kinds_of,
    straight,
    write_frame,
    write_webm,
    write_webp,
)

import threestudio
from threestudio.systems.base import BaseLift3DSystem

UPSTREAM_FORMATS = ("obj-mtl", "obj")  # of threestudio 0.2.3's mesh-exporter


class LODSSystem(Losses, Pictures):
    """Renders a batch of cameras, asks the guidance for its losses and adds regularisers.

    total = sum over all losses of C(system.loss.lambda_<name>) * loss, where the guidance gives
    ``sds`` and, if it learns, ``lora`` or ``embedding``, and with o the rendered opacity:

    - ``sparsity``: mean sqrt(o^2 + 0.01)
    - ``opaque``: binary cross entropy of o, clamped to 1e-3..1-1e-3, with itself

    A regulariser is computed when its lambda stands in the YAML. A representation names its own in
    REGULARISERS and adds them in ``regularisers``.
    """

    @dataclass
    class Config(BaseLift3DSystem.Config):
        prompt_processor_type: str = "lods-prompt-processor"
        # steps at which the validation pictures are drawn beside trainer.val_check_interval, so
        # that there is something to see from the start; []: none
        early_previews: Annotated[list[int], "ordered [0, 1e12]"] = field(
            default_factory=lambda: [0, 10, 25, 50]
        )
        # views of the contact sheet, evenly around the object; 0: no sheet
        sheet_views: Annotated[int, "[0, 10000]"] = 12
        sheet_columns: Annotated[int, "[1, 1000]"] = 4
        video_fps: Annotated[int, "[1, 1000]"] = 30
        # of --export: the test views without background, one or a list of webp and webm, which are
        # animations, and frames, PNG files (both: webp and frames), or none; and whether the
        # exporter writes the object
        turntable: Annotated[Any, "texts"] = "none"
        export_object: bool = True
        loss: Annotated[dict, dict[str, Annotated[float, "scheduled (-inf, inf)"]]] = field(
            default_factory=dict
        )

    cfg: Config
    # for the host, which looks all parts up before the first is built
    builds_too = ("guidance", "prompt_processor", "exporter")

    def configure(self) -> None:
        if self.cfg.sheet_views < 0 or self.cfg.sheet_columns < 1:
            raise ValueError(
                "system.sheet_views must be 0 (no contact sheet) or more and system.sheet_columns "
                f"1 or more, not {self.cfg.sheet_views} and {self.cfg.sheet_columns}"
            )
        self._check_mesh_format()
        self._turns = kinds_of(self.cfg.turntable)
        self._results: dict[str, str] = {}
        self.begin_pictures()
        super().configure()  # where the first picture may be drawn
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

    # -- checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lods_models"] = renamed.notes(named_models(self.cfg).values())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another model than the run's, by whatever name."""
        super().on_load_checkpoint(checkpoint)
        renamed.refuse_another(named_models(self.cfg), checkpoint.get("lods_models"))

    # -- files ---------------------------------------------------------------------------------

    @property
    def renders_to_export(self) -> bool:
        """For the host, which makes the views only where they are rendered."""
        return self.exporter.cfg.save_video or bool(self._turns)

    @property
    def _turntable(self) -> str:
        return f"it{self.true_global_step}-export/frames"

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().predict_step(batch, batch_idx)
        if not self._turns:
            return
        out = self(batch)
        for i, index in enumerate(batch["index"].tolist()):
            picture = straight(out["comp_rgb_fg"][i], out["opacity"][i])
            write_frame(self.get_save_path(f"{self._turntable}/{index}.png"), picture)

    def _write_turntable(self) -> None:
        """The animations of the frames, which stay only where they are asked for."""
        folder = self.get_save_path(self._turntable)
        if self.views:
            self._remove_frames_from(self.views, self._turntable)
        frames = frames_in(folder)
        for kind, write in ((WEBP, write_webp), (WEBM, write_webm)):
            if kind in self._turns:
                path = self.get_save_path(f"it{self.true_global_step}-export/turntable.{kind}")
                write(path, frames, self.cfg.video_fps)
                self._results["animation" if kind == WEBP else "video with transparency"] = path
        if FRAMES in self._turns:
            self._results["frames"] = folder
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def on_predict_epoch_end(self) -> None:
        """``--export``: the learned part, the pictures, and the exporter's files. They are the
        same on all processes, and the first one writes them."""
        if self.exporter.cfg.save_video:
            self.on_test_epoch_end()
            self.exporter.cfg.save_video = False
        turns = bool(self._turns) and self.trainer.predicting
        if turns:
            self.trainer.strategy.barrier()  # the frames of all processes are there
        if self.global_rank != 0:
            return
        if turns:
            self._write_turntable()
        if not self.cfg.export_object:
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
