"""Lightning's trainer, as a run has it."""

from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from threestudio.run.arguments import Call
from threestudio.run.callbacks import Viewer, make_callbacks
from threestudio.run.checkpoint import AtomicCheckpointIO
from threestudio.run.folder import checkpoint_folder
from threestudio.run.interrupt import InterruptGuard
from threestudio.run.loggers import make_loggers
from threestudio.run.named_callbacks import NamedCallback
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.config import config_to_primitive
from threestudio.utils.errors import UserError


def make_trainer(
    call: Call,
    cfg: DictConfig,
    guard: InterruptGuard,
    trainer_args: dict[str, Any],
    system: Any,
    named: list[NamedCallback],
    viewer: Viewer | None = None,
) -> pl.Trainer:
    """The trainer of a run. `trainer_args`: the section `trainer` of its config, without the
    `callbacks`, which are `named`. Raises :class:`UserError` for options that it refuses."""
    loggers: list | bool = False
    if call.args.train and trainer_args.get("logger", True):
        loggers = [*make_loggers(cfg.trial_dir), *system.get_loggers()]
    defaults = {
        "default_root_dir": cfg.trial_dir,
        "inference_mode": False,  # a system may need gradients to render (normals)
        "enable_model_summary": False,
        "enable_checkpointing": call.args.train,
    }
    rendering = config_to_primitive(cfg.system).get("exporter", {}).get("save_video")
    if type(system).predict_step is not BaseLift3DSystem.predict_step:
        rendering = rendering or getattr(system, "renders_to_export", True)
    if not rendering:
        defaults["limit_predict_batches"] = 1  # an export renders no views: do not make them all
    if call.args.gradio or call.args.view:  # what is only looked at goes on to nowhere
        # else Lightning draws a bar of its own
        trainer_args = {**trainer_args, "enable_progress_bar": False}
    plugins: list = [AtomicCheckpointIO(checkpoint_folder(cfg))]
    try:
        # torchrun comes first, as in Lightning; SLURM's files for requeueing would be loaded by
        # whatever runs in that folder next
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))
        return pl.Trainer(
            callbacks=make_callbacks(call, cfg, guard, trainer_args, named, viewer),
            plugins=plugins,
            **{**defaults, **trainer_args, "logger": loggers},
        )
    except UserError:
        raise
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"trainer or checkpoint options: {text}") from error
