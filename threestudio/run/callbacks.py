"""The callbacks that every run has."""

import inspect
import os
import socket
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
)

from threestudio.run.arguments import Call
from threestudio.run.best_checkpoints import BestCheckpoints
from threestudio.run.checkpoint import LastCheckpoint
from threestudio.run.config_check import check_names
from threestudio.run.folder import checkpoint_folder, last_checkpoint
from threestudio.run.interrupt import InterruptGuard
from threestudio.run.interventions import Interventions, read
from threestudio.run.named_callbacks import NamedCallback
from threestudio.run.progress import CustomProgressBar, ProgressCallback
from threestudio.run.record import RunRecord
from threestudio.run.resume import RestoreCheck
from threestudio.run.snapshot_callbacks import CodeSnapshotCallback, ConfigSnapshotCallback
from threestudio.run.viewer.options import ViewerOptions
from threestudio.utils import extensions

# the options of the view, and the socket that it listens at
Viewer = tuple[ViewerOptions, socket.socket]


class ReportFailures(Callback):
    """:func:`.extensions.report_failures` when all is set up and the work begins: told while
    loading, it would be scrolled away by what comes after it."""

    def _report(self, trainer, pl_module) -> None:
        extensions.report_failures()

    on_sanity_check_start = on_train_start = _report
    on_validation_start = on_test_start = on_predict_start = _report


class SharedFolder(Callback):
    """All processes of a run write into the folder that the first of them has made: the others
    learn its name here."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    def setup(self, trainer, pl_module, stage: str) -> None:
        if trainer.world_size == 1:
            return
        mine = self.cfg.trial_dir, checkpoint_folder(self.cfg)
        trial_dir, ckpts = trainer.strategy.broadcast(mine)
        if (trial_dir, ckpts) == mine:
            return
        self.cfg.trial_dir = trial_dir
        pl_module.set_save_dir(os.path.join(trial_dir, "save"))
        for callback in trainer.callbacks:  # ModelCheckpoint asks the first process itself
            if isinstance(callback, LastCheckpoint):
                callback.path = Path(ckpts, callback.path.name)


def make_callbacks(
    call: Call,
    cfg: DictConfig,
    guard: InterruptGuard,
    trainer_args: dict[str, Any],
    named: list[NamedCallback],
    viewer: Viewer | None = None,
) -> list[Callback]:
    """The callbacks of a run: ours, then those that its config names."""
    # first, so that it comes before the progress bar
    made: list[Callback] = [ReportFailures(), SharedFolder(cfg), RestoreCheck(cfg.resume)]
    if call.args.gradio:
        made.append(ProgressCallback(os.path.join(cfg.trial_dir, "progress")))
    elif trainer_args.get("enable_progress_bar", True) and not any(
        issubclass(each.cls, ProgressBar) for each in named
    ):
        made.append(CustomProgressBar(pictures=call.args.show_previews))
    if call.args.train:
        made += _of_training(call, cfg, guard, trainer_args, viewer)
    elif viewer is not None:
        from threestudio.run.viewer.callback import ShowCallback

        made.append(ShowCallback(*viewer, cfg.trial_dir, guard, Interventions()))
    return [*made, *(each.make() for each in named)]


def _of_training(
    call: Call,
    cfg: DictConfig,
    guard: InterruptGuard,
    trainer_args: dict[str, Any],
    viewer: Viewer | None,
) -> list[Callback]:
    replayed = [] if call.args.replay is None else read(call.args.replay)
    interventions = Interventions(cfg.trial_dir, replayed)
    made: list[Callback] = [
        interventions,
        CodeSnapshotCallback(
            os.path.join(cfg.trial_dir, "code"),
            use_version=False,
            exclude=[cfg.exp_root_dir, cfg.exp_dir],
        ),
        ConfigSnapshotCallback(
            call.args.config, cfg, os.path.join(cfg.trial_dir, "configs"), use_version=False
        ),
        RunRecord(cfg.trial_dir, call.asked),
    ]
    if viewer is not None:
        from threestudio.run.viewer.callback import ViewerCallback

        made.append(ViewerCallback(*viewer, cfg.trial_dir, guard, interventions))
    if trainer_args.get("logger", True):
        made.append(LearningRateMonitor(logging_interval="step"))
    if trainer_args.get("enable_checkpointing", True):
        options = dict(cfg.checkpoint)
        check_names(ModelCheckpoint.__init__, options, "checkpoint")
        options.pop("save_last", None)  # LastCheckpoint does that, and always
        options = {"dirpath": os.path.join(cfg.trial_dir, "ckpts"), **options}
        # a resumed run writes over its own files (Lightning before 2.2 always does)
        if "enable_version_counter" in inspect.signature(ModelCheckpoint).parameters:
            options.setdefault("enable_version_counter", False)
        every = options.get("every_n_train_steps")
        made += [
            BestCheckpoints(**options),
            LastCheckpoint(last_checkpoint(cfg), guard, every_n_train_steps=every),
        ]
    return made
