"""What this package takes from the library: files that are whole or absent, compiled kernels,
cameras and their encoder, and models by their folders.

The only place that says where they are; ``say`` for the lines of trainings that take hours, and
``write_table`` for what came of them.
"""

import csv
import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("lods") is None:  # not installed: the one of this repository
    sys.path.append(str(Path(__file__).resolve().parents[1] / "custom" / "threestudio-lods"))

from lods.cameras import Cameras
from lods.files import whole_file
from lods.gaussians.kernel_cache import kernel
from lods.models import load as load_model
from lods.models import renders
from lods.models.camera_tokens import CameraTokens
from lods.models.cards import MULTI_VIEW
from lods.models.memory import multiplies_in_bfloat16, norm_in_float32
from lods.models.multiview import JointViews, join_views

__all__ = [
    "MULTI_VIEW",
    "CameraTokens",
    "Cameras",
    "JointViews",
    "join_views",
    "kernel",
    "load_model",
    "multiplies_in_bfloat16",
    "norm_in_float32",
    "renders",
    "say",
    "whole_file",
    "write_table",
]


def say(*values) -> None:
    """Print a line of progress. Output that cannot be written any more (its reader is gone, its
    terminal closed, its disk full) ends no training: what is said from then on goes nowhere."""
    try:
        print(*values, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def write_table(file: Path, rows: list[dict]) -> None:
    """Replace a CSV file by ``rows``, all with the keys of the first."""
    with whole_file(file) as tmp, tmp.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
