"""Score distillation via inversion (SDI, arXiv:2405.15891)."""

from dataclasses import dataclass

from lods.methods.inversion import Inversion, inverted
from lods.methods.registry import register
from lods.methods.sds import SDS


@register("lods-sdi")
class SDI(SDS):
    """g = w(t) [ cfg_s(eps(x_t; y), eps(x_t; n)) - eps ], as SDS, but eps is not drawn: x_t is
    found by DDIM inversion of the latents z under cfg_r(eps(.; y), eps(.; n)), in
    ``inversion_steps`` equal steps from 0 to t, and eps = (x_t - alpha_t z) / sigma_t.

    r = ``inversion_scale`` is -7.5 in the paper. Its published code counts the scale from the
    prompt (its -7.5 is -6.5 here), inverts on a fixed grid of timesteps to a little beyond t, and
    weighs with sigma_t / alpha_t; here w(t) is that of all methods. The paper lets t fall over the
    run: ``timestep_schedule`` monotone is near to that. Nothing is learned; a step costs
    ``inversion_steps`` more calls of the model.
    """

    @dataclass
    class Config(Inversion, SDS.Config):
        pass

    cfg: Config

    def diffuse(self, latents, t, conditions):
        return inverted(self, latents, t, conditions)
