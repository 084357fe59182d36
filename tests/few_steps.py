"""A few steps of methods on models that take pictures of 16 x 16 pixels."""

import lods
import torch

METHODS = [name for name in lods.methods.names() if name.startswith("lods-")]
LEARNING = ["lods-embedding", "lods-lora", "lods-vsd"]
OWN = {"lods-bridge": {"bridge_start": 0}, "lods-ucm": {"ucm_random_steps": 0}}


def images(rows=2):
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def cameras(rows=2):
    eye = torch.eye(4).expand(rows, 4, 4)
    return lods.Cameras(*torch.zeros(3, rows), c2w=eye, mvp=eye, fovy=torch.full((rows,), 40.0))


def trained(method, steps=2, first=0, optimizer=None):
    """After some steps; returns the pictures, which learn too."""
    x = images().requires_grad_()
    if optimizer is None:
        optimizer = torch.optim.Adam([*method.parameters(), x], lr=0.01)
    for step in range(first, first + steps):
        torch.manual_seed(step)
        method.step(step)
        optimizer.zero_grad()
        losses = method(x, cameras())
        losses.total.backward()
        assert losses.total.isfinite() and losses.numbers["grad_norm"] > 0
        optimizer.step()
    return x.detach()
