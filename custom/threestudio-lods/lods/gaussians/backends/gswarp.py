"""gswarp's CUDA kernels behind our function (github.com/fancifulland2718/gswarp, Apache-2.0).

Written for NVIDIA Warp, which compiles them on first use with what its wheel brings: no nvcc.
One call a camera draws colours, depth and alpha."""

import importlib
from functools import lru_cache
from typing import Any

from lods.gaussians.backends import inria
from lods.gaussians.backends.base import Drawn

refuses = inria.refuses


@lru_cache(maxsize=1)
def missing() -> str:
    """Why gswarp cannot be used here, with the remedy; empty if it can."""
    return inria.missing("gswarp", "pip install gswarp")


def rasterization(**arguments: Any) -> Drawn:
    """See :func:`lods.gaussians.rasterization`."""
    gswarp = importlib.import_module("gswarp")
    if not gswarp.get_compute_depth():  # an environment variable can turn it off
        gswarp.set_compute_depth(True)
    return inria.rasterization(gswarp, arguments, lambda out: (out[2].depth, out[2].alpha))
