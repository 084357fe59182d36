"""From a density field and cameras to images, by integration along rays."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.raymarch import (
    BACKENDS,
    OccupancyGrid,
    accumulate_along_rays,
    importance_sampling,
    render_weights,
)
from threestudio.models.renderers.base import VolumeRenderer
from threestudio.utils.ops import chunk_batch, validate_empty_rays
from threestudio.utils.typing import *

ESTIMATORS = ("occgrid", "importance", "proposal")
DENSITIES = 1 << 18  # densities looked up at a time to choose samples


@threestudio.register("nerf-volume-renderer")
class NeRFVolumeRenderer(VolumeRenderer):
    """colour = sum_i w_i c_i + (1 - sum_i w_i) background (NeRF, arXiv:2003.08934), over samples
    inside the box [-radius, radius]^3.

    ``estimator`` says where the samples are:

    - ``occgrid``: steps of 1.732 * 2 * radius / num_samples_per_ray wherever a grid of 32^3 cells,
      kept up to date while training, is occupied (see ``raymarch.OccupancyGrid``);
    - ``importance``: as many steps as num_samples_per_ray on every ray, short where
      num_samples_per_ray_importance equal ones met density.
    """

    @dataclass
    class Config(VolumeRenderer.Config):
        # occgrid: on a ray along the box's diagonal
        num_samples_per_ray: Annotated[int, "[1, 100000]"] = 512
        # in evaluation, this many rays at a time, and samples through the networks; 0: all
        eval_chunk_size: Annotated[int, "[0, 1e12]"] = 160000
        randomized: bool = True  # while training, samples are jittered along their rays
        near_plane: Annotated[float, "[0, 1e12]"] = 0.0
        far_plane: Annotated[float, "(0, 1e12]"] = 1e10
        return_comp_normal: bool = False  # while training; in evaluation always
        return_normal_perturb: bool = False  # normals near the samples, while training
        estimator: Annotated[str, ESTIMATORS] = "occgrid"  # occgrid | importance
        grid_prune: bool = True  # occgrid: skip empty cells; false: none is empty
        prune_alpha_threshold: bool = True  # occgrid: drop samples that are all but invisible
        # estimator "proposal" is not implemented; its options are here for configs to load
        proposal_network_config: Optional[dict] = None
        prop_optimizer_config: Optional[dict] = None
        prop_scheduler_config: Optional[dict] = None
        num_samples_per_ray_proposal: Annotated[int, "[1, 100000]"] = 64
        num_samples_per_ray_importance: Annotated[int, "[1, 100000]"] = 64
        backend: Annotated[str, BACKENDS] = "auto"  # auto | cpu | torch | nerfacc

        def contradictions(self):
            """See :mod:`threestudio.utils.ranges`."""
            if self.near_plane >= self.far_plane:
                yield "far_plane", f"must be above near_plane={self.near_plane:g}"
            if self.estimator == "proposal":
                yield "estimator", "=proposal is not implemented: use occgrid, or importance"

    cfg: Config

    geometry_needs = ("forward_density",)

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        super().configure(geometry, material, background)
        cfg = self.cfg
        self.render_step_size = 1.732 * 2 * cfg.radius / cfg.num_samples_per_ray
        if cfg.estimator == "occgrid":
            self.estimator = OccupancyGrid(self.bbox.view(-1), resolution=32)
            if not cfg.grid_prune:
                self.estimator.fill()
                # and again after a checkpoint, which may be of a run that pruned
                self.estimator.register_load_state_dict_post_hook(lambda grid, _: grid.fill())
        self._warned = False
        self._wants_jitter: bool = cfg.randomized

    @property
    def randomized(self) -> bool:
        """Whether samples are jittered: in training only. (Asked for each time, because Lightning
        ends a validation by setting ``training`` of every module, not by calling ``train``.)"""
        return self.training and self._wants_jitter

    @randomized.setter
    def randomized(self, wanted: bool) -> None:
        """For subclasses that set it, as upstream's own code does."""
        self._wants_jitter = wanted

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Refresh the occupancy grid, when it is due."""
        grid = self.cfg.estimator == "occgrid" and self.cfg.grid_prune
        if grid and self.training and not on_load_weights:
            # density * step: the opacity of one step, to first order
            self.estimator.update_every_n_steps(
                global_step, lambda x: self.geometry.forward_density(x) * self.render_step_size
            )

    # -- samples ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(
        self, rays_o: Float[Tensor, "R 3"], rays_d: Float[Tensor, "R 3"]
    ) -> Tuple[Int[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
        """Packed samples, at least one: without any it has length 0, so weight 0."""
        cfg = self.cfg

        def sigma_fn(t_starts, t_ends, ray_indices):
            t = 0.5 * (t_starts + t_ends)[:, None]
            points = rays_o[ray_indices] + t * rays_d[ray_indices]
            return chunk_batch(self.geometry.forward_density, DENSITIES, points)[..., 0]

        if cfg.estimator == "importance":
            samples = importance_sampling(
                rays_o,
                rays_d,
                self.bbox.view(-1),
                sigma_fn,
                n_coarse=cfg.num_samples_per_ray_importance,
                n_fine=cfg.num_samples_per_ray,
                near_plane=cfg.near_plane,
                far_plane=cfg.far_plane,
                stratified=self.randomized,
            )
            return validate_empty_rays(*samples)
        prune = cfg.grid_prune and cfg.prune_alpha_threshold
        samples = self.estimator.sampling(
            rays_o,
            rays_d,
            sigma_fn=sigma_fn if prune else None,
            near_plane=cfg.near_plane,
            far_plane=cfg.far_plane,
            render_step_size=self.render_step_size,
            alpha_thre=0.01,
            stratified=self.randomized,
            backend=cfg.backend,
        )
        if len(samples[0]) == 0 and not self._warned and not self.estimator.binaries.any():
            self._warned = True
            threestudio.warn(
                "the occupancy grid is empty, so only the background is drawn: the density is "
                "zero everywhere, or the grid was not trained (a checkpoint brings it along)"
            )
        return validate_empty_rays(*samples)

    # -- integration -----------------------------------------------------------------------------

    def _integrate(
        self,
        rays_o: Float[Tensor, "R 3"],
        rays_d: Float[Tensor, "R 3"],
        light_positions: Float[Tensor, "R 3"],
        extra: Dict[str, Any],
    ) -> Dict[str, Tensor]:
        """What belongs to each of the rays (R, ...), and while training to each sample (N, ...)."""
        n_rays, chunk = len(rays_o), 0 if self.training else self.cfg.eval_chunk_size
        ray_indices, t_starts, t_ends = self._sample(rays_o, rays_d)
        t = 0.5 * (t_starts + t_ends)[:, None]
        dirs = rays_d[ray_indices]
        # in the box they are; the one of an empty scene is not, and encodings end there
        radius = self.cfg.radius
        points = (rays_o[ray_indices] + t * dirs).clamp(-radius, radius)
        with_normal = self.material.requires_normal
        geo_out = chunk_batch(self.geometry, chunk, points, output_normal=with_normal)
        rgb = chunk_batch(
            partial(self.material, **extra),
            chunk,
            viewdirs=dirs,
            positions=points,
            light_positions=light_positions[ray_indices],
            **geo_out,
        )
        weights, _, _ = render_weights(
            geo_out["density"][..., 0], t_starts, t_ends, ray_indices, n_rays, self.cfg.backend
        )

        def along_rays(weights, values):
            return accumulate_along_rays(weights, values, ray_indices, n_rays, self.cfg.backend)

        opacity = along_rays(weights, None)
        out = {
            "comp_rgb_fg": along_rays(weights, rgb),
            "opacity": opacity,
            "depth": along_rays(weights, t),
            "z_variance": self._z_variance(weights, t, opacity, ray_indices, along_rays),
        }
        if "normal" in geo_out and (not self.training or self.cfg.return_comp_normal):
            normal = F.normalize(along_rays(weights, geo_out["normal"]), dim=-1)
            out["comp_normal"] = 0.5 * (normal + 1) * opacity
        if self.training:
            out |= {
                "weights": weights[:, None],
                "t_points": t,
                "t_intervals": (t_ends - t_starts)[:, None],
                "t_dirs": dirs,
                "ray_indices": ray_indices,
                "points": points,
                **geo_out,
            }
            if "normal" in geo_out and self.cfg.return_normal_perturb:
                near = (points + 0.01 * torch.randn_like(points)).clamp(-radius, radius)
                out["normal_perturb"] = self.geometry(near, output_normal=True)["normal"]
        return out

    @staticmethod
    def _z_variance(
        weights: Float[Tensor, "N"],
        t: Float[Tensor, "N 1"],
        opacity: Float[Tensor, "R 1"],
        ray_indices: Int[Tensor, "N"],
        along_rays: Callable,
    ) -> Float[Tensor, "R 1"]:
        """Variance of t under the weights over their sum (HiFA, arXiv:2305.18766), 0 for a ray that
        lets half of the light through: what little it meets is nowhere in particular."""
        share = weights / opacity[:, 0].clamp_min(1e-5).index_select(0, ray_indices)
        mean = along_rays(share, t)[:, 0].index_select(0, ray_indices)
        variance = along_rays(share, (t - mean[:, None]).square())
        return torch.where(opacity > 0.5, variance, torch.zeros_like(variance))

    # -- images ----------------------------------------------------------------------------------

    def forward(
        self,
        rays_o: Float[Tensor, "B H W 3"],
        rays_d: Float[Tensor, "B H W 3"],
        light_positions: Float[Tensor, "B 3"],
        bg_color: Optional[Union[Float[Tensor, "B C"], Float[Tensor, "B H W C"]]] = None,
        **kwargs,
    ) -> Dict[str, Tensor]:
        """Render rays. ``bg_color`` replaces the background's colours; the rest of the batch
        reaches the material. Returns

        - ``comp_rgb`` = ``comp_rgb_fg`` + (1 - ``opacity``) background (B, H, W, C), and
          ``comp_rgb_bg``, what the background module gives;
        - ``opacity`` (B, H, W, 1); ``depth``, sum_i w_i t_i, and ``z_variance``, in units of t;
        - ``comp_normal`` (B, H, W, 3), (n + 1) / 2 times the opacity, if the material needs normals
          (while training only with ``return_comp_normal``);
        - while training, for every sample of all rays, ``weights``, ``t_points``, ``t_intervals``
          (N, 1), ``t_dirs``, ``points`` (N, 3), ``ray_indices`` (N,), and what the geometry gave;
          with ``return_normal_perturb`` also ``normal_perturb`` (N, 3).
        """
        batch, height, width, _ = rays_o.shape
        lights = light_positions[:, None, None].expand(-1, height, width, -1)
        out = chunk_batch(
            partial(self._integrate, extra=kwargs),
            0 if self.training else self.cfg.eval_chunk_size,
            rays_o.reshape(-1, 3),
            rays_d.reshape(-1, 3),
            lights.reshape(-1, 3),
        )
        images = ("comp_rgb_fg", "opacity", "depth", "z_variance", "comp_normal")
        for name in images:
            if name in out:
                out[name] = out[name].view(batch, height, width, -1)
        out["comp_rgb_bg"] = self.background(dirs=rays_d)
        if bg_color is None:
            bg_color = out["comp_rgb_bg"]
        elif bg_color.ndim == 2:  # one colour per image
            bg_color = bg_color[:, None, None]
        out["comp_rgb"] = out["comp_rgb_fg"] + bg_color * (1 - out["opacity"])
        return out
