"""RFDS with reversed noise (RFDS-Rev, arXiv:2406.03293)."""

from dataclasses import dataclass

from lods.methods import predictions
from lods.methods.registry import register
from lods.methods.rfds import RFDS


@register("lods-rfds-rev")
class RFDSRev(RFDS):
    """RFDS, with a noise that belongs to z: a drawn eps becomes, by one step of the inversion
    (the paper's iRFDS),

    eps' = eps + (1 - s_t) (v(x_t; y) - (eps - z)),   x_t' = alpha_t z + sigma_t eps',

    and g = cfg_s(v(x_t'; y), v(x_t'; n)) - (eps' - z). eps' is nothing but eps(x_t; y), what the
    model sees under the prompt without guidance, so that it serves diffusions too. A step costs one
    more call of the model, of half the rows. The published weight of sparsity is 0.2; the rest is
    as for RFDS. Nothing is learned.
    """

    @dataclass
    class Config(RFDS.Config):
        pass

    cfg: Config

    def diffuse(self, latents, t, conditions):
        x_t, _ = predictions.fresh_noise(self.model, latents, t)
        eps = self.model.predict(x_t, t, conditions.prompt, conditions.cameras)
        return self.model.add_noise(latents, eps, t), eps
