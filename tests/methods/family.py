"""The family of methods on a tiny random model, for the tests beside this file."""

import importlib

import pytest
import torch
from lods.cameras import Cameras

from tests.guidance_oracles import (
    distil,
    side_view,
)
from threestudio import find

SHORT = ("sds", "csd", "nfsd", "vsd", "bridge", "sdi", "ism", "embedding", "lora")
# nothing drawn but t and eps; second stage
FIXED = {"sdi": {"inversion_eta": 0.0}, "bridge": {"bridge_start": 0}}


@pytest.fixture(scope="module")
def make(lods, tiny_sd):
    """``make(short, **fields)``: a method on a random model with latents (4, 4, 4)."""

    def build(short, **fields):
        fields.setdefault("pretrained_model_name_or_path", tiny_sd(sample_size=4))
        return find(f"lods-{short}-guidance")({**FIXED.get(short, {}), **fields})

    return build


def part(name):
    return importlib.import_module(f"lods.{name}")


def latents(n=2, seed=1):
    return torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def shake(parameters, size=0.3, seed=2):
    """Give the learned part something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def g(guidance, prompt, z=None, seed=5, **batch):
    """The gradient for a call with ``batch``, for one seed; nothing is learned."""
    z = latents() if z is None else z
    views = side_view(len(z))
    guidance.initialize(prompt)
    cameras = Cameras(*views, batch.get("c2w"), batch.get("mvp_mtx"))
    prompts = guidance.prompts_of(prompt)
    conditions = prompts.conditions(cameras, guidance.other_texts)
    torch.manual_seed(seed)
    return distil(guidance, z, conditions)


def call(guidance, prompt, **batch):
    """The outputs of a call for latents that look from the side."""
    rows = latents().permute(0, 2, 3, 1).clone().requires_grad_()
    return guidance(rows, prompt, *side_view(2), rgb_as_latents=True, **batch)


def pieces(guidance, prompt, *texts, seed=5):
    """w(t), eps, t and the predictions under these texts, for what ``g`` draws with that seed."""
    z = latents()
    torch.manual_seed(seed)
    t, eps = torch.randint(20, 981, (2,)), torch.randn_like(z)
    x_t = guidance.model.add_noise(z, eps, t)
    with torch.no_grad():
        found = [guidance.model.predict(x_t, t, e.expand(2, -1, -1)) for e in texts]
    return 1 - guidance.model.schedule.alphas_cumprod[t].view(2, 1, 1, 1), eps, t, *found


def close(got, want):
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
