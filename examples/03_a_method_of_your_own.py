"""A method of your own in ten lines, beside SDS.

A method is a class with one function: from the noise predictions of a frozen model to a gradient
for the latents. This one is "classifier score plus a little denoising": the difference of the two
predictions, and a share of what SDS adds to it. Nothing of the library is changed for it; in a
threestudio run the same class is `system.guidance_type=my-mix-guidance`.
"""

# %% The method
from dataclasses import dataclass
from typing import Annotated

import lods
import torch
from lods.methods import Method, register
from tqdm import trange


@register("my-mix")
class Mix(Method):
    """g = w(t) [ s (eps_c - eps_u) + mix (eps_u - eps) ]: CSD with mix = 0, SDS with mix = 1."""

    @dataclass
    class Config(Method.Config):
        mix: Annotated[float, "[0, 1]"] = 0.5

    def gradient(self, x_t, t, eps, conditions):
        eps_c, eps_u = self.predict(x_t, t, conditions, conditions.prompt, conditions.null)
        g = self.cfg.guidance_scale * (eps_c - eps_u) + self.cfg.mix * (eps_u - eps)
        return lods.scores.rows(self.weight(t), g) * g


# %% The same loop for both
def distil(method: lods.Method, steps: int, lr: float = 0.03) -> torch.Tensor:
    """Two pictures, (2, 3, H, W) in 0..1, from the same noise for every method."""
    torch.manual_seed(0)
    shape = (2, *method.model.latent_shape)
    latents = torch.empty(shape, device=method.model.device).uniform_(-1, 1).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=lr)
    for step in trange(steps):
        method.step(step)
        losses = method(latents=latents)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    with torch.no_grad():
        return method.model.decode(latents)


def main(prompt: str = "a snowman", steps: int = 250, out: str = "my-method.png") -> torch.Tensor:
    """Returns four pictures, (4, 3, H, W) in 0..1: two of SDS, and two of the new method."""
    model = lods.models.load("pocket")
    settings = {"prompt": prompt, "guidance_scale": 5, "max_step_percent": [0.98, 0.5, steps]}
    sds = distil(lods.load("sds", model, **settings), steps)
    mine = distil(lods.load("my-mix", model, mix=0.5, **settings), steps)
    pictures = torch.cat([sds, mine])
    print("SDS on the left, my-mix on the right:", lods.save_images(out, pictures, 4, zoom=2))
    return pictures


# %%
if __name__ == "__main__":
    main()
