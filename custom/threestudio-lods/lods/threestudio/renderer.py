"""From Gaussians and cameras to images."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from lods.gaussians import backends
from lods.gaussians.cameras import intrinsics, world_to_camera
from lods.gaussians.parameters import whole
from lods.gaussians.rasterize import rasterization
from torch import Tensor

import threestudio
from threestudio.models.renderers.base import Rasterizer
from threestudio.utils.ops import get_ray_directions, get_rays


def drawn(
    background: Any,
    foreground: Float[Tensor, "B H W 3"],
    alpha: Float[Tensor, "B H W 1"],
    depth: Float[Tensor, "B H W 1"],
    info: dict[str, Any],
    c2w: Float[Tensor, "B 4 4"],
    fovy: Float[Tensor, " B"],
    rays_d: Float[Tensor, "B H W 3"] | None,
) -> dict[str, Any]:
    """What a rasteriser of this extension returns: see :meth:`GaussianRasterizer.forward`. The
    background module paints what is behind, along ``rays_d`` or, without them, the cameras' rays.
    """
    height, width = alpha.shape[1:3]
    if rays_d is None:
        focal = 0.5 * height / torch.tan(0.5 * fovy)
        directions = get_ray_directions(height, width, focal=1.0).to(c2w)
        directions = directions.repeat(len(c2w), 1, 1, 1)
        directions[..., :2] /= focal[:, None, None, None]
        _, rays_d = get_rays(directions, c2w, keepdim=True)
    behind = background(dirs=rays_d)
    return {
        "comp_rgb": foreground + (1 - alpha) * behind,
        "comp_rgb_fg": foreground,
        "comp_rgb_bg": behind,
        "opacity": alpha,
        "depth": depth,
        "info": info,
    }


class DrawsSources(Rasterizer):
    """A rasteriser that can draw what its geometry was before an edit, see
    :class:`lods.threestudio.systems.editing.Editing`."""

    def picture(
        self,
        source: Any,
        c2w: Float[Tensor, "B 4 4"],
        fovy: Float[Tensor, " B"],
        height: int,
        width: int,
    ) -> tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W 1"]]:
        """Colours and opacities of ``source`` before nothing; the arguments are those of
        :meth:`GaussianRasterizer.forward`."""
        raise NotImplementedError

    @torch.no_grad()
    def before(
        self,
        source: Any,
        background: Float[Tensor, "B H W 3"],
        c2w: Float[Tensor, "B 4 4"],
        fovy: Float[Tensor, " B"],
        height: int,
        width: int,
        **kwargs: Any,
    ) -> Float[Tensor, "B H W 3"]:
        """Images of what there was, ``source``, before this background."""
        with torch.autocast(c2w.device.type, enabled=False):
            image, alpha = self.picture(source, c2w.float(), fovy.float(), height, width)
        return image + (1 - alpha) * background


@threestudio.register("lods-gaussian-rasterizer")
class GaussianRasterizer(DrawsSources):
    """Rasterises a ``lods-gaussians`` geometry; the background module paints what is behind."""

    @dataclass
    class Config(Rasterizer.Config):
        near_plane: Annotated[float, "(0, 1e6]"] = 0.01
        far_plane: Annotated[float, "(0, 1e12]"] = 100.0
        # pixels^2 added to the projected variances, so that nothing aliases
        eps2d: Annotated[float, "(0, 1e4]"] = 0.3
        # auto | cpu | reference | gsplat | gswarp | diff-gaussian-rasterization, or the name of a
        # rasteriser that was registered (lods.gaussians.register_backend) or is installed
        backend: str = "auto"

        def contradictions(self):
            """Fields that do not go together: (field, what is wrong)."""
            if self.near_plane >= self.far_plane:
                yield "far_plane", f"must be above near_plane={self.near_plane:g}"
            if not backends.is_known(self.backend):
                yield "backend", backends.unknown(self.backend)

    cfg: Config

    geometry_needs = ("gaussians", "base_colors")

    def colors(self, camera_positions: Float[Tensor, "B 3"]) -> Float[Tensor, "*B N 3"]:
        """Colours (N, 3), or (B, N, 3) where they depend on the view, of all that is drawn."""
        return whole(self.geometry).colors(camera_positions)

    def draw(
        self,
        g: Any,
        colors: Float[Tensor, "*B N 3"],
        c2w: Float[Tensor, "B 4 4"],
        fovy: Float[Tensor, " B"],
        height: int,
        width: int,
        absgrad: bool = False,
    ) -> tuple[Float[Tensor, "B H W 4"], Float[Tensor, "B H W 1"], dict[str, Any]]:
        """Colours and depth, opacities, and ``info`` of these Gaussians before nothing; the
        arguments are those of :meth:`forward`."""
        return rasterization(
            g.means,
            g.quats,
            g.scales.exp(),
            g.opacities.sigmoid(),
            colors,
            world_to_camera(c2w),
            intrinsics(fovy, height, width),
            width,
            height,
            near_plane=self.cfg.near_plane,
            far_plane=self.cfg.far_plane,
            eps2d=self.cfg.eps2d,
            packed=False,
            render_mode="RGB+ED",
            absgrad=absgrad,
            backend=self.cfg.backend,
        )

    def picture(
        self, source: Any, c2w: Tensor, fovy: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        rendered, alpha, _ = self.draw(
            source, source.colors(c2w[:, :3, 3]), c2w, fovy, height, width
        )
        return rendered[..., :3], alpha

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
        - ``info``, the rasteriser's dictionary that densification reads.
        """
        # projections lose too many bits in 16-bit floats
        with torch.autocast(c2w.device.type, enabled=False):
            c2w, fovy = c2w.float(), fovy.float()
            colors = self.colors(c2w[:, :3, 3])
            rendered, alpha, info = self.draw(
                whole(self.geometry), colors, c2w, fovy, height, width, absgrad
            )
        foreground, depth = rendered[..., :3], rendered[..., 3:]
        return drawn(self.background, foreground, alpha, depth, info, c2w, fovy, rays_d)
