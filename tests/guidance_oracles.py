"""Models whose answer is known in closed form, and prompts for them."""

from types import SimpleNamespace

import torch
from lods.methods.conditions import Conditions
from torch import nn


class GaussianUNet(nn.Module):
    """The exact model of images drawn from a mixture of Gaussians N(m_k, std^2), all k alike:

    E[eps | x_t] = sigma (x_t - alpha m) / (alpha^2 std^2 + sigma^2), with m the posterior mean of
    the m_k (one k: that m). ``embeddings`` (B, T, D) hold the K means one after the other.
    ``kind`` is what it outputs, as a diffusers UNet would.
    """

    def __init__(self, model, std: float, modes: int = 1, kind: str = "epsilon"):
        super().__init__()
        self.abar, self.std, self.modes, self.kind = model.schedule.alphas_cumprod, std, modes, kind

    def forward(self, x, t, encoder_hidden_states):
        abar = self.abar[t].view(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        variance = alpha**2 * self.std**2 + sigma**2
        means = encoder_hidden_states.flatten(1)[:, : self.modes * x[0].numel()]
        means = means.view(len(x), self.modes, *x.shape[1:])
        distance = (x[:, None] - alpha[:, None] * means).square().flatten(2).sum(-1)
        posterior = (-distance / (2 * variance.view(-1, 1))).softmax(1)
        mean = (posterior.view(len(x), -1, 1, 1, 1) * means).sum(1)
        eps = sigma * (x - alpha * mean) / variance
        z = (x - sigma * eps) / alpha
        output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * z, "sample": z}
        return SimpleNamespace(sample=output[self.kind])


class Prompt:
    """What a prompt processor hands over, from the embeddings (T, D) of prompt and null, and of
    the texts that ``other_text`` knows; front views get ``prompt + 1`` unless the plain prompt is
    asked for."""

    use_perp_neg = False

    def __init__(self, prompt, null, **others):
        self.text_embeddings, self.uncond_text_embeddings = prompt[None], null[None]
        self.others = others

    def other_text(self, kind):
        return Prompt(self.others[kind], self.uncond_text_embeddings[0])

    def get_text_embeddings(
        self, elevation, azimuth, camera_distances, view_dependent_prompting=True
    ):
        n = len(elevation)
        front = (azimuth == 0).float().view(n, 1, 1) * view_dependent_prompting
        return torch.cat(
            [
                self.text_embeddings.expand(n, -1, -1) + front,
                self.uncond_text_embeddings.expand(n, -1, -1),
            ]
        )

    def get_text_embeddings_perp_neg(self, *views):
        n, (tokens, width) = len(views[0]), self.text_embeddings.shape[1:]
        rows = [self.get_text_embeddings(*views), torch.zeros(2 * n, tokens, width)]
        return torch.cat(rows), torch.zeros(n, 2)


def as_embedding(*means, tokens: int = 16, width: int = 32):
    """Means (c, h, w) as one embedding (tokens, width), zeros after them."""
    flat = torch.cat([m.flatten() for m in means])
    return torch.cat([flat, flat.new_zeros(tokens * width - len(flat))]).view(tokens, width)


def random_prompt(seed: int = 0, tokens: int = 16, width: int = 32) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(2, tokens, width, generator=generator)
    source, bad = torch.randn(2, tokens, width, generator=generator)
    return Prompt(*texts, source=source, nfsd_negative=bad)


class PerpNegPrompt(Prompt):
    """The same with two negatives per camera, ``negatives`` (2, T, D), of ``weights`` (2,)."""

    use_perp_neg = True

    def __init__(self, base: Prompt, negatives, weights):
        super().__init__(base.text_embeddings[0], base.uncond_text_embeddings[0], **base.others)
        self.negatives, self.weights = negatives, weights

    def get_text_embeddings_perp_neg(self, *views):
        n = len(views[0])
        rows = [self.get_text_embeddings(*views), self.negatives.repeat(n, 1, 1)]
        return torch.cat(rows), self.weights.expand(n, -1)


def side_view(n: int):
    """Cameras (elevation, azimuth, distance) that are not the front."""
    return torch.zeros(n), torch.full((n,), 90.0), torch.ones(n)


def distil(guidance, latents, conditions: Conditions):
    """The gradient for these latents as the loss takes it, with a stage of SDS and cleaned."""
    return guidance.method.clean(guidance.method.distil(latents, conditions))
