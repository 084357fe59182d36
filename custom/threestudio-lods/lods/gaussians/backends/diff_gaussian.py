"""The CUDA kernels of 3DGS (github.com/graphdeco-inria/diff-gaussian-rasterization, not for
commercial use) and their forks behind our function.

They are on no package index: who has built them can use them. A camera takes a call for every
three channels, see :mod:`.inria`."""

import importlib
from functools import lru_cache
from typing import Any

from lods.gaussians.backends import inria
from lods.gaussians.backends.base import Drawn

INSTALL = (
    "with a CUDA toolkit (nvcc), pip install --no-build-isolation "
    "git+https://github.com/graphdeco-inria/diff-gaussian-rasterization"
)
refuses = inria.refuses


@lru_cache(maxsize=1)
def missing() -> str:
    """Why the package cannot be used here, with the remedy; empty if it can."""
    return inria.missing("diff_gaussian_rasterization", INSTALL)


def rasterization(**arguments: Any) -> Drawn:
    """See :func:`lods.gaussians.rasterization`."""
    package = importlib.import_module("diff_gaussian_rasterization")
    return inria.rasterization(package, arguments)
