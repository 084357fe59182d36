"""Compare two methods: the same prompts, seeds and steps, and numbers beside the pictures.

The numbers ask the frozen model itself: how much better it predicts the noise in a picture under
the prompt than under the empty prompt, in percent. More means that the model sees more of the
prompt in it, which is no proof of a good picture: open the sheet too. For a comparison with a
judge, true renders, intervals and 3D, see docs/evaluation.md.
"""

# %% The methods, each with settings that suit it
import lods
import torch
from tqdm import tqdm

METHODS = {
    "sds": {"guidance_scale": 5.0},
    "lods-lora": {"guidance_scale": 20.0},
}
PROMPTS = ("a photo of a traffic cone", "a teddy bear", "a picture of a blue backpack")


def distil(method: lods.Method, steps: int, seed: int) -> torch.Tensor:
    """A latent (1, c, h, w)."""
    torch.manual_seed(seed)
    shape = (1, *method.model.latent_shape)
    latents = torch.empty(shape, device=method.model.device).uniform_(-1, 1).requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [latents], "lr": 0.03}, {"params": method.parameters(), "lr": 4e-3}]
    )
    for step in range(steps):
        method.step(step)
        losses = method(latents=latents)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return latents.detach()


@torch.no_grad()
def agreement(model: lods.models.Model, latents: torch.Tensor, prompt: str) -> float:
    """By how many percent the prompt lowers the model's error in the noise of a latent, the mean
    over timesteps."""
    t = torch.arange(50, 1000, 50, device=model.device)
    z = latents.expand(len(t), -1, -1, -1)
    torch.manual_seed(0)
    eps = torch.randn_like(z)
    x_t = model.add_noise(z, eps, t)
    texts = model.text([prompt, ""])
    under, empty = (
        (model.predict(x_t, t, text.expand(len(t), -1, -1)) - eps).square().mean() for text in texts
    )
    return float(100 * (1 - under / empty))


# %% All runs
def main(steps: int = 120, out: str = "comparison.png", prompts=PROMPTS) -> dict[str, list[float]]:
    """Returns the agreement of each method's pictures with their prompts, in percent."""
    model = lods.models.load("pocket")
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    pictures = []
    for name, prompt in tqdm([(name, prompt) for name in METHODS for prompt in prompts]):
        fall = [0.98, 0.5, steps]
        method = lods.load(name, model, prompt, max_step_percent=fall, **METHODS[name])
        latents = distil(method, steps, seed=0)
        found[name].append(agreement(model, latents, prompt))
        pictures.append(model.decode(latents))

    # A table and a sheet with one row for each method
    for name, values in found.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:12} agreement {sum(values) / len(values):.1f} % ({each})")
    sheet = torch.cat(pictures)
    print("saved", lods.save_images(out, sheet, columns=len(prompts), zoom=2))
    return found


# %%
if __name__ == "__main__":
    main()
