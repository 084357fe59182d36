"""What the benchmarks of whole steps share: a shipped configuration, set up and trained."""

from pathlib import Path

import pytorch_lightning as pl
from text_to_3d import CONFIGS
from timing import ROOT


def set_up(config: str, overlay: bool, overrides: list[str], folder: Path):
    """``(cfg, system, data)`` of a configuration of ``configs/``, with the overlay that scales it
    to the pocket prior or without; files of the run go to ``folder``."""
    import threestudio
    from threestudio.utils.config import load_config
    from threestudio.utils.extensions import load_extension

    load_extension(ROOT / "custom" / "threestudio-lods")
    names = [config, CONFIGS[config]] if overlay else [config]
    asked = "system.prompt_processor.prompt=a DSLR image of a hamburger"
    cfg = load_config(
        *(str(ROOT / f"configs/{name}.yaml") for name in names), cli_args=[asked, *overrides]
    )
    pl.seed_everything(cfg.seed)
    data = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system)
    system.set_save_dir(str(folder / "save"))
    return cfg, system, data


def train(system, data, device: str, steps: int, clock: pl.Callback, precision=32) -> None:
    """Training steps and nothing else: no validation, no checkpoints, no logs."""
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator=device,
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        inference_mode=False,
        callbacks=[clock],
    )
    trainer.fit(system, datamodule=data)
