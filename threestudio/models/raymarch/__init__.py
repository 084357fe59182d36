"""Volume rendering along rays: which samples to take, and how they add up to an image.

Samples are *packed*: those of all rays in one list, sorted by ray and then by distance, as
``ray_indices``, ``t_starts`` and ``t_ends`` (N,). ``t`` is in units of the ray's direction.
"""

from .importance import importance_sampling, quantiles
from .march import BACKENDS, accumulate_along_rays, render_weights, resolve_backend
from .occupancy import OccupancyGrid

__all__ = [
    "BACKENDS",
    "OccupancyGrid",
    "accumulate_along_rays",
    "importance_sampling",
    "quantiles",
    "render_weights",
    "resolve_backend",
]
