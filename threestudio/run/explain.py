"""What ``launch.py`` says about an error: one line that tells what to do."""

import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import threestudio
from threestudio.utils.checkpoint_files import newest_checkpoint
from threestudio.utils.errors import StoppedError, UserError
from threestudio.utils.files import FULL, NO_FOLDER, disk_advice, disk_error

_KINDS = (ValueError, KeyError, OmegaConfBaseException, MisconfigurationException, OSError)
_NO_MEMORY = re.compile(r"CUDA error: out of memory|can't allocate memory|not enough memory", re.I)


def explain(error: BaseException, ours: Iterable[Path]) -> str | None:
    """One line for a mistake that the user can mend, None for any other error. Errors raised in
    the folders `ours` are taken to say it themselves."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if is_out_of_memory(error):
        return _shortage(error)
    disk = disk_error(error)
    if disk is not None:
        return disk_advice(disk)
    if not isinstance(error, _KINDS):
        return None
    if isinstance(error, KeyError):
        text = f"{type(error).__name__}: {text}"
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    said = any(Path(origin).is_relative_to(root) for root in ours)
    return text if said else f"{text} (--verbose shows where)"


def why_stopped(error: BaseException, cfg: DictConfig, folder) -> UserError | None:
    """The error that says why a run with the config `cfg` ended, with what to change and the
    checkpoint in `folder` to resume from: for full disks, too little memory and values that are
    not finite. None for any other error."""
    disk = disk_error(error)
    if isinstance(error, StoppedError):
        line = " ".join(str(error).split())
    elif is_out_of_memory(error):
        line = _memory_advice(error, cfg)
    elif disk is not None and (disk.errno in FULL or _is_under(disk.filename, cfg.exp_root_dir)):
        line = disk_advice(disk)
    elif isinstance(error, OSError) and error.errno in NO_FOLDER:
        line = disk_advice(error)
    else:
        return None
    good = newest_checkpoint(folder)
    if good is not None:
        line += f"; the last good checkpoint is {good[0]} (step {good[1]}), to go on with resume="
    return UserError(line)


def _is_under(path, folder) -> bool:
    return bool(path) and Path(path).resolve().is_relative_to(Path(folder).resolve())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether CUDA's or the machine's memory is exhausted."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def _shortage(error: BaseException) -> str:
    text = " ".join(str(error).split())
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.I)
    where = "on the GPU" if "CUDA" in text else "in this machine"
    return f"out of memory {where}" + (f" (another {asked[1]} did not fit)" if asked else "")


_LOWER = (  # settings of which less takes less memory
    "data.batch_size",
    "data.width",
    "data.height",
    "system.renderer.num_samples_per_ray",
    "system.renderer.eval_chunk_size",
    "system.guidance.lora_n_timestamp_samples",
    "system.geometry.ball.n_points",
    "data.eval_width",
    "data.eval_height",
)
_SET = {
    "system.guidance.half_precision_weights": True,
    "system.guidance.enable_gradient_checkpointing": True,
    "system.guidance.enable_attention_slicing": True,
}


def _memory_advice(error: BaseException, cfg: DictConfig) -> str:
    lower = [f"{key} ({value})" for key in _LOWER if (value := _setting(cfg, key)) is not None]
    if _setting(cfg, "system.geometry.init_type") != "ball":
        lower = [text for text in lower if not text.startswith("system.geometry.ball.")]
    growth = OmegaConf.select(cfg, "system.strategy.name")
    if growth in ("default", "mcmc"):
        key = f"system.strategy.{growth}.cap_max"
        default = "no limit" if growth == "default" else 1_000_000  # gsplat's
        lower.append(f"{key} ({_setting(cfg, key) or default})")
    other = [
        f"{key}={str(wanted).lower()} (now {str(value).lower()})"
        for key, wanted in _SET.items()
        if (value := _setting(cfg, key)) is not None and value != wanted
        if torch.cuda.is_available() or "half_precision" not in key
    ]
    text = _shortage(error)
    text += f": lower {', '.join(lower)}" if lower else ""
    return text + (f", or set {', '.join(other)}" if other else "")


def _setting(cfg: DictConfig, key: str) -> Any:
    """The value of `key` in the config, or the default of the class that reads it."""
    value = OmegaConf.select(cfg, key)
    if value is not None:
        return value
    section, _, name = key.rpartition(".")
    kind = OmegaConf.select(cfg, f"{section}_type")
    config = getattr(threestudio.__modules__.get(kind), "Config", None)
    return getattr(config, name, None)
