"""What a rasteriser backend is, and what the backends of this folder share.

A backend is a module or an object with one function, ``rasterization``, and as many of the others
of :class:`Backend` as it needs. It gets the arguments of :func:`lods.gaussians.rasterization` by
name, checked and complete; one that names a few of them takes the rest as ``**rest``.
"""

import enum
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from lods.gaussians.harmonics import SH_C0, spherical_harmonics
from torch import Tensor

Drawn = tuple[Tensor, Tensor, dict[str, Any]]

# gsplat's arguments that a backend may leave undone, with the values that all of them do
PLAIN: dict[str, Any] = {
    "tile_size": 16,
    "sparse_grad": False,
    "rasterize_mode": "classic",
    "distributed": False,
    "camera_model": "pinhole",
    "segmented": False,
    "covars": None,
    "with_ut": False,
    "with_eval3d": False,
    "radial_coeffs": None,
    "tangential_coeffs": None,
    "thin_prism_coeffs": None,
    "ftheta_coeffs": None,
    "rolling_shutter": "GLOBAL",
    "viewmats_rs": None,
}
GEOMETRY = ("means", "quats", "scales", "opacities", "viewmats", "Ks")


class Backend(Protocol):
    """The parts of a backend. All but ``rasterization`` may be absent: a backend without
    ``missing`` is always there, one without ``refuses`` draws everything."""

    def missing(self) -> str:
        """Why the backend cannot be used on this machine, with the remedy; empty if it can."""
        ...

    def refuses(self, **arguments: Any) -> str:
        """Why the backend cannot draw this; empty if it can. Nothing may be left out silently."""
        ...

    def rasterization(self, **arguments: Any) -> Drawn:
        """Images, alphas and ``info``, as :func:`lods.gaussians.rasterization` returns them."""
        ...


def unsupported(arguments: dict[str, Any], **also: tuple[Any, ...]) -> str:
    """The first argument with a value other than that of ``PLAIN`` or one of ``also``, in words;
    empty if there is none."""
    for name, plain in PLAIN.items():
        value, allowed = arguments[name], (plain, *also.get(name, ()))
        value = value.name if isinstance(value, enum.Enum) else value  # gsplat's
        if any(value is one or (not isinstance(value, Tensor) and value == one) for one in allowed):
            continue
        if plain is None:
            return f"{name} is not supported: leave it out"
        words = " or ".join(repr(one) for one in allowed)
        return f"{name}={value!r} is not supported, only {words}"
    degree = arguments["sh_degree"]
    if degree is not None and degree not in (0, 1, 2, 3):
        return f"sh_degree={degree} is not supported, only 0 to 3"
    return ""


def channels_of(arguments: dict[str, Any]) -> int:
    """The number of channels that are blended, the depth among them."""
    mode, colors = arguments["render_mode"], arguments["colors"]
    return colors.shape[-1] * mode.startswith("RGB") + (mode != "RGB")


def plain_colors(arguments: dict[str, Any]) -> Float[Tensor, "*BC N D"]:
    """The colours that are blended. With ``sh_degree`` = L, max(1/2 + sum_k c_k Y_k(d), 0) over
    the first (L + 1)^2 harmonics, d the direction from the camera to the mean."""
    colors, degree = arguments["colors"], arguments["sh_degree"]
    if degree is None:
        return colors
    shown = SH_C0 * colors[..., 0, :] + 0.5
    if degree > 0:
        means, lead = arguments["means"], arguments["means"].ndim - 2
        if colors.ndim == lead + 3:  # the same for all cameras
            colors, shown = colors[..., None, :, :, :], shown[..., None, :, :]
        centres = torch.inverse(arguments["viewmats"])[..., :3, 3]
        directions = F.normalize(means[..., None, :, :] - centres[..., None, :], dim=-1)
        basis = spherical_harmonics(directions, degree)
        shown = shown + (basis[..., None] * colors[..., 1 : (degree + 1) ** 2, :]).sum(-2)
    return shown.clamp_min(0.0)


def results(
    image: Float[Tensor, "*B C H W X"],
    alpha: Float[Tensor, "*B C H W 1"],
    means2d: Float[Tensor, "*B C N 2"],
    conics: Float[Tensor, "*B C N 3"],
    depths: Float[Tensor, "*B C N"],
    radii: Num[Tensor, "*B C N 2"],
    opacities: Float[Tensor, "*B N"],
    render_mode: str,
) -> Drawn:
    """What ``rasterization`` returns, from a drawing whose depth is still the accumulated one."""
    if render_mode.endswith("ED"):
        depth = image[..., -1:] / alpha.clamp(min=1e-10)
        image = torch.cat([image[..., :-1], depth], dim=-1)
    *lead, cameras, height, width = image.shape[:-1]
    info = {
        "batch_ids": None,
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": radii.int(),
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opacities[..., None, :].expand(*lead, cameras, -1),
        "width": width,
        "height": height,
        "n_batches": int(torch.Size(lead).numel()),
        "n_cameras": cameras,
    }
    return image, alpha, info


def pack(
    info: dict[str, Any], means2d: Float[Tensor, "P 2"], drawn: tuple[Tensor, ...]
) -> dict[str, Any]:
    """``info`` with the entries of the drawn (image, Gaussian) pairs only, ``drawn`` being their
    indices and ``means2d`` their part of the autograd graph."""
    *batch, cameras, gaussians = drawn
    size = info["radii"].shape[:-3]
    number = torch.zeros_like(cameras)
    for index, count in zip(batch, size):
        number = number * count + index
    found = {name: info[name][drawn] for name in ("radii", "depths", "conics", "opacities")}
    ids = {"batch_ids": number, "camera_ids": cameras, "gaussian_ids": gaussians}
    return {**info, **found, **ids, "means2d": means2d}


def project_and_blend(
    project: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    composite: Callable[..., tuple[Tensor, Tensor]],
    arguments: dict[str, Any],
    **options: Any,
) -> Drawn:
    """The drawing of a backend that consists of the two steps of :mod:`lods.gaussians.reference`,
    ``project`` and ``composite``, for one scene each. ``options`` go to ``composite``, which with
    ``absgrad`` also takes ``keep_absgrad``.

    The images depend on ``info["means2d"]``, whatever its form: its gradient is what
    densification reads.
    """
    a = {**arguments, "colors": plain_colors(arguments)}
    lead, device = a["means"].shape[:-2], a["means"].device
    scenes = _scenes(a, len(lead))
    sizes = a["width"], a["height"]
    planes = a["near_plane"], a["far_plane"], a["eps2d"]
    projected = [project(*(s[name] for name in GEOMETRY), *sizes, *planes) for s in scenes]
    means2d, conics, depths, extents = (_joined(parts, lead) for parts in zip(*projected))
    if a["radius_clip"] > 0:
        small = (extents.ceil() <= a["radius_clip"]).all(-1, keepdim=True)
        extents = extents.masked_fill(small, 0.0)
    means2d = means2d.to(device)  # here, since the same tensor gets the absgrad
    seen = node = means2d
    drawn: tuple[Tensor, ...] = ()
    if a["packed"]:
        drawn = (extents > 0).all(-1).to(device).nonzero(as_tuple=True)
        node = means2d[drawn]
        seen = torch.zeros_like(means2d).index_put(drawn, node)

    absolute = means2d.new_zeros(len(scenes), *means2d.shape[-3:]) if a["absgrad"] else None

    def keep(index: int, gradient: Tensor) -> None:
        assert absolute is not None
        absolute[index] = gradient.to(device)
        whole = absolute.view(means2d.shape)
        node.absgrad = whole[drawn] if a["packed"] else whole  # type: ignore[attr-defined]

    with_depth = a["render_mode"] != "RGB"
    images, alphas = [], []
    for i, scene in enumerate(scenes):
        colors, backgrounds = scene["colors"], scene["backgrounds"]
        if not a["render_mode"].startswith("RGB"):
            colors, backgrounds = colors[..., :0], None
        own = [_part(x, i, len(lead)) for x in (seen, conics, depths, extents)]
        if absolute is not None:
            options["keep_absgrad"] = lambda gradient, i=i: keep(i, gradient)
        image, alpha = composite(
            own[0], own[1], scene["opacities"], colors, own[2], own[3], *sizes, backgrounds,
            with_depth, **options,
        )  # fmt: skip
        images.append(image)
        alphas.append(alpha)
    image, alpha = _joined(images, lead).to(device), _joined(alphas, lead).to(device)
    conics, depths, radii = (x.to(device) for x in (conics, depths, extents.ceil()))
    rest = conics, depths, radii, a["opacities"], a["render_mode"]
    image, alpha, info = results(image, alpha, means2d, *rest)
    return image, alpha, pack(info, node, drawn) if a["packed"] else info


def _scenes(a: dict[str, Any], n_lead: int) -> list[dict[str, Any]]:
    """The arguments of each scene of a batch."""
    names = (*GEOMETRY, "colors", "backgrounds")
    count = int(a["means"].shape[:n_lead].numel())
    return [{name: _part(a[name], i, n_lead) for name in names} for i in range(count)]


def _part(value: Any, index: int, n_lead: int) -> Any:
    """One scene's part; a tensor without batch dimensions as it is."""
    return value if value is None or n_lead == 0 else value.flatten(0, n_lead - 1)[index]


def _joined(parts: Any, lead: torch.Size) -> Tensor:
    parts = list(parts)
    return parts[0] if not lead else torch.stack(parts).unflatten(0, tuple(lead))
