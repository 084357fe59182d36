"""Which cells of a box hold anything: what lets a ray skip empty space."""

import math

import torch
from torch import nn

from threestudio.utils.typing import *

from .march import Samples, render_weights, traverse
from .march_torch import ray_offsets

FIRST_ROUND = 32  # samples of a ray whose densities are looked up before the first check


class OccupancyGrid(nn.Module):
    """An occupancy grid of one level (Instant NGP, arXiv:2201.05989, appendix C), with the buffers
    and the rules of nerfacc's ``OccGridEstimator`` (0.5), so that checkpoints fit either:

    - ``resolution`` (3,) cells along x, y, z; ``aabbs`` (1, 6) low and high corner of the box;
    - ``occs`` (X*Y*Z,) the running occupancy of each cell; ``binaries`` (1, X, Y, Z) whether it
      counts as occupied. At first no cell does.

    ``aabb``: (6,) low and high corner. ``resolution``: cells along each axis, or three numbers.
    """

    def __init__(
        self, aabb: Float[Tensor, "6"], resolution: Union[int, Tuple[int, int, int]] = 128
    ) -> None:
        super().__init__()
        shape = (resolution,) * 3 if isinstance(resolution, int) else tuple(resolution)
        self.resolution: Int[Tensor, "3"]
        self.aabbs: Float[Tensor, "1 6"]
        self.occs: Float[Tensor, "XYZ"]
        self.binaries: Bool[Tensor, "1 X Y Z"]
        self.register_buffer("resolution", torch.tensor(shape, dtype=torch.int32))
        self.register_buffer("aabbs", torch.as_tensor(aabb).float().clone().view(1, 6))
        self.register_buffer("occs", torch.zeros(math.prod(shape)))
        self.register_buffer("binaries", torch.zeros(1, *shape, dtype=torch.bool))

    def fill(self) -> None:
        """Every cell is occupied."""
        self.occs.fill_(1.0)
        self.binaries.fill_(True)

    # -- update ----------------------------------------------------------------------------------

    @torch.no_grad()
    def update_every_n_steps(
        self,
        step: int,
        occ_eval_fn: Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 1"]],
        occ_thre: float = 0.01,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
        n: int = 16,
    ) -> None:
        """Every ``n`` steps look at one random point in each cell c of a selection:

            occs[c] <- max(ema_decay occs[c], occ_eval_fn(point)),
            binaries = occs > min(mean(occs), occ_thre)

        The selection is the whole grid before ``warmup_steps``; after it, as many uniform draws as
        a quarter of the cells, and the occupied cells, or as many draws among them if there are
        more. ``occ_eval_fn`` gives about the opacity of one step at world points. The draws come
        from torch's global generator.
        """
        if step % n != 0:
            return
        cells = (
            torch.arange(len(self.occs), device=self.occs.device)
            if step < warmup_steps
            else self._some_cells()
        )
        index = torch.stack(torch.unravel_index(cells, self.binaries.shape[1:]), dim=-1)
        unit = (index + torch.rand(index.shape, device=index.device)) / self.resolution
        low, high = self.aabbs[0, :3], self.aabbs[0, 3:]
        seen = occ_eval_fn(low + unit * (high - low)).reshape(-1).to(self.occs)
        # not a number counts as occupied, so that it gets into the loss, where it is noticed
        seen = seen.nan_to_num(nan=1.0)
        self.occs[cells] = torch.maximum(self.occs[cells] * ema_decay, seen)
        threshold = self.occs.mean().clamp(max=occ_thre)
        self.binaries.copy_((self.occs > threshold).view_as(self.binaries))

    def _some_cells(self) -> Int[Tensor, "M"]:
        """Each cell at most once: which of two writes to one cell wins would be a matter of luck"""
        n, device = len(self.occs) // 4, self.occs.device
        chosen = torch.zeros(len(self.occs), dtype=torch.bool, device=device)
        chosen[torch.randint(len(self.occs), (n,), device=device)] = True
        occupied = self.binaries.flatten().nonzero()[:, 0]
        if len(occupied) > n:
            occupied = occupied[torch.randint(len(occupied), (n,), device=device)]
        chosen[occupied] = True
        return chosen.nonzero()[:, 0]

    # -- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def sampling(
        self,
        rays_o: Float[Tensor, "R 3"],
        rays_d: Float[Tensor, "R 3"],
        sigma_fn: Optional[Callable] = None,
        near_plane: float = 0.0,
        far_plane: float = 1e10,
        render_step_size: float = 1e-3,
        early_stop_eps: float = 1e-4,
        alpha_thre: float = 0.0,
        stratified: bool = False,
        backend: str = "auto",
    ) -> Samples:
        """The packed samples of rays: intervals of ``render_step_size`` from the near plane on
        whose midpoints lie in occupied cells (see ``march.traverse``).

        ``stratified`` shifts each ray's intervals together, by a uniform part of a step.

        With ``sigma_fn(t_starts, t_ends, ray_indices) -> densities (N,)`` those are dropped that
        would hardly be seen: before which less than ``early_stop_eps`` of the light is left, or
        whose alpha is less than ``alpha_thre``, which is at most the mean of ``occs``.
        """
        starts = torch.full_like(rays_o[:, 0], near_plane)
        if stratified:
            starts = starts + torch.rand_like(starts) * render_step_size
        samples = traverse(
            rays_o, rays_d, self.binaries[0], self.aabbs[0], starts, far_plane, render_step_size,
            backend,
        )  # fmt: skip
        if sigma_fn is None or len(samples[0]) == 0:
            return samples
        alpha_thre = min(alpha_thre, self.occs.mean().item())
        ray_indices, t_starts, t_ends = samples
        sigmas = self._front_densities(sigma_fn, samples, len(rays_o), early_stop_eps)
        _, trans, alphas = render_weights(
            sigmas, t_starts, t_ends, ray_indices, len(rays_o), backend
        )
        # said the other way round, what is not a number stays: see update_every_n_steps
        seen = ~((trans < early_stop_eps) | (alphas < alpha_thre))
        return ray_indices[seen], t_starts[seen], t_ends[seen]

    @staticmethod
    def _front_densities(
        sigma_fn: Callable, samples: Samples, n_rays: int, eps: float
    ) -> Float[Tensor, "N"]:
        """Densities of the samples, front to back in rounds of doubling length; what lies behind a
        depth at which less than ``eps`` of the light is left is not looked up and stays 0."""
        ray_indices, t_starts, t_ends = samples
        place = torch.arange(len(ray_indices), device=ray_indices.device)
        place = place - ray_offsets(ray_indices, n_rays)[ray_indices]
        sigmas, depths = torch.zeros_like(t_starts), t_starts.new_zeros(n_rays)
        # a thousandth deeper, lest rounding ends a ray earlier here than in the weights
        deepest = -1.001 * math.log(eps) if eps > 0 else math.inf
        begin, end = 0, FIRST_ROUND
        while True:
            due = (place >= begin) & (place < end) & ~(depths[ray_indices] > deepest)
            due = due.nonzero()[:, 0]
            if len(due) == 0:  # then no ray has any more
                return sigmas
            rays = ray_indices[due]
            sigmas[due] = sigma_fn(t_starts[due], t_ends[due], rays).to(sigmas)
            depths.index_add_(0, rays, sigmas[due] * (t_ends[due] - t_starts[due]))
            begin, end = end, 2 * end
