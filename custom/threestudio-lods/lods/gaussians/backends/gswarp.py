"""gswarp's CUDA kernels behind our signature (github.com/fancifulland2718/gswarp, Apache-2.0).

Written for NVIDIA Warp, which compiles them on first use with what its wheel brings: no nvcc.
One call a camera draws colours, depth and alpha."""

from functools import lru_cache

from lods.gaussians.backends import inria as raster_inria

refuses = raster_inria.refuses


@lru_cache(maxsize=1)
def missing() -> str:
    """Why gswarp cannot be used here, with the remedy; empty if it can."""
    return raster_inria.missing("gswarp", "pip install gswarp")


def rasterization(*args):
    """See ``rasterize.rasterization``."""
    import gswarp

    if not gswarp.get_compute_depth():  # an environment variable can turn it off
        gswarp.set_compute_depth(True)
    return raster_inria.rasterization(
        gswarp, *args, extras=lambda out: (out[2].depth, out[2].alpha)
    )
