"""The family of methods where the model is known in closed form, and under Perp-Neg."""

import itertools

import pytest
import torch
from lods.methods.conditions import Conditions

from tests.guidance_oracles import (
    GaussianUNet,
    PerpNegPrompt,
    Prompt,
    as_embedding,
    random_prompt,
)
from tests.methods.family import SHORT, close, g, latents, make, part, pieces, shake

__all__ = ["make"]  # a fixture


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_inversion_of_a_gaussian_is_its_trajectory_and_returns(make, std):
    """DDIM's limit for N(m, std^2): (x_t - alpha m) / sqrt(alpha^2 std^2 + sigma^2) is constant."""
    guidance, invert = make("sds"), part("methods.inversion").ddim_invert
    model, mode, z = guidance.model, latents(1, seed=3), latents()
    model.unet, alpha_sigma = GaussianUNet(model, std=std), model.schedule.alpha_sigma
    text = as_embedding(mode).expand(2, -1, -1)
    t, errors = torch.tensor([300, 900]), []
    alpha, sigma = (a.view(2, 1, 1, 1) for a in alpha_sigma(t))
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    want = alpha * mode + (z - mode) / std * spread
    for n in (10, 100):
        steps = (t * torch.arange(n + 1)[:, None] / n).round().long()
        x_t = invert(model.schedule, lambda x, t: model.predict(x, t, text), z, steps)
        errors.append(((x_t - want).norm() / want.norm()).item())
    assert errors[1] < 0.02 and errors[1] < 0.3 * errors[0]
    ddim, x = part("scores").ddim, x_t
    for high, low in itertools.pairwise(steps.flip(0)):
        eps = model.predict(x, high, text)
        x = ddim(x, eps, alpha_sigma(high), alpha_sigma(low))
    assert (x - z).norm() < 0.07 * z.norm()


def test_inversion_of_a_dirac_adds_noise_to_it_only(make):
    """The mode stays what it is: x_t = alpha m + sigma k, with one k all along."""
    guidance, mode = make("ism", ism_delta_s=100), latents(1, seed=3)
    guidance.model.unet = GaussianUNet(guidance.model, std=0.0)
    rows = as_embedding(mode).expand(2, -1, -1)
    t = torch.tensor([400, 900])
    x_t, eps = guidance.diffuse(mode.expand(2, -1, -1, -1), t, Conditions(rows, rows))
    torch.testing.assert_close(guidance.model.noise_of(x_t, mode, t), eps, rtol=0, atol=1e-3)
    alpha, sigma = (float(a[0]) for a in guidance.model.schedule.alpha_sigma(torch.tensor([0])))
    torch.testing.assert_close(eps[0], mode[0] * (1 - alpha) / sigma, rtol=0, atol=1e-3)


def test_eta_adds_the_noise_of_a_ddpm_step(make):
    """With a model that sees no noise, two steps of inversion have a known variance."""
    guidance, invert = make("sds"), part("methods.inversion").ddim_invert
    abar = guidance.model.schedule.alphas_cumprod
    z = torch.zeros(4000, 1, 2, 2)
    steps = torch.tensor([0, 300, 700])[:, None].expand(-1, 4000)
    torch.manual_seed(0)
    x = invert(guidance.model.schedule, lambda x, t: torch.zeros_like(x), z, steps, eta=0.5)
    a, b = abar[300], abar[700]  # the first step starts at no noise at all, and adds none
    std = 0.5 * ((1 - a) / (1 - b) * (1 - b / a)).sqrt()
    assert x.std().item() == pytest.approx(std.item(), rel=0.03)


@pytest.mark.parametrize("short", SHORT)
def test_no_gradient_at_the_mode(make, short):
    """Where all texts mean what is there, nothing moves; NFSD's delta_D for small t does."""
    mode = latents(1, seed=3)
    guidance = make(short, min_step_percent=0.3 if short == "nfsd" else 0.02)
    guidance.model.unet = GaussianUNet(guidance.model, std=0.0)
    text = as_embedding(mode)
    source = text.clone().index_fill_(0, torch.tensor(-1 % len(text)), 1.0)  # of no effect
    prompt = Prompt(text, text, source=source, nfsd_negative=text)
    z = mode.expand(8, -1, -1, -1)
    assert g(guidance, prompt, z).abs().max() < 2e-3
    # a prompt elsewhere pulls towards it
    prompt = Prompt(as_embedding(mode + 1), text, source=source, nfsd_negative=text)
    pull = g(guidance, prompt, z)
    assert (pull.mean((1, 2, 3)) < -1e-3).all()


@pytest.mark.parametrize("short", SHORT)
def test_perp_neg_for_every_method(make, short):
    """Weights of 0 change nothing, whatever the negatives' rows are; others do."""
    guidance, plain = make(short), random_prompt()
    guidance.initialize(plain)
    shake(guidance.parameters(), size=0.1)
    negatives = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(8))
    want = g(guidance, plain)
    for weights, same in (((0.0, 0.0), True), ((-1.0, -0.5), False)):
        got = g(guidance, PerpNegPrompt(plain, negatives, torch.tensor(weights)))
        if same:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        else:
            assert (got - want).abs().max() > 1e-2
    torch.testing.assert_close(g(guidance, plain), want, rtol=0, atol=0)  # nothing is left behind


def test_perp_neg_by_hand(make):
    plain = random_prompt()
    negatives = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(8))
    guidance, weights = make("csd"), torch.tensor([-1.0, -0.3])
    texts = (plain.text_embeddings, plain.uncond_text_embeddings, *negatives)
    w, _, _, eps_c, eps_u, *others = pieces(guidance, plain, *texts)
    want, d = eps_c - eps_u, eps_c - eps_u
    for eps_i, w_i in zip(others, weights):
        n = eps_i - eps_u
        along = [(n[b] * d[b]).sum() / d[b].square().sum() * d[b] for b in range(2)]
        want = want + w_i * (n - torch.stack(along))
    close(g(guidance, PerpNegPrompt(plain, negatives, weights)), w * want)


def test_perp_neg_needs_views(make):
    prompt = PerpNegPrompt(random_prompt(), torch.zeros(2, 16, 32), torch.zeros(2))
    with pytest.raises(ValueError, match=r"guidance\.view_dependent_prompting=true"):
        g(make("sds", view_dependent_prompting=False), prompt)
