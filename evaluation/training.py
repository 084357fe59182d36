"""A configuration, set up and trained in this process, without the files of a launched run."""

from pathlib import Path

import pytorch_lightning as pl

import threestudio

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "inference_mode": False,
}


def build(cfg, folder: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """``(system, data)`` of a loaded config, from its seed; what they write goes to ``folder``."""
    pl.seed_everything(cfg.seed, workers=True)
    data = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system)
    system.set_save_dir(str(folder / "save"))
    return system, data


def train(system, data, callbacks: list[pl.Callback], **trainer_args) -> None:
    """Training steps and nothing else: no validation, no checkpoints, no logs."""
    trainer = pl.Trainer(**{**trainer_args, **QUIET, "callbacks": callbacks})
    trainer.fit(system, datamodule=data)
