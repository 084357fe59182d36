"""A few steps of methods on models that take pictures of 16 x 16 pixels."""

import copy

import lods
import torch

METHODS = [name for name in lods.methods.names() if name.startswith("lods-")]
LEARNING = ["lods-embedding", "lods-lora", "lods-vsd"]
EDITS = [name for name in METHODS if lods.methods.find(name).edits]
OWN = {"lods-bridge": {"bridge_start": 0}, "lods-ucm": {"ucm_random_steps": 0}}
OWN |= {name: {"source_prompt": "a blue car"} for name in EDITS}


def images(rows=2, seed=1):
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def source_of(method, rows=2):
    """What a method that edits is given besides the pictures."""
    return {"source": images(rows, seed=2)} if method.edits else {}


def cameras(rows=2):
    eye = torch.eye(4).expand(rows, 4, 4)
    return lods.Cameras(*torch.zeros(3, rows), c2w=eye, mvp=eye, fovy=torch.full((rows,), 40.0))


def trained(method, steps=2, x=None, seen=None):
    """After some steps on ``x``, seen by the cameras ``seen``; returns the pictures, which learn
    too."""
    x = (images() if x is None else x).requires_grad_()
    seen = cameras() if seen is None else seen
    optimizer = torch.optim.Adam([*method.parameters(), x], lr=0.01)
    for step in range(steps):
        torch.manual_seed(step)
        method.step(step)
        optimizer.zero_grad()
        losses = method(x, seen, **source_of(method, len(x)))
        losses.total.backward()
        assert losses.total.isfinite() and losses.numbers["grad_norm"] > 0
        optimizer.step()
    return x.detach()


def check_resuming(make, path, x, seen):
    """Two steps of what ``make()`` makes, whose optimizer is part of its state, and a third of
    another that takes the state from the file are three steps."""

    def run(method, steps):
        for step in steps:
            torch.manual_seed(step)
            method.step(step)
            method(x, seen, **source_of(method, len(x)))
        return method.state_dict()

    whole, first, second = make(), make(), make()
    start = copy.deepcopy(first.state_dict())
    whole.load_state_dict(start)
    wanted = run(whole, range(3))
    torch.save(run(first, range(2)), path)
    second.load_state_dict(torch.load(path, weights_only=True))
    got = run(second, [2])
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(wanted[key], start[key]) for key in start)
