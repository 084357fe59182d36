"""Drawing 3D Gaussians: one function, several backends.

``cpu`` (numba, any machine), ``torch`` (the dense twin: slow, any device and float dtype), and on
CUDA ``gsplat``, ``gswarp`` and ``diff-gaussian-rasterization``. ``cpu``, ``torch`` and ``gsplat``
give the same images, gradients and ``info``; the other two differ as ``raster_inria`` says.
"""

import importlib
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Num
from lods import log
from torch import Tensor

# In the order that ``auto`` tries them: gsplat draws all cameras and channels in one go, gswarp
# takes a call a camera, diff-gaussian-rasterization one a camera and three channels.
CUDA_BACKENDS = {
    "gsplat": "raster_gsplat",
    "gswarp": "raster_gswarp",
    "diff-gaussian-rasterization": "raster_diff_gaussian",
}
BACKENDS = ("auto", "cpu", "torch", *CUDA_BACKENDS)
RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")


@lru_cache
def announce(backend: str, reason: str, fallback: bool = False) -> None:
    """One log line, once; a warning where it is much slower than it could be."""
    tell = log.warn if fallback else log.info
    tell(f"Gaussian rasteriser: {backend}{reason}")


def adapter(backend: str):
    """The module of a CUDA backend."""
    return importlib.import_module(f"{__package__}.{CUDA_BACKENDS[backend]}")


def _unusable(backend: str, device: torch.device, scene: tuple | None) -> str:
    """Why a CUDA backend cannot be used; empty where it can."""
    module = adapter(backend)
    missing = module.missing()
    if not missing and device.type != "cuda":
        missing = f"the Gaussians are on {device.type}, not on a CUDA device"
    return missing or ("" if scene is None else module.refuses(*scene))


def resolve_backend(backend: str, device: torch.device, scene: tuple | None = None) -> str:
    """The backend to use for tensors on ``device``; ``auto`` is the first of CUDA_BACKENDS that
    works, on CUDA devices, else cpu. ``scene``: the arguments of a backend's ``refuses``, if it
    is also to be asked whether it can draw that. Raises ``ValueError`` for an unknown or an
    unusable backend."""
    if backend not in BACKENDS:
        raise ValueError(f"rasteriser backend {backend!r} is unknown; choose from {BACKENDS}")
    reasons = []
    if backend in CUDA_BACKENDS:
        why = _unusable(backend, device, scene)
        if why:
            raise ValueError(f"rasteriser backend {backend!r} is not usable: {why}")
    elif backend == "auto":
        backend = "cpu"
        for name in CUDA_BACKENDS if device.type == "cuda" else ():
            why = _unusable(name, device, scene)
            if not why:
                backend = name
                break
            reasons.append(f"{name}: {why}")
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    if reasons and backend == "cpu":
        remedy = "'pip install gswarp' brings a rasteriser for the GPU that needs no compiler"
        announce(backend, f"{reason}, which is far slower than the GPU: {remedy}", fallback=True)
    else:
        announce(backend, reason)
    return backend


def packed(
    image: Float[Tensor, "C H W X"],
    alpha: Float[Tensor, "C H W 1"],
    means2d: Float[Tensor, "C N 2"],
    conics: Float[Tensor, "C N 3"],
    depths: Float[Tensor, "C N"],
    radii: Num[Tensor, "C N 2"],
    opacities: Float[Tensor, " N"],
    render_mode: str,
) -> tuple[Float[Tensor, "C H W X"], Float[Tensor, "C H W 1"], dict[str, Any]]:
    """What ``rasterization`` returns, from a drawing whose depth is still the accumulated one."""
    if render_mode.endswith("ED"):
        depth = image[..., -1:] / alpha.clamp(min=1e-10)
        image = torch.cat([image[..., :-1], depth], dim=-1)
    cameras, height, width = image.shape[:3]
    info = {
        "batch_ids": None,
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": radii.int(),
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opacities.expand(cameras, -1),
        "width": width,
        "height": height,
        "n_batches": 1,
        "n_cameras": cameras,
    }
    return image, alpha, info


def rasterization(
    means: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    scales: Float[Tensor, "N 3"],
    opacities: Float[Tensor, " N"],
    colors: Float[Tensor, "*C N D"],
    viewmats: Float[Tensor, "C 4 4"],
    Ks: Float[Tensor, "C 3 3"],
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    backgrounds: Float[Tensor, "C D"] | None = None,
    render_mode: str = "RGB",
    absgrad: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "C H W X"], Float[Tensor, "C H W 1"], dict[str, Any]]:
    """Draws N Gaussians into C images. The arguments are those of ``gsplat.rasterization`` 1.5.

    Args:
        means: centres in the world.
        quats: rotations (w, x, y, z), normalised here.
        scales: standard deviations along the axes, in world units (not their logarithm).
        opacities: 0 to 1; below 1/255 nothing is drawn.
        colors: any number of channels, for all cameras (N, D) or for each (C, N, D).
        viewmats: world to camera, OpenCV axes (x right, y down, z forward). Differentiable.
        Ks: intrinsics in pixels; the centre of the first pixel is (0.5, 0.5). No gradient.
        near_plane, far_plane: range of camera z that is drawn; near_plane > 0.
        eps2d: variance added to the projected Gaussians [pixels^2].
        backgrounds: colours behind everything; depth has the background 0.
        render_mode: ``RGB``; ``D``, accumulated depth sum_i w_i z_i; ``ED``, expected depth, the
            former over the alpha; ``RGB+D`` and ``RGB+ED``, with the depth as the last channel.
        absgrad: also leaves ``info["means2d"].absgrad`` after backward (AbsGS, arXiv 2404.10484).
        backend: see the module.

    Returns the images (X = D, 1 or D + 1 channels), the alphas, and ``info``, which has what
    gsplat's densification strategies need: ``means2d`` (C, N, 2), a node of the autograd graph
    (``retain_grad`` works), ``radii`` (C, N, 2), 0 for what is not drawn, ``conics``, ``depths``,
    ``opacities`` (C, N), ``width``, ``height``, ``n_cameras``, ``gaussian_ids`` (None).

    Raises ``ValueError`` for shapes that do not fit, an unknown mode, or an unusable backend.
    """
    n, cameras = means.shape[0], viewmats.shape[0]
    expected = {
        "means": (means, (n, 3)),
        "quats": (quats, (n, 4)),
        "scales": (scales, (n, 3)),
        "opacities": (opacities, (n,)),
        "viewmats": (viewmats, (cameras, 4, 4)),
        "Ks": (Ks, (cameras, 3, 3)),
        "colors": (colors, ((cameras,) if colors.ndim == 3 else ()) + (n, colors.shape[-1])),
    }
    if backgrounds is not None:
        expected["backgrounds"] = (backgrounds, (cameras, colors.shape[-1]))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {shape}")
    if render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode {render_mode!r} is unknown; choose from {RENDER_MODES}")
    if render_mode == "RGB" and not colors.shape[-1]:
        raise ValueError("colors has no channels: give some, or draw depth with render_mode='D'")
    if near_plane <= 0 or width <= 0 or height <= 0:
        raise ValueError("near_plane, width and height must be greater than 0")

    scene = viewmats, Ks, width, height, eps2d, absgrad
    backend = resolve_backend(backend, means.device, scene)
    if backend in CUDA_BACKENDS:
        return adapter(backend).rasterization(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane,
            far_plane, eps2d, backgrounds, render_mode, absgrad,
        )  # fmt: skip
    options = {}
    if backend == "cpu":
        from lods.gaussians.backends.cpu import composite, project

        channels = colors.shape[-1] * render_mode.startswith("RGB") + (render_mode != "RGB")
        if absgrad and channels > 4:
            raise ValueError(
                f"absgrad of the 'cpu' rasteriser is for 4 channels at most, not {channels}: depth "
                "counts as one"
            )
    else:
        from lods.gaussians.reference import composite, project

        if absgrad:
            raise ValueError("the 'torch' rasteriser has no absgrad; use backend='cpu'")

    means2d, conics, depths, extents = project(
        means, quats, scales, opacities, viewmats, Ks, width, height, near_plane, far_plane, eps2d
    )
    device = means.device
    means2d = means2d.to(device)  # here, since the same tensor gets the absgrad
    if absgrad:
        options["keep_absgrad"] = lambda grad: setattr(means2d, "absgrad", grad.to(device))
    with_depth = render_mode != "RGB"
    if not render_mode.startswith("RGB"):
        colors, backgrounds = colors[..., :0], None
    image, alpha = composite(
        means2d, conics, opacities, colors, depths, extents, width, height, backgrounds,
        with_depth, **options,
    )  # fmt: skip
    results = (x.to(device) for x in (image, alpha, means2d, conics, depths, extents.ceil()))
    return packed(*results, opacities, render_mode)
