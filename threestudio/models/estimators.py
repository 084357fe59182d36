"""Where to take samples along rays when there is a cheaper density to ask first."""

import torch
from torch import nn

from threestudio.models.raymarch import quantiles
from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

SAMPLING_TYPES = ("uniform", "lindisp")


class ImportanceEstimator(nn.Module):
    """Intervals along rays that are short where proposals see density (NeRF, arXiv:2003.08934,
    sec. 5.2; several rounds as in mip-NeRF 360, arXiv:2111.12077)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the estimator was moved to."""
        return self._dummy.device

    @torch.no_grad()
    def sampling(
        self,
        prop_sigma_fns: List[Callable],
        prop_samples: List[int],
        num_samples: int,
        n_rays: int,
        near_plane: Any,
        far_plane: Any,
        sampling_type: str = "uniform",
        stratified: bool = False,
        requires_grad: bool = False,
    ) -> Tuple[Float[Tensor, "R N"], Float[Tensor, "R N"]]:
        """``(t_starts, t_ends)``, rising, of N = ``prop_samples[-1] + num_samples + 1`` intervals:
        the last proposal's edges and ``num_samples + 1`` edges of the final round, sorted together
        (without proposals the latter alone, N = ``num_samples``).

        In each round of n samples the edges lie midway between the quantiles (i + u) / n of the
        distribution so far, u = 1/2 or, with ``stratified``, uniform in 0..1. That starts even, in
        t ("uniform") or in 1 / t ("lindisp"), from ``near_plane`` to ``far_plane`` (numbers, or
        tensors (R, 1)); a proposal ``sigma_fn(t_starts, t_ends) -> densities``, all (R, n), makes
        it 1 minus the transmittance. ``requires_grad``: the proposals are called with autograd.
        """
        if len(prop_sigma_fns) != len(prop_samples):
            raise UserError(
                f"{len(prop_sigma_fns)} proposals need as many numbers of samples, not "
                f"{len(prop_samples)}"
            )
        if sampling_type not in SAMPLING_TYPES:
            raise UserError(
                f"sampling_type is one of {', '.join(SAMPLING_TYPES)}, not {sampling_type!r}"
            )

        def distances(s: Float[Tensor, "R E"]) -> Float[Tensor, "R E"]:
            if sampling_type == "uniform":
                return near_plane + s * (far_plane - near_plane)
            return 1 / ((1 - s) / near_plane + s / far_plane)

        edges = torch.tensor([0.0, 1.0], device=self.device).repeat(n_rays, 1)
        cdf, together = edges, []
        for sigma_fn, n in zip(prop_sigma_fns, prop_samples):
            edges = _edges(edges, cdf, n, stratified)
            t = distances(edges)
            with torch.set_grad_enabled(requires_grad):
                sigmas = sigma_fn(t[:, :-1], t[:, 1:])
            if sigmas.shape != (n_rays, n):
                raise ValueError(f"a proposal gave {tuple(sigmas.shape)}, not {(n_rays, n)}")
            depth = (sigmas.detach() * (t[:, 1:] - t[:, :-1])).cumsum(-1)
            cdf = nn.functional.pad(-torch.expm1(-depth), (1, 0))
            cdf[:, -1] = 1.0  # what passes ends in the last interval
            together = [t]
        t = torch.cat([*together, distances(_edges(edges, cdf, num_samples, stratified))], dim=-1)
        t = t.sort(dim=-1).values
        return t[:, :-1], t[:, 1:]


def _edges(
    edges: Float[Tensor, "R E"], cdf: Float[Tensor, "R E"], n: int, stratified: bool
) -> Float[Tensor, "R N+1"]:
    """The edges of n intervals around n quantiles; the outer two lie as far beyond the first and
    last quantile as the next ones lie within, but not outside of `edges`."""
    shift = torch.rand(len(cdf), n, device=cdf.device) if stratified else 0.5
    u = (torch.arange(n, device=cdf.device) + shift) / n
    centres = quantiles(edges, cdf.contiguous(), u.expand(len(cdf), n).contiguous())
    if n == 1:
        return edges[:, [0, -1]]
    between = (centres[:, 1:] + centres[:, :-1]) / 2
    first = torch.maximum(2 * centres[:, :1] - between[:, :1], edges[:, :1])
    last = torch.minimum(2 * centres[:, -1:] - between[:, -1:], edges[:, -1:])
    return torch.cat([first, between, last], dim=-1)
