"""What is optimised: ``BaseSystem``, and ``BaseLift3DSystem`` for a 3D object behind a renderer."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

import pytorch_lightning as pl

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.run import first_picture
from threestudio.run.nonfinite import POLICIES, NonFiniteGuard
from threestudio.systems.exact_resume import ExactResume
from threestudio.systems.optimizer_options import OptimizerOptions, SchedulerOptions
from threestudio.systems.several_processes import TogetherAtTheEnds
from threestudio.systems.utils import parse_optimizer, parse_scheduler
from threestudio.utils.base import Updateable, update_end_if_possible, update_if_possible
from threestudio.utils.config import load_config, parse_structured
from threestudio.utils.errors import UserError
from threestudio.utils.misc import (
    C,
    cleanup,
    find_last_path,
    get_device,
    load_matching,
    load_module_weights,
    loading_weights,
)
from threestudio.utils.saving import SaverMixin
from threestudio.utils.typing import *


class BaseSystem(pl.LightningModule, Updateable, SaverMixin):
    """A LightningModule with a config, scheduled values, savers, and updates before and after each
    step. A subclass defines ``configure`` and the steps, and ``on_validation_epoch_end``.

    A run that is resumed continues bit for bit (see :class:`ExactResume`). What a step
    changes, and what it draws at random, has to be done before ``on_train_batch_end``.
    """

    @dataclass
    class Config:
        loggers: dict = field(default_factory=dict)
        loss: dict = field(default_factory=dict)
        optimizer: Annotated[dict, OptimizerOptions] = field(default_factory=dict)
        scheduler: Annotated[Optional[dict], SchedulerOptions] = None
        weights: Optional[str] = None  # a checkpoint to start from (weights only, not strict)
        weights_ignore_modules: Optional[List[str]] = None
        # or "skip": what to do with a step of NaN or inf
        on_nonfinite: Annotated[str, POLICIES] = "stop"
        # in a row, after which the run stops all the same
        max_skipped_steps: Annotated[int, "[1, 1e9]"] = 20
        cleanup_after_validation_step: bool = False
        cleanup_after_test_step: bool = False

    cfg: Config
    checkpoint_name: str = "the checkpoint"  # that is loaded, for an error to name

    def __init__(self, cfg, resumed: bool = False) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self._save_dir: Optional[str] = None
        self._resumed = resumed
        self._resumed_eval_status: Optional[Tuple[int, int]] = None
        self.loss_terms: Dict[str, Tensor] = {}  # parts of the last loss, for an error to name
        self._exact_resume = ExactResume()
        self._together = TogetherAtTheEnds()
        self._nonfinite = NonFiniteGuard(self.cfg.on_nonfinite, self.cfg.max_skipped_steps)
        if cfg is not None and "loggers" in cfg:
            self.create_loggers(self.cfg.loggers)
        self.configure()
        if self.cfg.weights is not None and not resumed:
            self.load_weights(self.cfg.weights, self.cfg.weights_ignore_modules)
        self.post_configure()

    # --- construction ---------------------------------------------------------------------------

    def configure(self) -> None:
        """Override: build the parts."""

    def post_configure(self) -> None:
        """Override: what is due once the weights are loaded."""

    def load_weights(self, weights: str, ignore_modules: Optional[List[str]] = None) -> None:
        """Load what a checkpoint has of this system, and update to its step. What is missing and
        what is left over is logged; a checkpoint that has nothing of it is refused."""
        ignored = list(ignore_modules) if ignore_modules else []
        state, epoch, global_step = load_module_weights(weights, ignore_modules=ignored or None)
        self.checkpoint_name = str(weights)
        load_matching(self, state, self.checkpoint_name, ignored)
        del self.checkpoint_name
        self.do_update_step(epoch, global_step, on_load_weights=True)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As torch's, but what does not fit is one line (see :func:`loading_weights`)."""
        name = self.checkpoint_name
        try:
            with loading_weights(self, state_dict, name):
                return super().load_state_dict(state_dict, *args, **kwargs)
        except ValueError as error:  # of a part that looks at its values itself
            text = str(error)
            raise error if text.startswith(name) else UserError(f"{name}: {text}") from None

    def configure_optimizers(self):
        out: Dict[str, Any] = {"optimizer": parse_optimizer(self.cfg.optimizer, self)}
        if self.cfg.scheduler is not None:
            out["lr_scheduler"] = parse_scheduler(self.cfg.scheduler, out["optimizer"])
        return out

    def configure_callbacks(self) -> List[Any]:
        attached = self._trainer.callbacks if self._trainer is not None else []
        own = (self._exact_resume, self._nonfinite, self._together)
        return [c for c in own if c not in attached]

    # --- counters and schedules -----------------------------------------------------------------

    @property
    def resumed(self) -> bool:
        """Whether the run was started from a checkpoint (``resume=``)."""
        return self._resumed

    def set_resume_status(self, current_epoch: int, global_step: int) -> None:
        """Make the ``true_*`` counters those of a checkpoint, for validation, test and export."""
        self._resumed_eval_status = (current_epoch, global_step)

    @property
    def true_global_step(self) -> int:
        """Optimisation steps behind the current weights."""
        return self._resumed_eval_status[1] if self._resumed_eval_status else self.global_step

    @property
    def true_current_epoch(self) -> int:
        """Epoch of the current weights."""
        return self._resumed_eval_status[0] if self._resumed_eval_status else self.current_epoch

    def C(self, value: Any) -> float:
        """A scheduled value now (see :func:`threestudio.utils.misc.C`)."""
        return C(value, self.true_current_epoch, self.true_global_step)

    # --- steps ----------------------------------------------------------------------------------

    def training_step(self, batch, batch_idx):
        raise NotImplementedError(f"{type(self).__name__} defines no training_step")

    def validation_step(self, batch, batch_idx):
        raise NotImplementedError(f"{type(self).__name__} defines no validation_step")

    def on_validation_epoch_end(self):
        raise NotImplementedError(f"{type(self).__name__} defines no on_validation_epoch_end")

    def test_step(self, batch, batch_idx):
        raise NotImplementedError(f"{type(self).__name__} defines no test_step")

    def predict_step(self, batch, batch_idx):
        raise NotImplementedError(f"{type(self).__name__} defines no predict_step")

    def preprocess_data(self, batch, stage: str) -> None:
        """Override: change `batch` in place before a step of `stage` ("train", "validation",
        "test" or "predict")."""

    def _batch_start(self, batch, stage: str, loaders, index: int = 0) -> None:
        self.preprocess_data(batch, stage)
        loader = loaders[index] if isinstance(loaders, (list, tuple)) else loaders
        self.dataset = loader.dataset
        update_if_possible(self.dataset, self.true_current_epoch, self.true_global_step)
        self.do_update_step(self.true_current_epoch, self.true_global_step)

    def _batch_end(self, clean: bool = False) -> None:
        update_end_if_possible(self.dataset, self.true_current_epoch, self.true_global_step)
        self.do_update_step_end(self.true_current_epoch, self.true_global_step)
        if clean:
            cleanup()

    def on_train_batch_start(self, batch, batch_idx, unused=0):
        self._batch_start(batch, "train", self.trainer.train_dataloader)

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self._batch_start(batch, "validation", self.trainer.val_dataloaders, dataloader_idx)

    def on_test_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self._batch_start(batch, "test", self.trainer.test_dataloaders, dataloader_idx)

    def on_predict_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self._batch_start(batch, "predict", self.trainer.predict_dataloaders, dataloader_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._batch_end()

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self._batch_end(self.cfg.cleanup_after_validation_step)

    def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self._batch_end(self.cfg.cleanup_after_test_step)

    def on_predict_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self._batch_end(self.cfg.cleanup_after_test_step)

    def on_before_optimizer_step(self, optimizer):
        """Override: the gradients are complete here."""


class BaseLift3DSystem(BaseSystem):
    """A system of a geometry, a material, a background and a renderer, which images of a 3D object
    come from. Guidance and prompt processor are built by the subclass."""

    @dataclass
    class Config(BaseSystem.Config):
        geometry_type: str = ""
        geometry: dict = field(default_factory=dict)
        geometry_convert_from: Optional[str] = None  # a checkpoint of another kind of geometry
        geometry_convert_inherit_texture: bool = False
        geometry_convert_override: dict = field(default_factory=dict)

        material_type: str = ""
        material: dict = field(default_factory=dict)

        background_type: str = ""
        background: dict = field(default_factory=dict)

        renderer_type: str = ""
        renderer: dict = field(default_factory=dict)

        guidance_type: str = ""
        guidance: dict = field(default_factory=dict)

        prompt_processor_type: str = ""
        prompt_processor: dict = field(default_factory=dict)

        exporter_type: str = "mesh-exporter"
        exporter: dict = field(default_factory=dict)

    cfg: Config

    def configure(self) -> None:
        if self.resumed:  # the checkpoint brings all weights, and the files may be gone
            for part in (self.cfg.geometry, self.cfg.material, self.cfg.background):
                part.pop("weights", None)
        else:
            self.cfg.geometry_convert_from = find_last_path(self.cfg.geometry_convert_from)
            self.cfg.weights = find_last_path(self.cfg.weights)
        if self.cfg.geometry_convert_from and self.cfg.weights and not self.resumed:
            threestudio.warn("geometry_convert_from is not used: system.weights has a geometry")
        # a run that has weights of its own must not start from another geometry again
        if self.cfg.geometry_convert_from and not self.cfg.weights and not self.resumed:
            self.geometry = self._converted_geometry(self.cfg.geometry_convert_from)
        else:
            self.geometry = threestudio.find(self.cfg.geometry_type)(self.cfg.geometry)
        self.material = threestudio.find(self.cfg.material_type)(self.cfg.material)
        self.background = threestudio.find(self.cfg.background_type)(self.cfg.background)
        self.renderer = threestudio.find(self.cfg.renderer_type)(
            self.cfg.renderer,
            geometry=self.geometry,
            material=self.material,
            background=self.background,
        )
        first_picture.object_is_built(self)

    def _converted_geometry(self, checkpoint: str):
        """This system's geometry, made from that of the run which wrote `checkpoint`."""
        threestudio.info(f"Initializing geometry from {checkpoint} ...")
        config = os.path.join(os.path.dirname(checkpoint), "..", "configs", "parsed.yaml")
        if not os.path.isfile(config):
            raise UserError(
                f"system.geometry_convert_from={checkpoint} is not in the folder of its run, whose "
                f"config would be {os.path.normpath(config)}"
            )
        old = parse_structured(BaseLift3DSystem.Config, _known(load_config(config).system))
        old.geometry.pop("weights", None)  # the checkpoint brings them
        old.geometry.update(self.cfg.geometry_convert_override)
        geometry = threestudio.find(old.geometry_type)(old.geometry)
        state, epoch, global_step = load_module_weights(checkpoint, module_name="geometry")
        load_matching(geometry, state, checkpoint)
        geometry.do_update_step(epoch, global_step, on_load_weights=True)
        new_class = threestudio.find(self.cfg.geometry_type)
        return new_class.create_from(
            geometry.to(get_device()),
            self.cfg.geometry,
            copy_net=self.cfg.geometry_convert_inherit_texture,
        )

    def _log_save_dir(self) -> None:
        with suppress(ValueError):  # none is set where the system is used without launch.py
            threestudio.info(f"Saving results to {self.get_save_dir()}")

    def on_fit_start(self) -> None:
        self._log_save_dir()

    def on_test_end(self) -> None:
        self._log_save_dir()

    def on_predict_start(self) -> None:
        self.exporter: Exporter = threestudio.find(self.cfg.exporter_type)(
            self.cfg.exporter,
            geometry=self.geometry,
            material=self.material,
            background=self.background,
        )

    def predict_step(self, batch, batch_idx):
        if self.exporter.cfg.save_video:
            self.test_step(batch, batch_idx)

    def on_predict_epoch_end(self) -> None:
        if self.exporter.cfg.save_video:
            self.on_test_epoch_end()
        if self.global_rank != 0:  # the object is the same on all processes
            return
        outputs: List[ExporterOutput] = self.exporter()
        for out in outputs:
            save = getattr(self, f"save_{out.save_type}", None)
            if save is None:
                raise ValueError(f"the exporter's save type {out.save_type!r} is not supported")
            save(f"it{self.true_global_step}-export/{out.save_name}", **out.params)

    def on_predict_end(self) -> None:
        self._log_save_dir()

    def guidance_evaluation_save(self, comp_rgb: Tensor, guidance_eval_out: Dict[str, Any]) -> None:
        """Save ``it{step}-train.png``: one row per image, the rendering and what the guidance
        made of it (noisy, one step, fully denoised, as far as given), captioned with `texts`."""
        keys = ("imgs_noisy", "imgs_1step", "imgs_1orig", "imgs_final")
        columns = [guidance_eval_out[k] for k in keys if k in guidance_eval_out]
        rows = [
            [
                {"type": "rgb", "img": image[i], "kwargs": {"data_format": "HWC"}}
                for image in (comp_rgb, *columns)
            ]
            for i in range(len(columns[0]) if columns else len(comp_rgb))
        ]
        self.save_image_grid(
            f"it{self.true_global_step}-train.png",
            rows,
            name="train_step",
            step=self.true_global_step,
            texts=guidance_eval_out.get("texts"),
        )


def _known(system: DictConfig) -> Dict[str, Any]:
    """The part of a system's config that every Lift3D system has."""
    names = BaseLift3DSystem.Config.__dataclass_fields__
    return {key: value for key, value in system.items() if key in names}
