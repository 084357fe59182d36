"""A model family of one's own: the ideal model of single pictures, whose answers are known.

Under a text it believes in one picture m only, so that it sees the noise
eps(x_t; m) = (x_t - alpha_t m) / sigma_t: the limit of :class:`tests.guidance_oracles.GaussianUNet`
for no spread at all. It needs no network but the one that a LoRA and a camera can change.
"""

import torch
from lods.models.base import Schedule
from torch import nn

CHANNELS, SIZE = 3, 4
WIDTH = CHANNELS * SIZE * SIZE


class TimeEmbedding(nn.Module):
    """Zero whatever t is, until a camera is added to it."""

    def __init__(self):
        super().__init__()
        self.linear_2 = nn.Linear(1, WIDTH)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, t):
        return self.linear_2(t.float()[:, None])


class Mean(nn.Module):
    """The picture that a text stands for: its embedding, as long as nothing is learned."""

    def __init__(self):
        super().__init__()
        self.to_v, self.time = nn.Linear(WIDTH, WIDTH, bias=False), TimeEmbedding()
        nn.init.eye_(self.to_v.weight)

    def forward(self, t, texts):
        mean = self.to_v(texts).flatten(1) + self.time(t)
        return mean.unflatten(1, (CHANNELS, SIZE, SIZE))


class Texts:
    """Every text is a picture of its own, which depends on nothing else."""

    shape = (1, WIDTH)

    def __call__(self, texts):
        return torch.stack([self.picture(text) for text in texts])

    def picture(self, text):
        generator = torch.Generator().manual_seed(sum(text.encode()) + 1000 * len(text))
        return torch.randn(1, WIDTH, generator=generator)


class IdealModel:
    """See the module. ``latents`` of an image in 0..1 are 2 x - 1."""

    latent_shape, image_size = (CHANNELS, SIZE, SIZE), SIZE
    text_width, text_shape, grad_scale = WIDTH, Texts.shape, 1.0

    def __init__(self, name="ideal", device="cpu"):
        self.name, self.device, self.text = name, torch.device(device), Texts()
        self.schedule = Schedule((1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0))
        self.network = Mean().requires_grad_(False)
        self.rows = []  # of each call

    def encode(self, images):
        return 2 * images - 1

    def decode(self, latents):
        return (latents / 2 + 0.5).clamp(0, 1)

    def _alpha_sigma(self, t):
        return (a.view(-1, 1, 1, 1) for a in self.schedule.alpha_sigma(t))

    def add_noise(self, z, eps, t):
        alpha, sigma = self._alpha_sigma(t)
        return alpha * z + sigma * eps

    def noise_of(self, x_t, z, t):
        alpha, sigma = self._alpha_sigma(t)
        return (x_t - alpha * z) / sigma

    def predict(self, x_t, t, texts, cameras=None):
        for value in [
            v for v in vars(cameras).values() if v is not None
        ]:  # one camera a row, always
            assert len(value) == len(x_t)
        self.rows.append(len(x_t))
        return self.noise_of(x_t, self.network(t, texts), t)

    def lora_network(self):
        return self.network

    def time_embedding(self):
        return self.network.time

    def sibling(self, name):
        return IdealModel(name, self.device)

    def prepare(self, context=None):
        pass
