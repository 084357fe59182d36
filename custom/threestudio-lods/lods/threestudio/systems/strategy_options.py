"""Ranges of the settings of gsplat's two strategies, and of our default one's own
(:mod:`lods.gaussians.densify`), and of schedules of learning rates.

They are plain annotations: a host that reads none, as upstream's threestudio, loses nothing but an
early message.
"""

from typing import Annotated, TypedDict

Step = Annotated[int, "[0, 1e12]"]
Every = Annotated[int, "[1, 1e12]"]
Rates = dict[str, Annotated[float, "scheduled [0, 1e6]"]]


class DefaultOptions(TypedDict, total=False):
    """Of ``ResettableStrategy``, gsplat's ``DefaultStrategy`` with three fields more."""

    prune_opa: Annotated[float, "[0, 1]"]
    grow_grad2d: Annotated[float, "[0, 1e6]"]
    grow_scale3d: Annotated[float, "[0, 1e6]"]
    grow_scale2d: Annotated[float, "[0, 1e6]"]
    prune_scale3d: Annotated[float, "(0, 1e6]"]
    prune_scale2d: Annotated[float, "(0, 1e6]"]
    refine_scale2d_stop_iter: Step
    refine_start_iter: Step
    refine_stop_iter: Step
    refine_every: Every
    reset_every: Step
    pause_refine_after_reset: Step
    prune_big_after: Step
    cap_max: Annotated[int, "[0, 1e9]"]
    absgrad: bool
    revised_opacity: bool
    verbose: bool
    key_for_gradient: Annotated[str, ("means2d", "gradient_2dgs")]


class McmcOptions(TypedDict, total=False):
    """Of gsplat's ``MCMCStrategy``."""

    cap_max: Annotated[int, "[1, 1e9]"]
    noise_lr: Annotated[float, "[0, 1e12]"]
    refine_start_iter: Step
    refine_stop_iter: Step
    refine_every: Every
    min_opacity: Annotated[float, "[0, 1)"]
    verbose: bool
