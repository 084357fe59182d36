"""The benchmarks' own arithmetic, on clocks that this file turns by hand."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.runs import ROOT


class Clock:
    """Stands still but for ``pass_``."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Takes(torch.autograd.Function):
    """The identity, which takes time in both directions."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.backward_seconds = clock, backward
        clock.pass_(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.pass_(ctx.backward_seconds)
        return grad, None, None, None


class Network(torch.nn.Module):
    """Takes so many seconds forward and backward, and has something to learn if asked."""

    def __init__(self, clock, forward, backward, learns, wrap):
        super().__init__()
        self.args, self.wrap = (clock, forward, backward), wrap
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=learns)

    def forward(self, x):
        return self.wrap(Takes.apply(x * self.scale, *self.args))


@pytest.fixture
def end_to_end(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("end_to_end")
    for name in ("end_to_end", "timing", "training", "text_to_3d", "shapes"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("learns", ["lora", "embedding"])
@pytest.mark.parametrize("outside", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("encodes", [True, False])  # without: the UNet's backward pass is the last
def test_share_outside_of_the_networks(end_to_end, monkeypatch, learns, outside, encodes):
    clock = Clock()
    monkeypatch.setattr(end_to_end, "time", clock)
    unet = Network(clock, 2.0, 3.0, learns == "lora", lambda x: SimpleNamespace(sample=x))
    encoder = Network(clock, 0.5, 0.25, False, lambda x: x)
    embedding = torch.nn.Parameter(torch.ones(()))
    model = SimpleNamespace(unet=unet, vae=SimpleNamespace(encoder=encoder))
    system = SimpleNamespace(guidance=SimpleNamespace(model=model, models=lambda: (model,)))
    watched = end_to_end.Clock("cpu", warm_up=1, timed=2, profiled=3)
    shape = torch.nn.Parameter(torch.ones(3))
    for _ in range(watched.steps):
        rgb = Takes.apply(shape * 1, clock, outside, 2 * outside)  # a renderer
        z = encoder(rgb) if encodes else rgb
        x = z.detach() if learns == "lora" else z.detach() * embedding
        loss = unet(x).sample.sum()
        with torch.no_grad():
            unet(z)
        (loss + z.sum() if encodes else loss).backward()
        watched.on_after_backward()
        clock.pass_(outside)  # an optimizer
        watched.on_train_batch_end(None, system)
    inside = 2.0 + 2.0 + 3.0 + (0.5 + 0.25) * encodes
    around = (4 if encodes else 2) * outside  # nothing goes back to the renderer without
    wanted = around / (around + inside)
    assert watched.shares == pytest.approx([wanted] * 3)
    watched.batch = (1, 8)
    assert watched.row()["step_s"] == pytest.approx(around + inside)
