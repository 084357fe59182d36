"""A model family of one's own: the ideal model of single pictures, whose answers are known.

Under a text it believes in one picture m only, so that it sees the noise
eps(x_t; m) = (x_t - alpha_t m) / sigma_t: the limit of :class:`tests.guidance_oracles.GaussianUNet`
for no spread at all. It needs no network but the one that a LoRA and a camera can change.

Told the cameras themselves, it believes in another picture for each: k m + v, with k and v of
:func:`sight`.
"""

import torch
from lods.models.base import Schedule
from torch import nn

CHANNELS, SIZE = 3, 4
WIDTH = CHANNELS * SIZE * SIZE


# In units of w(t) alpha / sigma, the gradient of each method at the start of what it learns, of the
# latents z and the pictures under the four texts.
S = 7.5  # guidance_scale
GRADIENTS = {
    "sds": lambda z, y, n, source, bad: z - n + S * (n - y),
    "csd": lambda z, y, n, source, bad: n - y,
    "nfsd": lambda z, y, n, source, bad: bad - n + S * (n - y),
    "bridge": lambda z, y, n, source, bad: source - y,
    "vsd": lambda z, y, n, source, bad: y - n + S * (n - y),  # its LoRA is still the model
    "sdi": lambda z, y, n, source, bad: z - n + S * (n - y),  # whatever it has inverted to
    "pfd": lambda z, y, n, source, bad: z - n + S * (n - y),  # z less where its way ends
    "ism": lambda z, y, n, source, bad: S * (n - y),  # a step of DDIM keeps eps(.; n)
    "asd": lambda z, y, n, source, bad: y - n + S * (n - y),  # the later time is t itself
    "rfds": lambda z, y, n, source, bad: z - n + S * (n - y),
    "rfds-rev": lambda z, y, n, source, bad: z - n + S * (n - y),  # whatever the noise
    "ucm": lambda z, y, n, source, bad: z - n + S * (n - y),
    "refine": lambda z, y, n, source, bad: z - n + S * (n - y),  # z less what z becomes
    "embedding": lambda z, y, n, source, bad: (z - n) / S + n - y,  # still the null prompt
    "lora": lambda z, y, n, source, bad: (z - n) / S + n - y,
}
# that read guidance_scale
SCALED = (
    *("embedding", "lora", "vsd", "sds", "nfsd", "sdi", "ism", "asd", "rfds", "rfds-rev", "ucm"),
    *("pfd", "refine"),
)
# settings with which a method has that gradient from the first step on
FIELDS = {
    "bridge": {"bridge_start": 0},
    "rfds": {"weighting_strategy": "sds"},
    "rfds-rev": {"weighting_strategy": "sds"},
    "ucm": {"weighting_strategy": "sds", "ucm_random_steps": 0},
    "pfd": {"weighting_strategy": "sds"},
    "refine": {"weighting_strategy": "sds"},
}


def sight(cameras):
    """(k (B, 1, 1, 1), v (B, 3, 4, 4)): what a camera makes of a picture m, k m + v. All four
    numbers of a camera count."""
    elevation, azimuth, distance, fovy = cameras.numbers().unbind(-1)
    turn, tilt = azimuth.deg2rad(), elevation.deg2rad()
    waves = [turn.cos(), turn.sin(), tilt.sin(), distance - 3.6, (fovy - 40) / 4]
    pictures = torch.randn(5, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    k = 1.5 + (2 * turn).cos() / 2
    return k.view(-1, 1, 1, 1), torch.einsum("kb,kchw->bchw", torch.stack(waves), pictures)


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

    def __init__(self, name="ideal", device="cpu", cameras="words"):
        self.cameras = cameras
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
        mean = self.network(t, texts)
        if self.cameras != "words":
            k, v = sight(cameras)
            mean = k * mean + v
        return self.noise_of(x_t, mean, t)

    def lora_network(self):
        return self.network

    def time_embedding(self):
        return self.network.time

    def sibling(self, name):
        return IdealModel(name, self.device, self.cameras)

    def prepare(self, context=None):
        pass
