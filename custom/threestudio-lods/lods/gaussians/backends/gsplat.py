"""gsplat's CUDA kernels behind our signature (github.com/nerfstudio-project/gsplat, Apache-2.0)."""

from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def missing() -> str:
    """Why gsplat cannot be used here, with the remedy; empty if it can.

    gsplat's wheel on PyPI compiles its kernels on first use (minutes; needs nvcc)."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; use backend='cpu'"
    try:
        from gsplat.cuda._backend import _C
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"gsplat cannot be loaded ({reason}); pip install gsplat, with a CUDA toolkit (nvcc)"
    if _C is None:
        return (
            "gsplat is installed without its CUDA kernels; install a CUDA toolkit (nvcc), or a "
            "prebuilt wheel from https://docs.gsplat.studio/whl"
        )
    return ""


def refuses(*scene) -> str:
    """Why gsplat cannot draw this: it can draw everything."""
    return ""


def rasterization(
    means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane, far_plane,
    eps2d, backgrounds, render_mode, absgrad,
):  # fmt: skip
    """See ``rasterize.rasterization``."""
    from gsplat import rasterization as gsplat_rasterization

    return gsplat_rasterization(
        means.float(), quats.float(), scales.float(), opacities.float(), colors.float(),
        viewmats.float(), Ks.float(), width, height, near_plane=near_plane, far_plane=far_plane,
        eps2d=eps2d, backgrounds=None if backgrounds is None else backgrounds.float(),
        render_mode=render_mode, absgrad=absgrad, packed=False,
    )  # fmt: skip
