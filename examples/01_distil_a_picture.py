"""Distil four pictures from a prompt, with LODS and a LoRA: the shortest use of the library.

What is optimised are latents, which the model decodes into pictures at the end. The method is a
torch module whose parameters are its learned part, so one optimizer trains both.
"""

# %% A method with its model and its prompt; `model` is also a card, a folder or a hub id
import lods
import torch
from tqdm import trange


def main(
    prompt: str = "a DSLR image of a hamburger", steps: int = 200, out: str = "distilled.png"
) -> torch.Tensor:
    """Returns the four pictures, (4, 3, H, W) in 0..1."""
    torch.manual_seed(0)
    method = lods.load("lods-lora", model="pocket", prompt=prompt, guidance_scale=20)

    # Four latents, and one optimizer for them and for the learned part
    shape = (4, *method.model.latent_shape)
    latents = torch.empty(shape, device=method.model.device).uniform_(-1, 1).requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [latents], "lr": 0.03}, {"params": method.parameters(), "lr": 4e-3}]
    )
    for step in trange(steps):
        method.step(step)
        losses = method(latents=latents)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()

    # The pictures
    with torch.no_grad():
        pictures = method.model.decode(latents)
    print("saved", lods.save_images(out, pictures, columns=4, zoom=2))
    return pictures


# %%
if __name__ == "__main__":
    main()
