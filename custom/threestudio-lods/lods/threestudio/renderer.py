"""From Gaussians and cameras to images."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from lods.gaussians.harmonics import spherical_harmonics as spherical_harmonics
from lods.gaussians.harmonics import view_colors
from lods.gaussians.rasterize import BACKENDS, rasterization
from torch import Tensor

import threestudio
from threestudio.models.renderers.base import Rasterizer
from threestudio.utils.ops import get_ray_directions, get_rays


def world_to_camera(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 4 4"]:
    """The inverse of ``c2w`` (OpenGL: x right, y up, z backward), as OpenCV has it (x right, y
    down, z forward). A rotation is inverted by its transpose: [R^T | -R^T p]."""
    rotation = c2w[:, :3, :3] * c2w.new_tensor([1.0, -1.0, -1.0])
    inverse = torch.zeros_like(c2w)
    inverse[:, :3, :3] = rotation.transpose(1, 2)
    inverse[:, :3, 3:] = -rotation.transpose(1, 2) @ c2w[:, :3, 3:]
    inverse[:, 3, 3] = 1.0
    return inverse


def intrinsics(fovy: Float[Tensor, " B"], height: int, width: int) -> Float[Tensor, "B 3 3"]:
    """Pinhole matrices in pixels: focal length height / (2 tan(fovy / 2)) in both directions, the
    principal point in the middle of the image. ``fovy`` in radians."""
    K = fovy.new_zeros(len(fovy), 3, 3)
    K[:, 0, 0] = K[:, 1, 1] = 0.5 * height / torch.tan(0.5 * fovy)
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = 0.5 * width, 0.5 * height, 1.0
    return K


@threestudio.register("lods-gaussian-rasterizer")
class GaussianRasterizer(Rasterizer):
    """Rasterises a ``lods-gaussians`` geometry; the background module paints what is behind."""

    @dataclass
    class Config(Rasterizer.Config):
        near_plane: Annotated[float, "(0, 1e6]"] = 0.01
        far_plane: Annotated[float, "(0, 1e12]"] = 100.0
        # pixels^2 added to the projected variances, so that nothing aliases
        eps2d: Annotated[float, "(0, 1e4]"] = 0.3
        # auto | cpu | torch | gsplat | gswarp | diff-gaussian-rasterization
        backend: Annotated[str, BACKENDS] = "auto"

        def contradictions(self):
            """Fields that do not go together: (field, what is wrong)."""
            if self.near_plane >= self.far_plane:
                yield "far_plane", f"must be above near_plane={self.near_plane:g}"

    cfg: Config

    geometry_needs = ("gaussians", "base_colors")

    def colors(self, camera_positions: Float[Tensor, "B 3"]) -> Float[Tensor, "*B N 3"]:
        """Colours (N, 3), or (B, N, 3) where they depend on the view."""
        if self.geometry.cfg.sh_degree == 0:
            return self.geometry.base_colors()
        g = self.geometry
        return view_colors(g.sh0, g.shN, g.means, camera_positions)

    def forward(
        self,
        c2w: Float[Tensor, "B 4 4"],
        fovy: Float[Tensor, " B"],
        height: int,
        width: int,
        rays_d: Float[Tensor, "B H W 3"] | None = None,
        absgrad: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Render all cameras in one call.

        ``c2w`` has OpenGL axes, ``fovy`` is vertical and in radians; the rest of a batch is
        ignored. ``absgrad`` asks the rasteriser for absolute gradients too. Returns

        - ``comp_rgb`` = ``comp_rgb_fg`` + (1 - ``opacity``) ``comp_rgb_bg`` (B, H, W, 3), not
          clamped;
        - ``opacity`` (B, H, W, 1), the true accumulated alpha in 0..1;
        - ``depth`` (B, H, W, 1), the expected z in camera space, world units, 0 where nothing is;
        - ``info``, the rasteriser's dictionary that densification reads, and ``eps2d`` with it.
        """
        g = self.geometry
        # projections lose too many bits in 16-bit floats
        with torch.autocast(c2w.device.type, enabled=False):
            c2w, fovy = c2w.float(), fovy.float()
            rendered, alpha, info = rasterization(
                g.means,
                g.quats,
                g.scales.exp(),
                g.opacities.sigmoid(),
                self.colors(c2w[:, :3, 3]),
                world_to_camera(c2w),
                intrinsics(fovy, height, width),
                width,
                height,
                near_plane=self.cfg.near_plane,
                far_plane=self.cfg.far_plane,
                eps2d=self.cfg.eps2d,
                render_mode="RGB+ED",
                absgrad=absgrad,
                backend=self.cfg.backend,
            )
        info["eps2d"] = self.cfg.eps2d  # what it needs to know a Gaussian's own size
        foreground, depth = rendered[..., :3], rendered[..., 3:]
        if rays_d is None:
            focal = 0.5 * height / torch.tan(0.5 * fovy)
            directions = get_ray_directions(height, width, focal=1.0).to(c2w)
            directions = directions.repeat(len(c2w), 1, 1, 1)
            directions[..., :2] /= focal[:, None, None, None]
            _, rays_d = get_rays(directions, c2w, keepdim=True)
        background = self.background(dirs=rays_d)
        return {
            "comp_rgb": foreground + (1 - alpha) * background,
            "comp_rgb_fg": foreground,
            "comp_rgb_bg": background,
            "opacity": alpha,
            "depth": depth,
            "info": info,
        }
