"""``run.json``: when a run was trained, on what, and with which versions."""

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_only

import threestudio
from threestudio.run.machine import cpu_name
from threestudio.run.pace import paused_seconds
from threestudio.run.snapshot import PlainFiles
from threestudio.utils import extensions
from threestudio.utils.files import whole_file

NAME = "run.json"
MAX_BYTES = 1 << 20
KEPT = 100  # trainings of a run that was continued again and again
PACKAGES = ("torch", "numpy", "pytorch-lightning", "diffusers", "transformers", "peft", "gsplat")


class RunRecord(Callback):
    """``asked``: the command that was typed, where it was that of another program.

    Adds an entry to ``run.json`` in the folder `path` when a training begins, and writes into it
    when it ends or is stopped how far it got: after how many ``seconds``, without those for which
    it was ``paused``. What the disk refuses is a warning."""

    def __init__(self, path, asked: str = "") -> None:
        self.folder, self.asked = Path(path), asked
        self._before: list[Mapping[str, Any]] = []
        self._entry: dict[str, Any] = {}
        self._began = 0.0

    @rank_zero_only
    def on_train_start(self, trainer, pl_module) -> None:
        self._began = time.monotonic()
        self._before = read_record(self.folder)
        self._entry = {
            "started": datetime.now().isoformat(timespec="seconds"),
            "from_step": trainer.global_step,
            **surroundings(pl_module.device),
        }
        if self.asked:
            self._entry["asked"] = self.asked
        self._write(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self._write(trainer)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self._entry and trainer.state.fn == "fit":
            self._write(trainer)

    @rank_zero_only
    def _write(self, trainer) -> None:
        entry = self._entry
        entry["to_step"] = trainer.global_step
        paused = paused_seconds(trainer)
        entry["seconds"] = round(time.monotonic() - self._began - paused, 2)
        if paused:
            entry["paused"] = round(paused, 2)
        try:
            with whole_file(self.folder / NAME) as tmp:
                tmp.write_text(json.dumps({"trainings": [*self._before, entry][-KEPT:]}, indent=1))
        except OSError as error:
            threestudio.warn(f"{self.folder / NAME} was not written: {error.strerror}")


def surroundings(device: torch.device) -> dict[str, Any]:
    """The machine and the versions of now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    versions = {"python": sys.version.split()[0], "threestudio": threestudio.__version__}
    for extension in extensions.loaded:
        module = sys.modules.get(extension)
        if isinstance(number := getattr(module, "__version__", None), str):
            versions[extension] = number
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    threads = torch.get_num_threads()
    return {"device": device.type, "machine": name, "threads": threads, "versions": versions}


def read_record(folder) -> list[Mapping[str, Any]]:
    """The trainings of a run, the first one first; [] where nothing readable is written."""
    try:
        if NAME not in PlainFiles(folder) or os.path.getsize(Path(folder, NAME)) > MAX_BYTES:
            return []
        found = json.loads(Path(folder, NAME).read_text(encoding="utf-8"))
        trainings = found["trainings"]
        return [entry for entry in trainings if isinstance(entry, dict)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
