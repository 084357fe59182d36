"""What the benchmarks of whole steps share: a shipped configuration, set up and trained."""

from pathlib import Path

import pytorch_lightning as pl
from text_to_3d import CONFIGS
from timing import ROOT

from evaluation import training


def set_up(config: str, overlay: bool, overrides: list[str], folder: Path):
    """``(cfg, system, data)`` of a configuration of ``configs/``, with the overlay that scales it
    to an embedded model or without; files of the run go to ``folder``."""
    from threestudio.utils.config import load_config
    from threestudio.utils.extensions import load_extension

    load_extension(ROOT / "custom" / "threestudio-lods")
    names = [config, CONFIGS[config]] if overlay else [config]
    asked = "system.prompt_processor.prompt=a DSLR image of a hamburger"
    cfg = load_config(
        *(str(ROOT / f"configs/{name}.yaml") for name in names), cli_args=[asked, *overrides]
    )
    return cfg, *training.build(cfg, folder)


def train(system, data, device: str, steps: int, clock: pl.Callback, precision=32) -> None:
    """Training steps and nothing else, on one device."""
    training.train(
        system,
        data,
        [clock],
        max_steps=steps,
        accelerator=device,
        devices=1,
        precision=precision,
    )
