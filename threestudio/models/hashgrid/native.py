"""tiny-cuda-nn's own hash grid (CUDA), with parameters that belong to us."""

from functools import lru_cache

import torch

from threestudio.utils.typing import *

from .layout import GridLayout

# Its setup.py imports torch, which a build in isolation does not have, and pkg_resources, which
# setuptools has left out since version 81.
INSTALL = (
    "with a CUDA toolkit (nvcc), pip install 'setuptools<81' wheel ninja && "
    "pip install --no-build-isolation "
    "'git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch'"
)
KEYS = (
    "n_levels",
    "n_features_per_level",
    "log2_hashmap_size",
    "base_resolution",
    "per_level_scale",
    "interpolation",
)


@lru_cache
def missing() -> str:
    """Why tiny-cuda-nn cannot be used, and what to do; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        import tinycudann  # noqa: F401
    except ImportError:
        return f"tinycudann is not installed; {INSTALL}"
    except Exception as error:  # it raises OSError for a device that it was not built for
        return f"tinycudann does not load ({error}); build it here: {INSTALL}"
    return ""


@lru_cache
def _module(layout: GridLayout):
    """The module of a configuration, without parameters."""
    import tinycudann

    config = {"otype": "HashGrid", **{key: getattr(layout, key) for key in KEYS}}
    module = tinycudann.Encoding(layout.n_input_dims, config, dtype=torch.float32)
    del module.params
    return module


def encode(
    x: Float[Tensor, "N D"], params: Float[Tensor, "P"], layout: GridLayout
) -> Float[Tensor, "N LF"]:
    """See ``twin._hash_encode_torch``; float32, on a CUDA device."""
    module = _module(layout)
    # The dictionary, since nn.Module would take a Parameter for the module's own.
    module.__dict__["params"] = params
    try:
        return module(x)
    finally:
        del module.__dict__["params"]
