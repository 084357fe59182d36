"""The gradient that a method gives to images, and its loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from tests.guidance_oracles import distil, random_prompt, side_view
from tests.methods.guidances import ALL, DRAWN, EMBEDDING, LORA, SDS, VSD, images, make, total

__all__ = ["make"]  # a fixture


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("as_latents", [False, True])
def test_gradient_of_the_loss_is_the_jacobian_times_g(make, monkeypatch, as_latents, size):
    guidance = make(SDS)
    g = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(guidance.method, "distil", lambda *args: g)
    rgb = images(size=size, channels=4 if as_latents else 3).requires_grad_()
    torch.manual_seed(3)
    out = guidance(rgb, random_prompt(), *side_view(2), rgb_as_latents=as_latents)
    (grad,) = torch.autograd.grad(out["loss_sds"], rgb)
    # the encoder, written out: resize, 2 x - 1, a posterior sample, the scale of the tiny model
    torch.manual_seed(3)
    x = F.interpolate(rgb.permute(0, 3, 1, 2), (8, 8) if as_latents else (16, 16), mode="bilinear")
    if not as_latents:
        x = 0.7 * guidance.model.vae.encode(2 * x - 1).latent_dist.sample()
    (expected,) = torch.autograd.grad(x, rgb, g / 2)
    assert expected.abs().max() > 1e-4
    rounding = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=rounding)
    torch.testing.assert_close(out["loss_sds"], 0.5 * g.square().sum() / 2)
    torch.testing.assert_close(out["grad_norm"], g.norm())


@pytest.mark.parametrize("name", ALL)
def test_images_of_any_size_get_a_gradient(make, name):
    guidance = make(name)
    rgb = images(size=40).requires_grad_()
    out = guidance(rgb, random_prompt(), *side_view(2))
    total(out).backward()
    assert rgb.grad.isfinite().all() and rgb.grad.abs().max() > 0
    assert all(p.grad is not None for p in guidance.parameters() if p.requires_grad)
    assert all(p.grad is None for p in guidance.model.vae.parameters())
    own = {EMBEDDING: {"loss_embedding"}, LORA: {"loss_lora"}, VSD: {"loss_lora"}}
    assert {k for k in out if k.startswith("loss_")} == {"loss_sds"} | own.get(name, set())
    assert (out["min_step"], out["max_step"]) == (20, 980)


def test_what_is_dropped_is_said_once_and_again_when_it_is_all(make, monkeypatch):
    guidance, warnings = make(SDS), []
    monkeypatch.setattr("threestudio.warn", warnings.append)
    some = torch.ones(2, 4, 8, 8)
    some[0, 0, 0, :4] = math.inf
    for bad, said in ((some, 0), (some, 1), (some * math.nan, 1), (some * math.nan, 2), (some, 2)):
        monkeypatch.setattr(guidance.method, "gradient", lambda *args, bad=bad: bad)
        distil(guidance, torch.zeros_like(bad), None)
        assert len(warnings) == said, warnings  # a step's share is known at the next one
    assert "0.781 % of a gradient's elements" in warnings[0] and "100 %" in warnings[1]


@pytest.mark.parametrize("name", DRAWN)
def test_not_finite_is_dropped_and_the_rest_clipped(make, monkeypatch, name):
    guidance = make(name, grad_clip=OmegaConf.create([0, 2.0, 0.5, 10]))
    bad = torch.full((1, 4, 8, 8), 7.0)
    bad[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -7.0])
    monkeypatch.setattr(guidance.method, "gradient", lambda *args: bad)
    for step, clip in [(0, 2.0), (10, 0.5)]:
        guidance.do_update_step(0, step)
        got = distil(guidance, torch.zeros(1, 4, 8, 8), None)
        assert got[0, 0, 0, :5].tolist() == [0, 0, 0, -clip, clip]
    unclipped = make(name)
    monkeypatch.setattr(unclipped.method, "gradient", lambda *args: bad)
    assert distil(unclipped, torch.zeros(1, 4, 8, 8), None).max() == 7


@pytest.mark.parametrize("name", ALL)
def test_unet_calls_per_step(make, name):
    """All predictions of the gradient in one call, those of an inversion and the loss of what is
    learned in others, with ``lora_n_timestamp_samples`` draws per image."""
    fields = {"min_step_percent": 0.5, "max_step_percent": 0.5, "inversion_steps": 3}
    guidance, rows = make(name, lora_n_timestamp_samples=3, **fields), []
    guidance.model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    guidance(images(n=2), random_prompt(), *side_view(2))
    calls = {EMBEDDING: [6, 4], LORA: [6, 4], VSD: [6, 6], "lods-nfsd-guidance": [6]}
    # three steps under two texts; from 0 to 450 in three steps of up to 200, and one more
    calls |= {"lods-sdi-guidance": [4] * 4, "lods-ism-guidance": [2] * 4 + [4]}
    assert rows == calls.get(name, [4])


def test_more_draws_have_the_same_mean_and_less_noise(make):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    few, many = [], []
    torch.manual_seed(0)
    for values, n in ((few, 1), (many, 16)):
        guidance = make(LORA, lora_n_timestamp_samples=n)
        zero = lambda x_t, t: torch.zeros_like(x_t)  # noqa: E731
        for _ in range(64):
            values.append(guidance.denoising_loss(z, zero))
    few, many = torch.stack(few), torch.stack(many)
    assert many.mean() == pytest.approx(1, abs=0.02) and few.mean() == pytest.approx(1, abs=0.06)
    assert many.std() < 0.5 * few.std()


@pytest.mark.parametrize("name", DRAWN)
def test_timesteps_stay_within_the_schedule(make, name, monkeypatch):
    schedule = OmegaConf.create([5, 1.0, 0.5, 6])
    guidance, seen = make(name, min_step_percent=0.4, max_step_percent=schedule), []
    monkeypatch.setattr(
        guidance.method, "gradient", lambda x_t, t, *rest: seen.append(t) or torch.zeros_like(x_t)
    )
    for step, low, high in [(0, 400, 999), (6, 400, 500)]:
        guidance.do_update_step(0, step)
        assert (guidance.min_step, guidance.max_step) == (low, high)
        seen.clear()
        distil(guidance, torch.zeros(4000, 1, 1, 1), None)
        assert (seen[0].min(), seen[0].max()) == (low, high)
    guidance.method.cfg.min_step_percent = 0.6
    with pytest.raises(ValueError, match="min_step_percent <= max_step_percent"):
        guidance.do_update_step(0, 6)


@pytest.mark.parametrize("dependent", [True, False])
def test_view_dependent_prompting(make, monkeypatch, dependent):
    guidance, prompt, seen = make(SDS, view_dependent_prompting=dependent), random_prompt(), []
    monkeypatch.setattr(
        guidance.method, "distil", lambda z, given: seen.append(given) or torch.zeros_like(z)
    )
    guidance(images(), prompt, torch.zeros(2), torch.tensor([0.0, 90.0]), torch.ones(2))
    y, null, plain = seen[0].prompt, seen[0].null, prompt.text_embeddings[0]
    assert torch.equal(y[0], plain + 1 if dependent else plain)  # the front view
    assert torch.equal(y[1], plain)
    assert torch.equal(null[0], prompt.uncond_text_embeddings[0])
