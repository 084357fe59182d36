"""The dense reference: every Gaussian against every pixel, in the order of the formulas.

It is the oracle that the compiled rasteriser is tested against, and the only place where the
mathematics is written once, without tricks. It works in any float dtype, on any device, and costs
O(cameras * pixels * Gaussians) in time and memory.

Sources: EWA splatting (Zwicker et al., "EWA Volume Splatting", IEEE Visualization 2001), 3D
Gaussian splatting (Kerbl et al. 2023, arXiv 2308.04079), the opacity-aware bounding box
(Radl et al. 2024, arXiv 2402.00525, B.2). Constants and conventions are those of gsplat 1.5
(github.com/nerfstudio-project/gsplat).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ALPHA_MIN = 1.0 / 255.0  # a fainter contribution is not blended
ALPHA_MAX = 0.999  # keeps 1 - alpha away from zero
TRANSMITTANCE_MIN = 1e-4  # a pixel that would fall to this or below takes no more Gaussians
EXTENT_MAX = 3.33  # standard deviations; sqrt(2 ln 255) = 3.329, so nothing blended is cut off


def covariances(
    quats: Float[Tensor, "N 4"], scales: Float[Tensor, "N 3"]
) -> Float[Tensor, "N 3 3"]:
    """Sigma = R diag(s)^2 R^T, with R the rotation of the quaternion (w, x, y, z), normalised
    here: with u = (x, y, z), R = I + 2 w [u]x + 2 [u]x^2."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    o = torch.zeros_like(w)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], dim=-1).view(-1, 3, 3)
    eye = torch.eye(3, dtype=quats.dtype, device=quats.device)
    rotation = eye + 2 * w[:, None, None] * cross + 2 * cross @ cross
    half = rotation * scales[:, None, :]
    return half @ half.mT


def project(
    means: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    scales: Float[Tensor, "N 3"],
    opacities: Float[Tensor, " N"],
    viewmats: Float[Tensor, "C 4 4"],
    Ks: Float[Tensor, "C 3 3"],
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    eps2d: float,
) -> tuple[
    Float[Tensor, "C N 2"], Float[Tensor, "C N 3"], Float[Tensor, "C N"], Float[Tensor, "C N 2"]
]:
    """Projects 3D Gaussians to 2D ones, by the affine approximation of EWA splatting.

    With W, t the rotation and translation of the view matrix, p = W m + t = (x, y, z) and
    u = x / z, v = y / z:

        mean2d  = (fx u + cx, fy v + cy)                                [pixels]
        J       = 1/z [[fx, 0, -fx u'], [0, fy, -fy v']]
        Sigma2d = J W Sigma W^T J^T + eps2d I                           [pixels^2]
        conic   = Sigma2d^-1, kept as (a, b, c) for [[a, b], [b, c]]

    where u', v' are u, v clamped to 1.3 times the field of view, because far outside of it the
    affine approximation explodes.

    Returns means2d, conics, depths z and the extents: the distances (pixels, in x and y) from
    mean2d beyond which no alpha reaches 1/255. The extents are 0 for a Gaussian that is not drawn:
    behind the near or beyond the far plane, too faint, outside of the image or not finite. Such a
    Gaussian has finite outputs and zero gradients. The extents have no gradient.
    """
    R, t = viewmats[:, :3, :3], viewmats[:, :3, 3]
    points = torch.einsum("cij,nj->cni", R, means) + t[:, None]
    x, y, z = points.unbind(-1)
    drawn = (z > near_plane) & (z < far_plane) & torch.isfinite(points).all(-1)
    drawn = drawn & (opacities >= ALPHA_MIN)
    o, one = torch.zeros_like(z), torch.ones_like(z)
    x, y, z = x.where(drawn, o), y.where(drawn, o), z.where(drawn, one)

    fx, fy = Ks[:, 0, 0, None], Ks[:, 1, 1, None]
    cx, cy = Ks[:, 0, 2, None], Ks[:, 1, 2, None]
    u, v = x / z, y / z
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    u_clamped = u.clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    v_clamped = v.clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    J = torch.stack([fx / z, o, -fx * u_clamped / z, o, fy / z, -fy * v_clamped / z], dim=-1)
    J = J.unflatten(-1, (2, 3)) @ R[:, None]
    covars2d = J @ covariances(quats, scales) @ J.mT
    xx, xy, yy = covars2d[..., 0, 0] + eps2d, covars2d[..., 0, 1], covars2d[..., 1, 1] + eps2d
    det = xx * yy - xy * xy
    drawn = drawn & (det > 0) & torch.isfinite(det)
    det = det.where(drawn, one)

    means2d = torch.stack([fx * u + cx, fy * v + cy], dim=-1)
    conics = torch.stack([yy / det, -xy / det, xx / det], dim=-1)
    with torch.no_grad():
        sigmas = (2 * (opacities / ALPHA_MIN).clamp(min=1).log()).sqrt().clamp(max=EXTENT_MAX)
        extents = sigmas[:, None] * torch.stack([xx, yy], dim=-1).clamp(min=0).sqrt()
        size = torch.tensor([width, height], device=means.device)
        near_image = (means2d + extents.ceil() > 0) & (means2d - extents.ceil() < size)
        drawn = drawn & near_image.all(-1)
        extents = extents.where(drawn[..., None], torch.zeros_like(extents))
    return means2d, conics, z, extents


def composite(
    means2d: Float[Tensor, "C N 2"],
    conics: Float[Tensor, "C N 3"],
    opacities: Float[Tensor, " N"],
    colors: Float[Tensor, "*C N D"],
    depths: Float[Tensor, "C N"],
    extents: Float[Tensor, "C N 2"],
    width: int,
    height: int,
    backgrounds: Float[Tensor, "C D"] | None = None,
    with_depth: bool = False,
    chunk: int = 32,
) -> tuple[Float[Tensor, "C H W D"], Float[Tensor, "C H W 1"]]:
    """Blends 2D Gaussians front to back. At the pixel centre p, with d = p - mean2d and the
    Gaussians sorted by depth (ties by index):

        alpha_i = min(0.999, o_i exp(-(a dx^2 + 2 b dx dy + c dy^2) / 2)), or 0 if below 1/255
        T_i     = prod_{j < i} (1 - alpha_j)
        color   = sum_i T_i alpha_i c_i + T_end background,   alpha = 1 - T_end

    where the sum ends before the first Gaussian that would bring T to 1e-4 or below. With
    ``with_depth`` the depth is blended as one more, last, channel, over the background 0.
    ``chunk``: so many channels at a time.
    """
    colors = colors.expand(len(means2d), -1, -1)
    if with_depth:
        colors = torch.cat([colors, depths[..., None]], dim=-1)
        backgrounds = None if backgrounds is None else F.pad(backgrounds, (0, 1))
    axes = {"dtype": means2d.dtype, "device": means2d.device}
    py, px = torch.meshgrid(
        torch.arange(height, **axes) + 0.5, torch.arange(width, **axes) + 0.5, indexing="ij"
    )
    images, alphas = [], []
    for i in range(len(means2d)):
        drawn = (extents[i] > 0).all(-1).nonzero().squeeze(-1)
        order = drawn[depths[i][drawn].argsort(stable=True)]
        dx = px.reshape(-1, 1) - means2d[i, order, 0]
        dy = py.reshape(-1, 1) - means2d[i, order, 1]
        a, b, c = conics[i, order].unbind(-1)
        power = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacities[order] * torch.exp(-power.clamp(min=0))).clamp(max=ALPHA_MAX)
        alpha = alpha.where(alpha >= ALPHA_MIN, torch.zeros_like(alpha))
        after = torch.cumprod(1 - alpha, dim=-1)
        before = torch.cat([torch.ones_like(px.reshape(-1, 1)), after], dim=-1)[:, :-1]
        weights = (alpha * before).where(after > TRANSMITTANCE_MIN, torch.zeros_like(alpha))
        total = weights.sum(-1, keepdim=True)
        parts = colors[i, order].split(chunk, dim=-1)
        image = torch.cat([weights @ part for part in parts], dim=-1)
        if backgrounds is not None:
            image = image + (1 - total) * backgrounds[i]
        images.append(image.unflatten(0, (height, width)))
        alphas.append(total.unflatten(0, (height, width)))
    return torch.stack(images), torch.stack(alphas)
