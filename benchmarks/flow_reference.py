"""A step of LODS on a transformer of Stable Diffusion 3's kind, written down once more for
benchmarks/guidance.py to compare with: diffusers, and nothing of ours but the draw of timesteps."""

import torch
import torch.nn.functional as F
from torch import nn

TOKENS, SHIFT = 77 + 256, 3.0  # CLIP's and T5's; the shift of the schedule


def backward(z, grad, prior, dtype, learnt: dict):
    """The two losses of a step of which ``grad`` is the distillation's, after their gradients.
    float16 needs a loss scale, as the original's trainer has."""
    sds = 0.5 * F.mse_loss(z, (z - grad).detach(), reduction="sum") / len(z)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    (sds + scale * prior).backward()
    for value in learnt.values():
        value.grad /= scale
    return sds.detach(), prior.detach()


class Adapted(nn.Module):
    """A linear layer and a LoRA, which acts with ``now["strength"]``."""

    def __init__(self, layer: nn.Linear, rank: int, now: dict):
        super().__init__()
        self.layer, self.now = layer, now
        wide = {"bias": False, "device": layer.weight.device}
        self.down = nn.Linear(layer.in_features, rank, **wide)
        self.up = nn.Linear(rank, layer.out_features, **wide)

    def forward(self, x):
        y = self.layer(x)
        return y + self.now["strength"] * self.up(self.down(x.float())).to(y.dtype)


class FlowReference:
    """A step of LODS on a flow, in velocities, with calls one by one:

    g = w (1 - s) [ v_p - (eps - z) / S + (1 - S) / S v_l ], w = s^2, and for the learnt part the
    mean of (v_l - (eps - z))^2 with logit-normal t."""

    def __init__(self, ours, transformer, vae, scale: float, strength: float, rank: int):
        self.scale, self.strength = scale, strength
        self.network, self.vae, self.now = transformer, vae, {"strength": 0.0}
        self.schedule = ours.model.schedule
        self.steps = (ours.min_step, ours.max_step)
        self.dtype, self.pooled = transformer.dtype, transformer.config.pooled_projection_dim
        lora = getattr(ours, "lora", None)
        self.embedding = None if lora else nn.Parameter(ours.learnable_embedding.detach().clone())
        self.learnt = {"learnable_embedding": self.embedding}
        if lora:
            self.learnt = {}
            given = dict(lora.named_parameters())
            layers = {name.rpartition(".lora_")[0] for name in given}
            for name in sorted(layers):
                parent, _, last = name.rpartition(".")
                adapted = Adapted(transformer.get_submodule(name), rank, self.now)
                setattr(transformer.get_submodule(parent), last, adapted)
                for part, layer in (("A", adapted.down), ("B", adapted.up)):
                    self.learnt[f"{name}.lora_{part}.weight"] = layer.weight
            with torch.no_grad():
                for name, value in given.items():
                    self.learnt[name].copy_(value)

    def velocity(self, x, s, text, strength: float):
        self.now["strength"] = strength
        text = text.to(self.dtype)
        return self.network(
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=text[:, :TOKENS],
            pooled_projections=text[:, TOKENS:].flatten(1)[:, : self.pooled],
            timestep=1000 * s,
        ).sample.float()

    def noised(self, z, density: str, low: int, high: int):
        t = self.schedule.draw(len(z), low, high, z.device, density)
        u = (t.double() + 0.5) / 1000
        s = (SHIFT * u / (1 + (SHIFT - 1) * u)).float()
        eps, rows = torch.randn_like(z), s.view(-1, 1, 1, 1)
        return (1 - rows) * z + rows * eps, s, rows, eps - z

    def step(self, rgb, prompt):
        config = self.vae.config
        images = (rgb.permute(0, 3, 1, 2) * 2 - 1).to(self.dtype)
        z = self.vae.encode(images).latent_dist.sample().float()
        z = (z - config.shift_factor) * config.scaling_factor
        y, null = prompt.get_text_embeddings(z).chunk(2)
        learnt = null if self.embedding is None else self.embedding.expand(len(z), -1, -1)
        x, s, _, v = self.noised(z.detach(), "logit-normal", 0, 999)
        prior = F.mse_loss(self.velocity(x, s, learnt, self.strength), v)
        big = self.scale
        with torch.no_grad():
            x, s, rows, v = self.noised(z, "uniform", *self.steps)
            v_p = self.velocity(x, s, y, 0.0)
            v_l = self.velocity(x, s, learnt, self.strength)
            difference = v_p - v / big + (1 - big) / big * v_l
            grad = (rows.square() * (1 - rows) * difference).nan_to_num()
        return backward(z, grad, prior, self.dtype, self.learnt)
