"""Runs of the tests' toy system, of less than a second, for faults that need many of them."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tests.host.test_launch import CONFIG
from tests.runs import ROOT
from threestudio.utils.extensions import load_extension

PHASES = ("start-up", "training", "validation", "test", "export")


def toy_folder(folder: Path) -> Path:
    """`folder`, new, with the toy's config and extension in it, to run in."""
    (folder / "custom").mkdir(parents=True)
    (folder / "custom" / "toy_extension.py").symlink_to(ROOT / "tests" / "toy_extension.py")
    (folder / "toy.yaml").write_text(CONFIG)
    return folder


def toy_command(*more: str, mode: str = "--train", config: str = "toy.yaml") -> list:
    """Arguments of ``launch.py`` there: four steps, a validation after two, two test views."""
    known = ["system.prompt=p"] if config == "toy.yaml" else []
    words = ["--extensions", "custom", "--config", config, mode, *known]
    return [*words, "trainer.enable_progress_bar=false", *more]


def load_toy():
    """The toy's module, loaded before children are forked, which then share it."""
    return load_extension(ROOT / "tests" / "toy_extension.py")


def pausing(phase: str, mark: Path, seconds: float = 1.0) -> Callable:
    """For a child: its toy makes the file `mark` when it is in `phase`, and takes that long over
    it, in many small parts."""

    def pause() -> None:
        if mark.exists():  # once
            return
        mark.touch()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.005)

    def before() -> None:
        toy = load_toy().ToySystem
        name = {
            "start-up": "configure",
            "training": "training_step",
            "validation": "on_validation_epoch_end",
            "test": "test_step",
            "export": "predict_step",
        }[phase]
        wrapped = getattr(toy, name)

        def method(self, *args):
            late = phase != "training" or self.true_global_step == 1
            if late:
                pause()
            return wrapped(self, *args)

        setattr(toy, name, method)

    return before


def wait_for(mark: Path, child, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not mark.exists() and child.running() and time.monotonic() < end:
        time.sleep(0.002)
    return mark.exists()


def together(gate: Path) -> Callable:
    """For children: each waits until the file `gate` is there."""

    def before() -> None:
        while not gate.exists():
            time.sleep(0.0005)

    return before


def contents(folder: Path) -> dict:
    """What is in each file below `folder`."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def fresh(folder: Path) -> Path:
    """:func:`toy_folder` in the place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder.parent, exist_ok=True)
    return toy_folder(folder)
