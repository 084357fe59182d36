"""Rasterisers with the interface of 3DGS (Kerbl et al. 2023, arXiv 2308.04079) behind our function.

The interface draws one image of 3 channels a call, without depth and, in most of its versions,
without alpha: further channels are drawn in further calls, depth and alpha (the colour 1) among
them. Its conventions, which are turned into ours here:

- matrices are those for row vectors, the transposes of ours; camera axes are OpenCV's;
- the gradient of ``means2D`` is with respect to normalised device coordinates, W/2 by H/2 pixels;
- nothing nearer than 0.2 is drawn. A picture does not depend on the unit of length, so the world
  is scaled until that is our ``near_plane``;
- 0.3 pixels^2 are added to the projected variances, and the principal point is in the middle.

It differs from gsplat in that alpha is at most 0.99 (not 0.999), and in that a Gaussian is cut off
at 3 standard deviations (not 3.33) where a tile of 16 pixels ends: it may lose 0.011 times its
opacity there. ``info["radii"]`` are its own too, 3 standard deviations of the longer axis whatever
the opacity, where the other backends have the extent of what is drawn: ``prune_scale2d`` means
somewhat more here.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lods.gaussians.backends.base import Drawn, plain_colors, results, unsupported
from lods.gaussians.reference import ALPHA_MIN, project
from torch import Tensor

NEAR = 0.2  # of the interface
EPS2D = 0.3  # of the interface


def missing(module: str, remedy: str) -> str:
    """Why a package with the interface cannot be used here, with the remedy; empty if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; use backend='cpu'"
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} cannot be loaded ({' '.join(str(error).split())[:200]}); {remedy}"
    return ""


def refuses(**arguments: Any) -> str:
    """Why the interface cannot draw this; empty if it can."""
    width, height, eps2d = arguments["width"], arguments["height"], arguments["eps2d"]
    plain = unsupported(arguments)
    if plain:
        return f"{plain}; use backend='gsplat'"
    if arguments["means"].ndim > 2:
        return "it has no batch dimensions; use backend='gsplat' or 'cpu'"
    if arguments["packed"]:
        return "packed=True is not supported, only packed=False"
    if arguments["radius_clip"] > 0:
        return "its radii are other ones, so radius_clip must be 0; use backend='gsplat' or 'cpu'"
    if arguments["absgrad"]:
        return "it has no absgrad; use backend='gsplat' or 'cpu', or a strategy without absgrad"
    if abs(eps2d - EPS2D) > 1e-9:
        return f"it draws with eps2d={EPS2D}, not {eps2d}; use backend='gsplat' or 'cpu'"
    if torch.is_grad_enabled() and arguments["viewmats"].requires_grad:
        return "it has no gradient of cameras; use backend='gsplat' or 'cpu'"
    for K in arguments["Ks"].tolist():
        if abs(K[0][2] - width / 2) > 1e-3 * width or abs(K[1][2] - height / 2) > 1e-3 * height:
            return "the principal point is not in the middle; use backend='gsplat' or 'cpu'"
    return ""


def make_settings(
    package: Any,
    viewmat: Float[Tensor, "4 4"],
    K: list[list[float]],
    width: int,
    height: int,
) -> Any:
    """The ``GaussianRasterizationSettings`` of a camera with the background 0."""
    f = viewmat.new_tensor([2 * K[0][0] / width, 2 * K[1][1] / height, 1.0, 1.0]).diag()
    f[3] = viewmat.new_tensor([0.0, 0.0, 1.0, 0.0])  # w = z; nothing reads the clip-space z
    known = {
        "image_height": height,
        "image_width": width,
        "tanfovx": 0.5 * width / K[0][0],
        "tanfovy": 0.5 * height / K[1][1],
        "bg": viewmat.new_zeros(3),
        "scale_modifier": 1.0,
        "viewmatrix": viewmat.T.contiguous(),
        "projmatrix": (f @ viewmat).T.contiguous(),
        "sh_degree": 0,
        "campos": -viewmat[:3, :3].T @ viewmat[:3, 3],
        "prefiltered": False,
        "debug": False,
        "antialiasing": False,
        "auto_tune_verbose": False,
    }
    kind = package.GaussianRasterizationSettings
    unknown = set(kind._fields) - set(known) - set(kind._field_defaults)
    if unknown:
        raise ValueError(
            f"this version of {package.__name__} wants settings that are not known here "
            f"({', '.join(sorted(unknown))}); use backend='gsplat' or 'cpu'"
        )
    return kind(**{name: value for name, value in known.items() if name in kind._fields})


def rasterization(
    package: Any, arguments: dict[str, Any], extras: Callable[..., Any] | None = None
) -> Drawn:
    """See :func:`lods.gaussians.rasterization`; float32, for what ``refuses`` lets pass.

    ``package`` has ``GaussianRasterizationSettings`` and ``GaussianRasterizer``. ``extras`` takes
    what a call returns and gives its depth and alpha (1, H, W), where they have gradients."""
    names = ("means", "quats", "scales", "opacities", "viewmats", "Ks", "width", "height")
    means, quats, scales, opacities, viewmats, Ks, width, height = (arguments[n] for n in names)
    names = ("near_plane", "far_plane", "eps2d", "backgrounds", "render_mode")
    near_plane, far_plane, eps2d, backgrounds, render_mode = (arguments[n] for n in names)
    colors = plain_colors(arguments)
    means, scales, opacities = means.float(), scales.float(), opacities.float()
    quats, colors, viewmats = F.normalize(quats.float(), dim=-1), colors.float(), viewmats.float()
    n = len(means)
    with torch.no_grad():
        means2d, conics, depths, _ = project(
            means, quats, scales, opacities, viewmats, Ks.float(), width, height, near_plane,
            far_plane, eps2d,
        )  # fmt: skip
    means2d.requires_grad_()  # a leaf: the package itself differentiates the projection
    unit = NEAR / near_plane
    with_depth, D = render_mode != "RGB", colors.shape[-1] if "RGB" in render_mode else 0
    images, alphas, radii = [], [], []
    for i, K in enumerate(Ks.tolist()):
        view = viewmats[i].detach().clone()
        view[:3, 3] *= unit
        rasterizer = package.GaussianRasterizer(make_settings(package, view, K, width, height))
        z = means @ viewmats[i, 2, :3].detach() + viewmats[i, 2, 3].detach()
        drawn = (z > near_plane) & (z < far_plane) & (opacities >= ALPHA_MIN)
        offset = (means2d[i] - means2d[i].detach()) * means.new_tensor([2 / width, 2 / height])
        geometry = {
            "means3D": means * unit,
            "means2D": F.pad(offset, (0, 1)),  # 0, and takes the gradient
            "opacities": opacities.where(drawn, 0.0)[:, None],
            "scales": scales * unit,
            "rotations": quats,
        }
        channels = (colors[i] if colors.ndim == 3 else colors)[:, :D]
        if extras is None:
            channels = torch.cat([channels, z[:, None], torch.ones_like(z[:, None])], dim=-1)
        calls = max(1, -(-channels.shape[1] // 3))
        wide = F.pad(channels, (0, 3 * calls - channels.shape[1]))
        outs = [
            rasterizer(colors_precomp=part.contiguous(), **geometry)
            for part in wide.split(3, dim=1)
        ]
        image = torch.cat([out[0] for out in outs])
        if extras is None:
            depth, alpha = image[D : D + 1], image[D + 1 : D + 2]
        else:
            depth, alpha = extras(outs[0])
            depth = depth / unit
        image = torch.cat([image[:D], depth] if with_depth else [image[:D]])
        images.append(image.permute(1, 2, 0))
        alphas.append(alpha.permute(1, 2, 0))
        # the only integers; versions differ in what stands before and after them
        radius = next(x for x in outs[0] if isinstance(x, Tensor) and not x.is_floating_point())
        radii.append((radius * drawn)[:, None].expand(n, 2))
    image, alpha = torch.stack(images), torch.stack(alphas)
    if backgrounds is not None and D:
        behind = F.pad(backgrounds.float(), (0, int(with_depth)))
        image = image + (1 - alpha) * behind[:, None, None]
    drawn = means2d, conics, depths, torch.stack(radii), opacities
    return results(image, alpha, *drawn, render_mode)
