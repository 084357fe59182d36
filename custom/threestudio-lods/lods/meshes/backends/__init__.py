"""The rasterisers of triangles, by name: ``cpu`` (numba, any machine), ``reference`` (torch, dense:
slow, any device and float dtype) and on CUDA ``nvdiffrast``. A backend is a module with the four
functions of :mod:`lods.meshes.reference`: ``rasterize``, ``interpolate``, ``sample`` and
``antialias``."""

import importlib
from functools import lru_cache
from typing import Any

import torch
from lods import log
from lods.gaussians.backends import may_compile
from lods.settings import nearest

BACKENDS = ("auto", "cpu", "reference", "nvdiffrast")


def unknown(name: Any) -> str:
    """What is wrong with a name that is not one of ``BACKENDS``, after the name of its setting."""
    return f"must be one of {', '.join(BACKENDS)}, not {name!r}{nearest(name, BACKENDS)}"


def get(name: str) -> Any:
    """The module of a name other than ``auto``. Within :func:`lods.gaussians.backends.uncompiled`
    ``cpu`` is drawn by :mod:`.tiles` if its kernels are not kept from an earlier process."""
    module = importlib.import_module(f"{__name__}.{name}")
    if name == "cpu" and not may_compile() and not module.is_compiled():
        return importlib.import_module(f"{__name__}.tiles")
    return module


@lru_cache
def _announce(backend: str, reason: str) -> None:
    tell = log.warn if reason else log.info
    tell(f"triangle rasteriser: {backend}{reason}")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend to use for tensors on ``device``; ``auto`` is nvdiffrast on CUDA devices where it
    can be loaded, else cpu. Raises ``ValueError``, one line, for an unknown or unusable one."""
    if backend not in BACKENDS:
        raise ValueError(f"the rasteriser backend {unknown(backend)}")
    if backend == "nvdiffrast" or (backend == "auto" and device.type == "cuda"):
        why = get("nvdiffrast").missing()
        if not why and device.type != "cuda":
            why = f"the mesh is on {device.type}, not on a CUDA device"
        if not why:
            backend = "nvdiffrast"
        elif backend == "nvdiffrast":
            raise ValueError(f"the rasteriser backend 'nvdiffrast' is not usable: {why}")
        else:
            _announce("cpu", f" (nvdiffrast: {why}), which is far slower than the GPU")
            return "cpu"
    backend = "cpu" if backend == "auto" else backend
    _announce(backend, "")
    return backend
