"""How sharp pictures are next to true ones: for samples and for distilled objects."""

import torch
import torch.nn.functional as F
from jaxtyping import Float

LUMA = (0.299, 0.587, 0.114)


def gradients(images: Float[torch.Tensor, "V H W 3"]) -> Float[torch.Tensor, "V H W"]:
    """Length of the brightness' gradient by Prewitt's filter, whose weights sum to 1."""
    luma = (images.float() * images.new_tensor(LUMA)).sum(-1)[:, None]
    across = torch.tensor([[1.0, 0.0, -1.0]]).repeat(3, 1) / 3
    kernel = torch.stack([across, across.T])[:, None]
    found = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernel)
    return found.square().sum(1).sqrt()


def sharpness(made: Float[torch.Tensor, "V H W 3"], true: Float[torch.Tensor, "V H W 3"]) -> float:
    """Mean length of the gradient, relative to that of the true views: 1 is as sharp as they are.
    Noise and streaks raise it as edges do."""
    return float(gradients(made).mean() / gradients(true).mean())
