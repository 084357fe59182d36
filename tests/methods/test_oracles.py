"""The methods against exact oracles: where they vanish, where they lead, and each other."""

import importlib
import math

import pytest
import torch
from lods.methods.conditions import Conditions

from tests.guidance_oracles import (
    GaussianUNet,
    Prompt,
    as_embedding,
    distil,
    random_prompt,
    side_view,
)
from threestudio import find

METHODS = ["lods-embedding-guidance", "lods-lora-guidance", "lods-sds-guidance"]
KINDS = ["epsilon", "v_prediction"]


@pytest.fixture(scope="module")
def make(lods, tiny_sd):
    """``make(name, **fields)``: a guidance on a random model with latents (4, 4, 4)."""

    def build(name, prediction_type="epsilon", seed=0, **fields):
        folder = tiny_sd(sample_size=4, prediction_type=prediction_type, seed=seed)
        return find(name)({"pretrained_model_name_or_path": folder, **fields})

    return build


@pytest.fixture(scope="module")
def formulas(lods):
    return importlib.import_module("lods.scores")


def latents(n=2, seed=1):
    return torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def shake_lora(guidance, seed=2, size=0.3):
    """Give B something to say: it starts as zero, which hides every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in guidance.lora.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def predict_pair(guidance, x_t, t, y, null):
    """(frozen, under the prompt; learned, under the null prompt), as LODS takes them."""
    return guidance.predict_with_lora(x_t, t, Conditions(y, null), [y], null)


# --- closed-form models ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "sample"])
@pytest.mark.parametrize("s", [1.0, 7.5, 1000.0, math.inf])
def test_no_gradient_at_the_mode(make, kind, s):
    mode = latents(1, seed=3)[0]
    guidance = make("lods-embedding-guidance", guidance_scale=s)
    guidance.model.prediction_type = kind
    guidance.model.unet = GaussianUNet(guidance.model, std=0.0, kind=kind)
    prompt = as_embedding(mode)
    guidance.initialize(Prompt(prompt, prompt))
    rows = prompt.expand(8, -1, -1)
    at_mode = distil(guidance, mode.expand(8, -1, -1, -1), Conditions(rows, rows))
    assert at_mode.abs().max() < 1e-3
    # ... and only there: it points away from where the particle should go
    off = mode + 0.5
    if math.isfinite(s):
        away = distil(guidance, off.expand(8, -1, -1, -1), Conditions(rows, rows))
        assert (away.mean((1, 2, 3)) > 1e-5).all()
    # the learned part knows the particle, the prompt the mode: the difference moves it there
    with torch.no_grad():
        guidance.learnable_embedding.copy_(as_embedding(off))
    grad = distil(guidance, off.expand(8, -1, -1, -1), Conditions(rows, rows))
    assert (grad > 0).all()


def drive(guidance, prompt, start, steps=200, lr=1.0, prior_lr=30.0, draws=8):
    """Plain gradient descent, its rates decaying to 0; returns where the one particle ends."""
    particle = start.clone().requires_grad_()
    learned = [p for p in guidance.parameters() if p.requires_grad]
    groups = [{"params": [particle], "lr": lr}, {"params": learned, "lr": prior_lr}]
    optimizer = torch.optim.SGD(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        rows = particle.permute(0, 2, 3, 1).expand(draws, -1, -1, -1)
        out = guidance(rows, prompt, *side_view(draws), True)
        sum(v for k, v in out.items() if k.startswith("loss_")).backward()
        optimizer.step()
        decay.step()
    return particle.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [7.5, math.inf])
def test_lods_moves_a_particle_to_the_gaussian(make, kind, s):
    mode, start = latents(1, seed=3), latents(1, seed=4)
    guidance = make("lods-embedding-guidance", guidance_scale=s)
    guidance.model.prediction_type = kind
    guidance.model.unet = GaussianUNet(guidance.model, std=1.0, kind=kind)
    prompt = Prompt(as_embedding(mode), as_embedding(torch.zeros_like(mode)))
    before = (start - mode).square().mean().sqrt()
    end = drive(guidance, prompt, start)
    assert before > 1.0
    assert (end - mode).square().mean().sqrt() < 0.2
    # what was learned is where the particle is
    learned = guidance.learnable_embedding.detach().flatten()[: mode.numel()]
    assert (learned - end.flatten()).square().mean().sqrt() < 0.2


@pytest.mark.parametrize("nearest", [0, 1])
def test_lods_chooses_the_nearer_of_two_modes(make, nearest):
    modes = torch.stack([torch.full((4, 4, 4), -1.0), torch.full((4, 4, 4), 1.0)])
    guidance = make("lods-embedding-guidance", guidance_scale=7.5, max_step_percent=0.3)
    guidance.model.unet = GaussianUNet(guidance.model, std=0.3, modes=2)
    start = 0.4 * modes[[nearest]]
    # the null holds one mean twice, and so does what it learns from there
    prompt = Prompt(as_embedding(*modes), as_embedding(0 * modes[0], 0 * modes[0]))
    end = drive(guidance, prompt, start)
    assert (end - modes[nearest]).abs().mean() < 0.1
    assert (end - modes[1 - nearest]).abs().mean() > 1.8


# --- the methods against each other ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [0.5, 7.5, 1000.0])
def test_frozen_lods_is_sds_over_s(make, kind, s):
    """An embedding still at the null prompt, a LoRA still at B = 0: both are CFG-SDS / s."""
    prompt = random_prompt()
    conditions = Conditions(*prompt.get_text_embeddings(*side_view(2)).chunk(2))
    grads = {}
    for name in METHODS:
        guidance = make(name, kind, guidance_scale=s)
        guidance.initialize(prompt)
        torch.manual_seed(5)
        grads[name] = distil(guidance, latents(), conditions)
    sds = grads["lods-sds-guidance"] / s
    assert sds.abs().max() > 1e-2
    for name in METHODS[:2]:
        torch.testing.assert_close(grads[name], sds, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS[:2])
def test_infinite_scale_is_csd(make, formulas, name):
    guidance = make(name, guidance_scale=math.inf)
    prompt = random_prompt()
    guidance.initialize(prompt)
    y, null = prompt.get_text_embeddings(*side_view(2)).chunk(2)
    x_t, eps, t = latents(seed=6), latents(seed=7), torch.tensor([100, 900])
    with torch.no_grad():
        grad = guidance.gradient(x_t, t, eps, Conditions(y, null))
        eps_c, eps_u = (guidance.model.predict(x_t, t, e) for e in (y, null))
    w = 1 - guidance.model.schedule.alphas_cumprod[t].view(2, 1, 1, 1)
    assert (eps_c - eps_u).abs().max() > 1e-3
    torch.testing.assert_close(grad, w * (eps_c - eps_u), rtol=1e-4, atol=1e-6)


class NoiseFromV(torch.nn.Module):
    """A v-model made to output noise."""

    def __init__(self, unet, model):
        super().__init__()
        self.unet, self.abar = unet, model.schedule.alphas_cumprod

    def forward(self, x, t, encoder_hidden_states):
        out = self.unet(x, t, encoder_hidden_states=encoder_hidden_states)
        abar = self.abar[t].view(-1, 1, 1, 1)
        out.sample = abar.sqrt() * out.sample + (1 - abar).sqrt() * x
        return out


@pytest.mark.parametrize("name", METHODS)
def test_v_model_is_a_noise_model_wrapped(make, name):
    prompt, results = random_prompt(), []
    for kind in KINDS:  # the same weights; only the scheduler's prediction_type differs
        guidance = make(name, kind)
        assert guidance.model.prediction_type == kind
        learned = list(guidance.parameters())
        if name == "lods-lora-guidance":
            torch.manual_seed(8)
            with torch.no_grad():
                for parameter in learned:
                    parameter.normal_(std=0.2)
        results.append([])
        for wrapped in [False, True] if kind == "epsilon" else [False]:
            if wrapped:
                guidance.model.unet = NoiseFromV(guidance.model.unet, guidance.model)
            z = latents().permute(0, 2, 3, 1).requires_grad_()
            torch.manual_seed(9)
            out = guidance(z, prompt, *side_view(2), rgb_as_latents=True)
            loss = sum(v for k, v in out.items() if k.startswith("loss_"))
            results[-1].append([loss.detach(), *torch.autograd.grad(loss, [z, *learned])])
    (plain, wrapped), (v,) = results
    assert (plain[1] - v[1]).abs().max() > 1e-3
    for one, other in zip(wrapped, v):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lora_rows_of_one_call(make, kind):
    guidance = make("lods-lora-guidance", kind, lora_scale=0.5)
    x_t, t = latents(3), torch.tensor([20, 500, 980])
    y, null = random_prompt().get_text_embeddings(*side_view(3)).chunk(2)
    predict, lora = guidance.model.predict, guidance.lora
    with torch.no_grad():
        base = predict(x_t, t, null)
        zero = predict_pair(guidance, x_t, t, y, null)[1]
        torch.testing.assert_close(zero, base, rtol=1e-5, atol=1e-6)  # B = 0
        shake_lora(guidance)
        eps_c, eps_u = predict_pair(guidance, x_t, t, y, null)
        assert (eps_u - base).flatten(1).norm(dim=1).min() > 1e-2  # B != 0, in every row
        torch.testing.assert_close(eps_c, predict(x_t, t, y), rtol=1e-5, atol=1e-6)
        for row in range(3):
            one = slice(row, row + 1)
            with lora.strength(0.5):
                alone = predict(x_t[one], t[one], null[one])
            torch.testing.assert_close(eps_u[one], alone, rtol=1e-4, atol=1e-6)
        with lora.strength(1.0):
            assert (predict(x_t, t, null) - eps_u).abs().max() > 1e-3  # the strength matters
        # outside, the model is what it was
        torch.testing.assert_close(predict(x_t, t, null), base, rtol=0, atol=0)


def test_lora_learns_at_the_strength_it_is_used_with(make):
    guidance = make("lods-lora-guidance", lora_scale=0.5)
    shake_lora(guidance)
    z = latents()
    y, null = random_prompt().get_text_embeddings(*side_view(2)).chunk(2)
    torch.manual_seed(1)
    loss = guidance.learn(z, Conditions(y, null))["loss_lora"]
    torch.manual_seed(1)
    t, eps = torch.randint(1000, (2,)), torch.randn_like(z)
    x_t = guidance.model.add_noise(z, eps, t)
    by_hand = {}
    for strength in (0.5, 1.0):
        with guidance.lora.strength(strength):
            predicted = guidance.model.predict(x_t, t, null)
        by_hand[strength] = (predicted - eps).square().mean()
    torch.testing.assert_close(loss, by_hand[0.5])
    assert abs(loss - by_hand[1.0]) > 1e-3


def test_lora_in_another_model(make, tiny_sd):
    other = tiny_sd(sample_size=4, seed=1)
    guidance = make("lods-lora-guidance", pretrained_model_name_or_path_lora=other)
    reference = make("lods-lora-guidance", seed=1)
    shake_lora(guidance)
    reference.lora.load_state_dict(guidance.lora.state_dict())
    x_t, t = latents(), torch.tensor([20, 500])
    y, null = random_prompt().get_text_embeddings(*side_view(2)).chunk(2)
    with torch.no_grad():
        eps_c, eps_u = predict_pair(guidance, x_t, t, y, null)
        torch.testing.assert_close(eps_c, guidance.model.predict(x_t, t, y))
        _, expected = predict_pair(reference, x_t, t, y, null)
    torch.testing.assert_close(eps_u, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"does not fit: its latent_shape is \(4, 8, 8\), not \(4, 4, 4\)"
    ):
        make(
            "lods-lora-guidance", pretrained_model_name_or_path_lora=tiny_sd(sample_size=8, seed=1)
        )


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_starts_as_published(make, rank):
    """A ~ N(0, 1 / rank^2), B = 0, float32, on q, k, v and out of every attention."""
    guidance = make("lods-lora-guidance", lora_rank=rank)
    named = dict(guidance.lora.named_parameters())
    attentions = sum(type(m).__name__ == "Attention" for m in guidance.model.unet.modules())
    assert len(named) == attentions * 4 * 2 > 0
    assert all(p.requires_grad and p.dtype == torch.float32 for p in named.values())
    downs = torch.cat([p.detach().flatten() for n, p in named.items() if "lora_A" in n])
    assert downs.std().item() == pytest.approx(1 / rank, rel=0.1)
    assert all(p.abs().max() == 0 for n, p in named.items() if "lora_B" in n)
    with pytest.raises(ValueError, match="lora_rank must be a whole number from 1"):
        make("lods-lora-guidance", lora_rank=0)
