"""Rectified flow distillation sampling (RFDS; VFDS), SDS with the velocities of a flow
(arXiv:2406.03293, arXiv:2408.05008)."""

from dataclasses import dataclass
from typing import Annotated, Any

from lods.methods.registry import register
from lods.methods.sds import SDS
from lods.scores import WEIGHTINGS


@register("lods-rfds")
class RFDS(SDS):
    """g = cfg_s(v(x_t; y), v(x_t; n)) - (eps - z), which is SDS with 1 as the weight of velocities:
    w(t) = 1 / alpha_t for noise. Only the defaults differ from those of SDS, and are the published
    ones for 3D (50 is the scale in 2D).

    Three things of the published code that its configuration does not show:

    - its timesteps fall and are shifted, so that its "0.3 to 0.98" of them are the sigmas from
      0.875 down to 0.058 at a shift of 3: it leaves out the HIGHEST noise. Here t rises with the
      noise, and the same range is 0.02 to 0.7 of T;
    - it weighs each row by 1 / (1 + exp(-n)) with n ~ N(0, 1), which has nothing to do with t: 1/2
      on average. It is left out here, and a constant would change nothing under Adam;
    - its loss is the mean of the squares over a batch of B and the N numbers of a latent, divided
      by B once more, where ours is half their sum over B. Its gradient is 2 / (B N) times ours (2 /
      65,536 for one picture of 512 pixels), so that weights of other losses do not carry over.

    Its 3D runs have 15,000 steps of AdamW, 0.01 as the rate of the hash grid, and 0.1 as the weight
    of sparsity. Nothing is learned. It serves diffusions too, as SDS with another weight.
    """

    @dataclass
    class Config(SDS.Config):
        guidance_scale: Annotated[float, "(0, inf)"] = 100.0
        min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.02
        max_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.7
        weighting_strategy: Annotated[str, WEIGHTINGS] = "velocity"

    cfg: Config
