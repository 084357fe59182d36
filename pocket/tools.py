"""What this package takes from the library: files that are whole or absent, compiled kernels, and
the encoder of cameras.

The only place that says where they are, and ``say`` for the lines of trainings that take hours.
"""

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("lods") is None:  # not installed: the one of this repository
    sys.path.append(str(Path(__file__).resolve().parents[1] / "custom" / "threestudio-lods"))

from lods.files import whole_file
from lods.gaussians.kernel_cache import kernel
from lods.models.camera_tokens import CameraTokens

__all__ = ["CameraTokens", "kernel", "say", "whole_file"]


def say(*values) -> None:
    """Print a line of progress. Output that cannot be written any more (its reader is gone, its
    terminal closed, its disk full) ends no training: what is said from then on goes nowhere."""
    try:
        print(*values, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
