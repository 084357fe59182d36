"""Small tensor functions: activations, rays, projections, Gaussian-splatting cameras."""

import math

import torch
import torch.nn.functional as F

from threestudio.utils.errors import nearest

# upstream has these here too
from threestudio.utils.shape_guide import MeshOBJ, ShapeLoss, ce_pq_loss  # noqa: F401
from threestudio.utils.typing import *

# --- vectors ------------------------------------------------------------------------------------


def dot(x: Float[Tensor, "... C"], y: Float[Tensor, "... C"]) -> Float[Tensor, "... 1"]:
    """Scalar product over the last dimension, which is kept."""
    return (x * y).sum(-1, keepdim=True)


def reflect(x: Float[Tensor, "... 3"], n: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """`x`, which points away from the surface, mirrored about the unit normal: 2 (x.n) n - x."""
    return 2 * dot(x, n) * n - x


def perpendicular_component(
    x: Float[Tensor, "B C H W"], y: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C H W"]:
    """What is left of `x`, per sample, when its projection on `y` is taken away."""
    along = (x * y).sum((1, 2, 3), keepdim=True) / y.square().sum((1, 2, 3), keepdim=True).clamp(
        min=1e-6
    )
    return x - along * y


def scale_tensor(dat: Num[Tensor, "... D"], inp_scale, tgt_scale) -> Num[Tensor, "... D"]:
    """Map `dat` linearly from the range `inp_scale` to `tgt_scale`; each is ``(low, high)``, a
    (2, D) tensor, or None for (0, 1)."""
    inp_low, inp_high = (0, 1) if inp_scale is None else (inp_scale[0], inp_scale[1])
    tgt_low, tgt_high = (0, 1) if tgt_scale is None else (tgt_scale[0], tgt_scale[1])
    return (dat - inp_low) / (inp_high - inp_low) * (tgt_high - tgt_low) + tgt_low


# --- gradients and activations ------------------------------------------------------------------


class _TruncExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(x.float())

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad * torch.exp(x.float().clamp(max=15))).to(x.dtype)


trunc_exp = _TruncExp.apply  # exp in float32 whose gradient is that of exp(min(x, 15))


class SpecifyGradient(torch.autograd.Function):
    """``SpecifyGradient.apply(x, grad)``: a loss of one whose gradient at `x` is `grad`."""

    @staticmethod
    def forward(ctx, input_tensor, gt_grad):
        ctx.save_for_backward(gt_grad)
        return torch.ones([1], device=input_tensor.device, dtype=input_tensor.dtype)

    @staticmethod
    def backward(ctx, grad_scale):
        (gt_grad,) = ctx.saved_tensors
        return gt_grad * grad_scale, None  # the scale is that of mixed precision


def _lin2srgb(x: Tensor) -> Tensor:
    curved = 1.055 * x.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(x > 0.0031308, curved, 12.92 * x).clamp(0, 1)


_ACTIVATIONS = {
    "none": lambda x: x,
    "lin2srgb": _lin2srgb,
    "exp": torch.exp,
    "shifted_exp": lambda x: torch.exp(x - 1),
    "trunc_exp": trunc_exp,
    "shifted_trunc_exp": lambda x: trunc_exp(x - 1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "shifted_softplus": lambda x: F.softplus(x - 1),
    "scale_-11_01": lambda x: x * 0.5 + 0.5,
}


def get_activation(name: Optional[str]) -> Callable:
    """The activation called `name`: None or "none" (identity), "lin2srgb", "exp", "shifted_exp",
    "trunc_exp", "shifted_trunc_exp", "sigmoid", "tanh", "shifted_softplus" (shifted: of x - 1),
    "scale_-11_01", or any function of ``torch.nn.functional``. Raises ``ValueError``."""
    name = "none" if name is None else name.lower()
    found = _ACTIVATIONS.get(name) or getattr(F, name, None)
    if not callable(found):
        raise ValueError(f"unknown activation {name!r}{nearest(name, [*_ACTIVATIONS, *dir(F)])}")
    return found


def binary_cross_entropy(
    input: Float[Tensor, "*B"], target: Float[Tensor, "*B"]
) -> Float[Tensor, ""]:
    """Mean of -(t log x + (1 - t) log(1 - x)). Differentiable in both, and not clamped: the caller
    keeps `input` away from 0 and 1."""
    return -(target * torch.log(input) + (1 - target) * torch.log(1 - input)).mean()


def tet_sdf_diff(
    vert_sdf: Float[Tensor, "Nv 1"], tet_edges: Integer[Tensor, "Ne 2"]
) -> Float[Tensor, ""]:
    """Regulariser that pulls the two ends of each edge which crosses the surface to one sign."""
    ends = vert_sdf[:, 0][tet_edges.reshape(-1).long()].reshape(-1, 2)
    ends = ends[torch.sign(ends[:, 0]) != torch.sign(ends[:, 1])]
    return F.binary_cross_entropy_with_logits(
        ends[:, 0], (ends[:, 1] > 0).to(ends)
    ) + F.binary_cross_entropy_with_logits(ends[:, 1], (ends[:, 0] > 0).to(ends))


def shifted_expotional_decay(a, b, c, r):
    """a exp(-b r) + c. (The name is upstream's spelling.)"""
    return a * torch.exp(-b * r) + c


def shifted_cosine_decay(a, b, c, r):
    """a cos(b r + c) + a."""
    return a * torch.cos(b * r + c) + a


# --- batches ------------------------------------------------------------------------------------


def chunk_batch(func: Callable, chunk_size: int, *args, **kwargs) -> Any:
    """``func(*args, **kwargs)`` in pieces of `chunk_size` along dimension 0 of every tensor
    argument, the results joined again. `func` may return a tensor, or a tuple, list or dict of
    tensors (or of None). ``chunk_size <= 0``: in one piece. Raises ``TypeError`` for other results.
    """
    if chunk_size <= 0:
        return func(*args, **kwargs)
    lengths = {len(a) for a in (*args, *kwargs.values()) if torch.is_tensor(a)}
    if len(lengths) != 1:
        raise ValueError(f"chunk_batch needs tensors of one length, not of {sorted(lengths)}")
    (length,) = lengths

    def cut(a, start):
        return a[start : start + chunk_size] if torch.is_tensor(a) else a

    pieces = [
        func(*[cut(a, s) for a in args], **{k: cut(a, s) for k, a in kwargs.items()})
        for s in range(0, max(length, 1), chunk_size)
    ]
    return _join(pieces)


def _join(pieces: list) -> Any:
    first = pieces[0]
    if torch.is_tensor(first):
        return torch.cat(pieces, dim=0)
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: _join([piece[key] for piece in pieces]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_join([piece[i] for piece in pieces]) for i in range(len(first)))
    raise TypeError(f"chunk_batch: the function returned {type(first)}, which cannot be joined")


def validate_empty_rays(
    ray_indices: Tensor, t_start: Tensor, t_end: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """The samples of a ray marcher, or, where there are none, one of length 0 on ray 0: what
    follows need not treat an empty scene apart."""
    if ray_indices.nelement() == 0:
        return ray_indices.new_zeros(1), t_start.new_zeros(1), t_end.new_zeros(1)
    return ray_indices, t_start, t_end


# --- cameras ------------------------------------------------------------------------------------


def get_ray_directions(
    H: int, W: int, focal, principal=None, use_pixel_centers: bool = True
) -> Float[Tensor, "H W 3"]:
    """Directions of the pixels in camera space (x right, y up, looking along -z), not unit.

    `focal`: pixels, one number or (fx, fy); `principal`: (cx, cy) in pixels, default the centre.
    """
    fx, fy = focal if isinstance(focal, (tuple, list)) else (focal, focal)
    cx, cy = (W / 2, H / 2) if principal is None else principal
    centre = 0.5 if use_pixel_centers else 0.0
    j, i = torch.meshgrid(
        torch.arange(H, dtype=torch.float32) + centre,
        torch.arange(W, dtype=torch.float32) + centre,
        indexing="ij",
    )
    return torch.stack([(i - cx) / fx, -(j - cy) / fy, -torch.ones_like(i)], -1)


def get_rays(
    directions: Float[Tensor, "... 3"],
    c2w: Float[Tensor, "... 4 4"],
    keepdim: bool = False,
    noise_scale: float = 0.0,
    normalize: bool = True,
) -> Tuple[Float[Tensor, "... 3"], Float[Tensor, "... 3"]]:
    """World-space rays ``(rays_o, rays_d)`` of camera-space directions.

    `directions` (N, 3) with `c2w` (4, 4) or (N, 4, 4); (H, W, 3) with (4, 4) or (B, 4, 4); or
    (B, H, W, 3) with (B, 4, 4). Flattened to (rays, 3) unless `keepdim`. `noise_scale`: standard
    deviation of one offset added to all origins and one added to all directions.
    """
    rotation, origin = c2w[..., :3, :3], c2w[..., :3, 3]
    if directions.ndim > 2:  # room for H and W between the batch and the vector
        origin = origin[..., None, None, :]
        rays_d = directions @ rotation.mT.unsqueeze(-3)
    else:
        rays_d = torch.einsum("...j,...ij->...i", directions, rotation)
    rays_o = origin.expand(rays_d.shape)
    if noise_scale > 0:
        rays_o = rays_o + torch.randn(3, device=rays_o.device) * noise_scale
        rays_d = rays_d + torch.randn(3, device=rays_d.device) * noise_scale
    if normalize:
        rays_d = F.normalize(rays_d, dim=-1)
    return (rays_o, rays_d) if keepdim else (rays_o.reshape(-1, 3), rays_d.reshape(-1, 3))


def get_projection_matrix(
    fovy: Float[Tensor, "B"], aspect_wh: float, near: float, far: float
) -> Float[Tensor, "B 4 4"]:
    """Perspective projection of OpenGL camera space, `fovy` in radians, clip z in -1..1; the y row
    is negated, because image rows go down."""
    tan = torch.tan(fovy / 2)
    proj = torch.zeros(len(fovy), 4, 4, dtype=tan.dtype, device=tan.device)
    proj[:, 0, 0] = 1 / (tan * aspect_wh)
    proj[:, 1, 1] = -1 / tan
    proj[:, 2, 2] = -(far + near) / (far - near)
    proj[:, 2, 3] = -2 * far * near / (far - near)
    proj[:, 3, 2] = -1
    return proj


def _rigid_inverse(c2w: Float[Tensor, "... 4 4"]) -> Float[Tensor, "... 4 4"]:
    rotation_t = c2w[..., :3, :3].transpose(-1, -2)
    w2c = torch.zeros_like(c2w)
    w2c[..., :3, :3] = rotation_t
    w2c[..., :3, 3:] = -rotation_t @ c2w[..., :3, 3:]
    w2c[..., 3, 3] = 1
    return w2c


def get_mvp_matrix(
    c2w: Float[Tensor, "B 4 4"], proj_mtx: Float[Tensor, "B 4 4"]
) -> Float[Tensor, "B 4 4"]:
    """World to clip space, for column vectors: projection @ inverse(c2w)."""
    return proj_mtx @ _rigid_inverse(c2w)


def get_full_projection_matrix(
    c2w: Float[Tensor, "B 4 4"], proj_mtx: Float[Tensor, "B 4 4"]
) -> Float[Tensor, "B 4 4"]:
    """World to clip space, for row vectors: the transpose of :func:`get_mvp_matrix`."""
    return get_mvp_matrix(c2w, proj_mtx).transpose(-1, -2)


def convert_pose(C2W: Float[Tensor, "... 4 4"]) -> Float[Tensor, "... 4 4"]:
    """OpenGL camera axes (y up, looking along -z) to OpenCV's (y down, along +z), or back."""
    return C2W * C2W.new_tensor([1.0, -1.0, -1.0, 1.0])


def get_projection_matrix_gaussian(
    znear: float, zfar: float, fovX, fovY, device="cpu"
) -> Float[Tensor, "4 4"]:
    """Projection of OpenCV camera space as 3D Gaussian splatting uses it (arXiv:2308.04079):
    symmetric frustum, clip z in 0..1, field of view in radians. For column vectors."""
    proj = torch.zeros(4, 4, device=device)
    proj[0, 0] = 1 / math.tan(float(fovX) / 2)
    proj[1, 1] = 1 / math.tan(float(fovY) / 2)
    proj[2, 2] = zfar / (zfar - znear)
    proj[2, 3] = -(zfar * znear) / (zfar - znear)
    proj[3, 2] = 1
    return proj


def get_fov_gaussian(P: Float[Tensor, "4 4"]) -> Tuple[float, float]:
    """``(fovX, fovY)`` in radians of a matrix of :func:`get_projection_matrix_gaussian`."""
    return 2 * math.atan(1 / float(P[0, 0])), 2 * math.atan(1 / float(P[1, 1]))


def get_cam_info_gaussian(
    c2w: Float[Tensor, "4 4"], fovx, fovy, znear: float, zfar: float
) -> Tuple[Float[Tensor, "4 4"], Float[Tensor, "4 4"], Float[Tensor, "3"]]:
    """``(world_view_transform, full_proj_transform, camera_center)`` for a Gaussian rasteriser, of
    an OpenGL `c2w`. Both matrices are transposed (for row vectors); all on the device of `c2w`."""
    c2w = convert_pose(c2w).float()
    world_view = torch.linalg.inv(c2w).transpose(0, 1)
    proj = get_projection_matrix_gaussian(znear, zfar, fovx, fovy, device=c2w.device)
    return world_view, world_view @ proj.transpose(0, 1), c2w[:3, 3]
