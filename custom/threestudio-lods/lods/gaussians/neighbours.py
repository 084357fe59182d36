"""The initial sizes of Gaussians, from the distances to their nearest neighbours.

``scipy`` (a k-d tree in float64, any machine) is the reference; ``simple-knn``, the CUDA
extension of 3DGS, and ``gswarp`` have the function ``distCUDA2``, the mean of the three squared
distances in float32.
"""

import importlib
from functools import lru_cache

import numpy as np
import torch
from lods import log
from scipy.spatial import cKDTree  # type: ignore[attr-defined]

# In the order that ``auto`` tries them: a package, its module, and how to get it. The package that
# pip knows as simple-knn is another one.
CUDA_BACKENDS = {
    "simple-knn": (
        "simple_knn._C",
        "with a CUDA toolkit (nvcc), pip install --no-build-isolation "
        "git+https://github.com/camenduru/simple-knn",
    ),
    "gswarp": ("gswarp", "pip install gswarp"),
}
KNN_BACKENDS = ("auto", "scipy", *CUDA_BACKENDS)


def _distances(backend: str):
    """``distCUDA2`` of a CUDA backend."""
    return importlib.import_module(CUDA_BACKENDS[backend][0]).distCUDA2


@lru_cache
def missing(backend: str) -> str:
    """Why a CUDA backend cannot be used here, with the remedy; empty if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; use knn_backend=scipy"
    module, remedy = CUDA_BACKENDS[backend]
    try:
        _distances(backend)
    except Exception as error:
        return f"{module} cannot be loaded ({' '.join(str(error).split())[:200]}); {remedy}"
    return ""


def resolve_knn_backend(backend: str, device: torch.device) -> str:
    """The backend to use; ``auto`` is the first of CUDA_BACKENDS that works, on CUDA devices, else
    scipy. Raises ``ValueError`` for an unknown or an unusable one."""
    if backend not in KNN_BACKENDS:
        raise ValueError(
            f"system.geometry.knn_backend={backend!r} is unknown; choose from {KNN_BACKENDS}"
        )
    if backend in CUDA_BACKENDS:
        why = missing(backend)
        if not why and device.type != "cuda":
            why = f"the Gaussians are on {device.type}, not on a CUDA device"
        if why:
            raise ValueError(f"system.geometry.knn_backend={backend} is not usable: {why}")
    elif backend == "auto":
        usable = CUDA_BACKENDS if device.type == "cuda" else ()
        backend = next((name for name in usable if not missing(name)), "scipy")
    return backend


def neighbour_scale(
    xyz: np.ndarray,
    device: torch.device | None = None,
    backend: str = "scipy",
    minimum: float = 1e-7,
) -> np.ndarray:
    """The root mean square distance (N,) of each point to its 3 nearest neighbours:
    ``sqrt(max(mean_k d_k^2, minimum))``, the initial size of 3DGS (arXiv:2308.04079).

    ``xyz`` (N, 3), N at least 4, in world units, as is the result. ``device``: where a CUDA
    backend works, else unused. Raises ``ValueError`` for fewer points and an unusable backend."""
    if len(xyz) < 4:
        raise ValueError(
            f"{len(xyz)} points are too few to size the Gaussians by their 3 nearest neighbours"
        )
    backend = resolve_knn_backend(backend, device or torch.device("cpu"))
    log.debug(f"initial sizes of the Gaussians: {backend}")
    if backend == "scipy":
        distance, _ = cKDTree(xyz).query(xyz, k=4)
        squared = (distance[:, 1:] ** 2).mean(1)
    else:
        points = torch.from_numpy(xyz).float().to(device).contiguous()
        squared = _distances(backend)(points).double().cpu().numpy()
    return np.sqrt(np.maximum(squared, minimum))
