"""gsplat's compiled half, from our CPU kernels: gsplat's own Python half runs unchanged, so that
calls, shapes, dtypes, contiguity and return values are those of the package."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import torch

from tests.fakecuda.device import claim, on_cuda


def check(*tensors, dtype=torch.float32) -> None:
    """What gsplat's C++ code checks of its arguments."""
    for tensor in tensors:
        if tensor is not None:
            assert on_cuda(tensor), "must be a CUDA tensor"
            assert tensor.is_contiguous(), "must be contiguous"
            assert tensor.dtype == dtype, (tensor.dtype, dtype)


def down(*tensors) -> list:
    return [tensor.cpu() for tensor in tensors]


def up(*tensors) -> list:
    return [claim(tensor.detach().contiguous(), True) for tensor in tensors]


class Backend:
    """The functions of ``gsplat.cuda._backend._C`` that ``gsplat.rasterization`` calls."""

    PINHOLE = 0
    CameraModelType = SimpleNamespace(PINHOLE=0, ORTHO=1, FISHEYE=2, FTHETA=3)

    def __init__(self) -> None:
        self.raster = importlib.import_module("lods.gaussians.backends.cpu")
        self.last: dict = {}  # of the last projection, what its arguments leave out later

    # -- projection ----------------------------------------------------------------------------

    def projection_ewa_3dgs_fused_fwd(
        self, means, covars, quats, scales, opacities, viewmats, Ks, width, height, eps2d, near,
        far, radius_clip, compensations, camera_model,
    ):  # fmt: skip
        check(means, quats, scales, opacities, viewmats, Ks)
        arguments = down(means, quats, scales, opacities, viewmats, Ks)
        means2d, conics, depths, extents = self.raster.project(
            *arguments, width, height, near, far, eps2d
        )
        opacities = opacities.cpu()
        self.last = {"range": (near, far), "opacities": opacities, "extents": extents}
        self.last["depths"] = depths
        radii, means2d, depths, conics = up(extents.ceil().int(), means2d, depths, conics)
        culled = (radii <= 0).any(-1)
        for values in (means2d, depths, conics):  # CUDA leaves them as they were allocated
            values[culled] = float("nan")
        return radii, means2d, depths, conics, None

    def projection_ewa_3dgs_fused_bwd(
        self, means, covars, quats, scales, viewmats, Ks, width, height, eps2d, camera_model,
        radii, conics, compensations, v_means2d, v_depths, v_conics, v_compensations, view_grad,
    ):  # fmt: skip
        check(means, quats, scales, viewmats, Ks, v_means2d, v_depths, v_conics)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in down(means, quats, scales, viewmats)]
            out = self.raster.project(
                *leaves[:3], self.last["opacities"], leaves[3], Ks.cpu(), width, height,
                *self.last["range"], eps2d,
            )  # fmt: skip
            dead = (radii <= 0).any(-1).cpu()
            cotangents = [g.clone() for g in down(v_means2d, v_conics, v_depths)]
            for cotangent in cotangents:
                cotangent[dead] = 0
            v_means, *others = up(*torch.autograd.grad(out[:3], leaves, cotangents))
        return v_means, None, *others

    # -- compositing -----------------------------------------------------------------------------

    def intersect_tile(
        self, means2d, radii, depths, image_ids, gaussian_ids, images, tile_size, width, height,
        sort, segmented,
    ):  # fmt: skip
        check(means2d, depths)
        check(radii, dtype=torch.int32)
        counts = torch.zeros(radii.shape[:-1], dtype=torch.int32)
        return up(counts, torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int32))

    def intersect_offset(self, ids, images, width, height):
        return up(torch.zeros(images, height, width, dtype=torch.int32))[0]

    def _compose(self, means2d, conics, colors, opacities, width, height, keep_absgrad=None):
        extents = self.last["extents"]
        dead = (extents <= 0).any(-1)[..., None]

        def clean(values):
            return torch.where(dead, torch.zeros_like(values), values)

        return self.raster.composite(
            clean(means2d), clean(conics), opacities, clean(colors), self.last["depths"], extents,
            width, height, None, False, keep_absgrad=keep_absgrad,
        )  # fmt: skip

    def rasterize_to_pixels_3dgs_fwd(
        self, means2d, conics, colors, opacities, backgrounds, masks, width, height, tile_size,
        offsets, ids,
    ):  # fmt: skip
        check(means2d, conics, colors, opacities, backgrounds)
        arguments = down(means2d, conics, colors, opacities[0])
        image, alpha = up(*self._compose(*arguments, width, height))
        return image, alpha, up(torch.zeros(alpha.shape[:3], dtype=torch.int32))[0]

    def rasterize_to_pixels_3dgs_bwd(
        self, means2d, conics, colors, opacities, backgrounds, masks, width, height, tile_size,
        offsets, ids, alphas, last_ids, v_image, v_alpha, absgrad,
    ):  # fmt: skip
        check(means2d, conics, colors, opacities, v_image, v_alpha)
        kept: list = []
        with torch.enable_grad():
            arguments = down(means2d, conics, colors, opacities[0])
            leaves = [x.detach().requires_grad_() for x in arguments]
            out = self._compose(*leaves, width, height, kept.append if absgrad else None)
            grads = list(torch.autograd.grad(out, leaves, down(v_image, v_alpha)))
        dead = (self.last["extents"] <= 0).any(-1)
        for grad in grads[:3]:
            grad[dead] = 0
        cameras = len(means2d)  # the opacities are one tensor, expanded to all cameras
        grads[3] = (grads[3] / cameras)[None].expand(cameras, -1)
        return up(kept[0])[0] if absgrad else None, *up(*grads)


def install(gsplat: bool = True) -> None:
    """Put the stand-in where gsplat looks for its kernels; without, they are absent."""
    module = ModuleType("gsplat.cuda._backend")
    module._C = Backend() if gsplat else None
    sys.modules["gsplat.cuda._backend"] = module
