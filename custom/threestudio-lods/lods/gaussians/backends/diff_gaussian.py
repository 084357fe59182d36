"""The CUDA kernels of 3DGS (github.com/graphdeco-inria/diff-gaussian-rasterization, not for
commercial use) and their forks behind our signature.

They are on no package index: who has built them can use them. A camera takes a call for every
three channels, see ``raster_inria``."""

from functools import lru_cache

from lods.gaussians.backends import inria as raster_inria

INSTALL = (
    "with a CUDA toolkit (nvcc), pip install --no-build-isolation "
    "git+https://github.com/graphdeco-inria/diff-gaussian-rasterization"
)
refuses = raster_inria.refuses


@lru_cache(maxsize=1)
def missing() -> str:
    """Why the package cannot be used here, with the remedy; empty if it can."""
    return raster_inria.missing("diff_gaussian_rasterization", INSTALL)


def rasterization(*args):
    """See ``rasterize.rasterization``."""
    import diff_gaussian_rasterization

    return raster_inria.rasterization(diff_gaussian_rasterization, *args)
