"""gsplat's CUDA kernels behind our function (github.com/nerfstudio-project/gsplat, Apache-2.0)."""

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def missing() -> str:
    """Why gsplat cannot be used here, with the remedy; empty if it can.

    gsplat's wheel on PyPI compiles its kernels on first use (minutes; needs nvcc)."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; use backend='cpu'"
    try:
        compiled = importlib.import_module("gsplat.cuda._backend")._C
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"gsplat cannot be loaded ({reason}); pip install gsplat, with a CUDA toolkit (nvcc)"
    if compiled is None:
        return (
            "gsplat is installed without its CUDA kernels; install a CUDA toolkit (nvcc), or a "
            "prebuilt wheel from https://docs.gsplat.studio/whl"
        )
    return ""


def rasterization(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """See :func:`lods.gaussians.rasterization`; every argument goes to gsplat as it is, tensors in
    single precision."""
    from gsplat import rasterization as gsplat_rasterization
    from gsplat.cuda._wrapper import RollingShutterType

    shutter = arguments["rolling_shutter"]
    if isinstance(shutter, str):
        arguments["rolling_shutter"] = RollingShutterType[shutter]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = value.float()
    return gsplat_rasterization(**arguments)
