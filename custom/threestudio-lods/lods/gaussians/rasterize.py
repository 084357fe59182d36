"""Drawing 3D Gaussians: one function, with the signature of gsplat's, over several backends."""

from typing import Any

from jaxtyping import Float
from lods.gaussians import backends
from lods.gaussians.backends import resolve_backend
from torch import Tensor

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")


def rasterization(
    means: Float[Tensor, "*B N 3"],
    quats: Float[Tensor, "*B N 4"],
    scales: Float[Tensor, "*B N 3"],
    opacities: Float[Tensor, "*B N"],
    colors: Float[Tensor, "*BC N D"],
    viewmats: Float[Tensor, "*B C 4 4"],
    Ks: Float[Tensor, "*B C 3 3"],
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Float[Tensor, "*B C D"] | None = None,
    render_mode: str = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: str = "pinhole",
    segmented: bool = False,
    covars: Float[Tensor, "*B N 3 3"] | None = None,
    with_ut: bool = False,
    with_eval3d: bool = False,
    radial_coeffs: Tensor | None = None,
    tangential_coeffs: Tensor | None = None,
    thin_prism_coeffs: Tensor | None = None,
    ftheta_coeffs: Any = None,
    rolling_shutter: Any = "GLOBAL",
    viewmats_rs: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*B C H W X"], Float[Tensor, "*B C H W 1"], dict[str, Any]]:
    """Draws N Gaussians into C images; on a CPU with compiled kernels.

    The arguments are those of ``gsplat.rasterization`` 1.5 (github.com/nerfstudio-project/gsplat),
    in its order and with its defaults, and so are the formulas, which
    :mod:`lods.gaussians.reference` has. Leading batch dimensions ``*B`` are scenes, each with its
    own Gaussians and cameras.

    Args:
        means: centres in the world.
        quats: rotations (w, x, y, z), normalised here.
        scales: standard deviations along the axes, in world units (not their logarithm).
        opacities: 0 to 1; below 1/255 nothing is drawn.
        colors: any number of channels, for all cameras (N, D) or for each (C, N, D); with
            ``sh_degree`` coefficients of spherical harmonics, (N, K, 3) or (C, N, K, 3).
        viewmats: world to camera, OpenCV axes (x right, y down, z forward). Differentiable.
        Ks: intrinsics in pixels; the centre of the first pixel is (0.5, 0.5). No gradient.
        near_plane, far_plane: range of camera z that is drawn; near_plane > 0.
        radius_clip: Gaussians whose extents [pixels, rounded up] are at most this are not drawn.
        eps2d: variance added to the projected Gaussians [pixels^2].
        sh_degree: the colours are then max(1/2 + sum_k c_k Y_k(direction from the camera), 0) over
            the first (sh_degree + 1)^2 harmonics, in the order and with the signs of 3DGS.
        packed: whether ``info`` has a row for each drawn pair of a camera and a Gaussian (as
            gsplat's strategies take it with ``packed=True``), or (C, N) entries. The images are
            the same.
        tile_size: 16 leaves it to the backend; ``cpu`` also takes 32. The images do not depend on
            it.
        backgrounds: colours behind everything; depth has the background 0.
        render_mode: ``RGB``; ``D``, accumulated depth sum_i w_i z_i; ``ED``, expected depth, the
            former over the alpha; ``RGB+D`` and ``RGB+ED``, with the depth as the last channel.
        absgrad: also leaves ``info["means2d"].absgrad`` after backward (AbsGS, arXiv 2404.10484).
        channel_chunk: at most so many channels are blended at a time, to save memory; ``cpu``
            blends 4, whatever more is allowed.
        sparse_grad, rasterize_mode, distributed, camera_model, segmented, covars, with_ut,
        with_eval3d, ..., viewmats_rs: see gsplat. Its backend takes them all, the others refuse
            every value but the default.
        backend: ``auto``, or a name of :func:`lods.gaussians.backend_names`.

    Returns the images (X = D, 1 or D + 1 channels), the alphas, and ``info``, which has what
    gsplat's densification strategies need: ``means2d``, a node of the autograd graph
    (``retain_grad`` works), ``radii`` [pixels], 0 for what is not drawn, ``conics`` (the entries
    xx, xy, yy of the inverse covariances), ``depths`` and ``opacities``, each (C, N, ...) or with
    ``packed`` (P, ...), then with ``batch_ids``, ``camera_ids`` and ``gaussian_ids`` (P); and
    ``width``, ``height``, ``n_batches``, ``n_cameras``, ``eps2d``. gsplat's lists of tiles are not
    in it, unless gsplat has drawn.

    Raises ``ValueError``, one line, for shapes that do not fit, an unknown mode, and a backend that
    is unknown, not usable here, or does not do what is asked for: nothing is ignored.
    """
    arguments = {name: value for name, value in locals().items() if name != "backend"}
    _check_shapes(arguments)
    if render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode {render_mode!r} is unknown; choose from {RENDER_MODES}")
    if render_mode == "RGB" and not colors.shape[-1]:
        raise ValueError("colors has no channels: give some, or draw depth with render_mode='D'")
    if near_plane <= 0 or width <= 0 or height <= 0:
        raise ValueError("near_plane, width and height must be greater than 0")
    if channel_chunk < 1 or not radius_clip >= 0:
        raise ValueError("channel_chunk must be 1 or more, and radius_clip 0 or more")

    name = resolve_backend(backend, means.device, arguments)
    image, alpha, info = backends.get(name).rasterization(**arguments)
    info.setdefault("eps2d", eps2d)  # which tells a Gaussian's own size from what was added to it
    return image, alpha, info


def _check_shapes(a: dict[str, Any]) -> None:
    means, viewmats, colors = a["means"], a["viewmats"], a["colors"]
    if means.ndim < 2 or viewmats.ndim < 3:
        raise ValueError("means must be (..., N, 3) and viewmats (..., C, 4, 4)")
    lead, n, cameras = tuple(means.shape[:-2]), means.shape[-2], viewmats.shape[-3]
    expected = {
        "means": (*lead, n, 3),
        "opacities": (*lead, n),
        "viewmats": (*lead, cameras, 4, 4),
        "Ks": (*lead, cameras, 3, 3),
    }
    if a["covars"] is None:
        expected |= {"quats": (*lead, n, 4), "scales": (*lead, n, 3)}
    else:
        expected["covars"] = (*lead, n, 3, 3)
    tail = colors.shape[-1:]
    if a["sh_degree"] is not None:
        least = (a["sh_degree"] + 1) ** 2
        if colors.ndim < 2 or colors.shape[-2] < least:
            raise ValueError(
                f"sh_degree={a['sh_degree']} needs colors of at least {least} harmonics, "
                f"(..., N, K, 3), and their shape is {tuple(colors.shape)}"
            )
        tail = (colors.shape[-2], 3)
    own = colors.ndim == len(lead) + 2 + len(tail)
    expected["colors"] = (*lead, *((cameras,) if own else ()), n, *tail)
    if a["backgrounds"] is not None:
        expected["backgrounds"] = (*lead, cameras, tail[-1])
    for name, shape in expected.items():
        if tuple(a[name].shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(a[name].shape)}, expected {shape}")
