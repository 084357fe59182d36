"""``stable-diffusion-guidance`` against its formulas, written out, and closed-form denoisers."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from tests.guidance_oracles import GaussianUNet, as_embedding, random_prompt
from threestudio import find
from threestudio.utils.errors import UserError

KINDS = ["epsilon", "v_prediction", "sample"]
VIEWS = (torch.tensor([0.0, 10.0]), torch.tensor([90.0, 120.0]), torch.ones(2))


@pytest.fixture(scope="module")
def make(tiny_sd):
    """``make(kind, **fields)``: the guidance on a random model with latents (4, 8, 8)."""

    def build(kind="epsilon", **fields):
        folder = fields.pop("model", None) or tiny_sd(prediction_type=kind)
        config = {"pretrained_model_name_or_path": folder, **fields}
        return find("stable-diffusion-guidance")(OmegaConf.create(config))

    return build


def latents(seed=1, n=2):
    return torch.randn(n, 8, 8, 4, generator=torch.Generator().manual_seed(seed))


def images(seed=2, n=2, size=16):
    return torch.rand(n, size, size, 3, generator=torch.Generator().manual_seed(seed))


def perp_neg(seed=3):
    """A processor's output with a random embedding for every view, and one negative prompt."""
    output = find("dummy-prompt-processor")({"use_perp_neg": True})()
    generator = torch.Generator().manual_seed(seed)
    views, null = torch.randn(4, 16, 32, generator=generator), torch.randn(1, 16, 32)
    return dataclasses.replace(
        output, text_embeddings_vd=views, uncond_text_embeddings_vd=null.expand(4, -1, -1)
    )


def draws(guidance, z, seed=0):
    """t, eps, x_t, and alpha and sigma as (B, 1, 1, 1), of a call right after this seed."""
    torch.manual_seed(seed)
    t = torch.randint(guidance.min_step, guidance.max_step + 1, (len(z),))
    eps = torch.randn_like(z)
    abar = guidance.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    return t, eps, alpha * z + sigma * eps, alpha, sigma


def noise(guidance, x_t, t, embedding, alpha, sigma):
    """Of one row at a time, by the definition of what is predicted."""
    rows = embedding.expand(len(x_t), -1, -1)
    out = torch.cat([guidance.unet(x_t[i : i + 1], t[i], rows[i : i + 1]).sample for i in (0, 1)])
    kind = guidance.scheduler.config.prediction_type
    if kind == "v_prediction":  # v = alpha eps - sigma z and x_t = alpha z + sigma eps: solve
        return (out + sigma / alpha * x_t) / (alpha + sigma**2 / alpha)
    return (x_t - alpha * out) / sigma if kind == "sample" else out


def gradient(guidance, rgb, prompt, seed=0, loss="loss_sds", views=VIEWS, **kwargs):
    torch.manual_seed(seed)
    rgb = rgb.clone().requires_grad_()
    out = guidance(rgb, prompt, *views, extra_key_of_the_batch=1, **kwargs)
    (grad,) = torch.autograd.grad(out[loss], rgb)
    return len(rgb) * grad, out


# --- SDS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["sds", "uniform", "fantasia3d"])
def test_sds_is_the_formula(make, kind, strategy):
    guidance, s = make(kind, guidance_scale=7.0, weighting_strategy=strategy), 7.0
    prompt, z = random_prompt(), latents().permute(0, 3, 1, 2)
    got, out = gradient(guidance, latents(), prompt, rgb_as_latents=True)
    t, eps, x_t, alpha, sigma = draws(guidance, z)
    with torch.no_grad():
        c = noise(guidance, x_t, t, prompt.text_embeddings, alpha, sigma)
        u = noise(guidance, x_t, t, prompt.uncond_text_embeddings, alpha, sigma)
    assert (c - u).abs().max() > 1e-2, "the prompt says something"
    w = {"sds": sigma**2, "uniform": torch.ones_like(sigma), "fantasia3d": alpha * sigma**2}
    expected = w[strategy] * (c + s * (c - u) - eps)
    torch.testing.assert_close(got.permute(0, 3, 1, 2), expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(out["loss_sds"], expected.square().sum() / 4, rtol=1e-3, atol=0)
    torch.testing.assert_close(out["grad_norm"], expected.norm(), rtol=1e-3, atol=0)
    assert (out["min_step"], out["max_step"]) == (20, 980)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_form_model_has_its_mode_as_fixed_point(make, kind):
    guidance, mode = make(kind, guidance_scale=100.0), latents(5, n=1).permute(0, 3, 1, 2)[0]
    oracle = SimpleNamespace(schedule=SimpleNamespace(alphas_cumprod=guidance.alphas))
    unet = GaussianUNet(oracle, std=0.0, kind=kind)
    unet.config = guidance.unet.config
    guidance.unet = unet
    prompt = random_prompt()
    prompt.text_embeddings = prompt.uncond_text_embeddings = as_embedding(mode)[None]
    at = mode.permute(1, 2, 0).expand(2, -1, -1, -1)
    assert gradient(guidance, at, prompt, rgb_as_latents=True)[0].abs().max() < 1e-3
    away = gradient(guidance, at + 0.5, prompt, rgb_as_latents=True)[0]
    assert (away > 1e-4).all(), "descent leads back to the mode"


def test_v_prediction_of_pocket_shapes(make, lods):
    """At t = 900 almost all is noise, and a trained model sees it."""
    from pathlib import Path

    guidance = make(model=str(Path(lods.__file__).parent / "models" / "pocket-shapes"))
    assert guidance.scheduler.config.prediction_type == "v_prediction"
    size, t = guidance.latent_size, torch.tensor([900])
    eps = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 4, guidance.text_width)
    abar = guidance.alphas[900]
    with torch.no_grad():
        found = guidance.predict_noise((1 - abar).sqrt() * eps, t, text)
        raw = guidance.forward_unet((1 - abar).sqrt() * eps, t, text)
    assert F.mse_loss(found, eps) < 0.05 < F.mse_loss(raw, eps)


def test_images_go_through_the_vae(make):
    guidance, prompt = make(), random_prompt()
    rgb = images(size=24).requires_grad_()  # resized to the model's 16
    torch.manual_seed(1)
    x = F.interpolate(rgb.permute(0, 3, 1, 2), (16, 16), mode="bilinear")
    z = 0.7 * guidance.vae.encode(2 * x - 1).latent_dist.sample()
    torch.manual_seed(1)
    out = guidance(rgb, prompt, *VIEWS)
    (got,) = torch.autograd.grad(out["loss_sds"], rgb)
    torch.manual_seed(1)
    torch.randn(z.shape)  # the posterior's draw comes before those of t and eps
    t = torch.randint(20, 981, (2,))
    eps = torch.randn_like(z)
    with torch.no_grad():
        alpha, sigma = guidance._alpha_sigma(t)
        x_t = alpha * z + sigma * eps
        c = noise(guidance, x_t, t, prompt.text_embeddings, alpha, sigma)
        u = noise(guidance, x_t, t, prompt.uncond_text_embeddings, alpha, sigma)
        g = sigma**2 * (c + 100 * (c - u) - eps)
    (expected,) = torch.autograd.grad(z, rgb, g / 2)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert set(out) == {"loss_sds", "grad_norm", "min_step", "max_step"}


def test_the_plain_prompt_can_be_asked_for(make):
    prompt = random_prompt()  # front views have another embedding
    front = (torch.zeros(2), torch.zeros(2), torch.ones(2))
    z = latents()
    dependent = gradient(make(), z, prompt, views=front, rgb_as_latents=True)[0]
    plain = make(view_dependent_prompting=False)
    got = gradient(plain, z, prompt, views=front, rgb_as_latents=True)[0]
    side = gradient(make(), z, prompt, rgb_as_latents=True)[0]
    assert torch.equal(got, side) and not torch.allclose(got, dependent)


# --- Perp-Neg, image loss, SJC --------------------------------------------------------------------


def test_perp_neg_is_the_formula(make):
    guidance, prompt, s = make(guidance_scale=5.0), perp_neg(), 5.0
    views = (torch.tensor([0.0, 0.0, 80.0]), torch.tensor([30.0, -120.0, 0.0]), torch.ones(3))
    z = latents(n=3)
    got, _ = gradient(guidance, z, prompt, views=views, rgb_as_latents=True)
    t, eps, x_t, _, sigma = draws(guidance, z.permute(0, 3, 1, 2))
    side, front, back, overhead = prompt.text_embeddings_vd

    def f(abc, r):
        return abc[0] * torch.exp(torch.tensor(-abc[1] * r)) + abc[2]

    r = (1 - 30 / 90, 2 - 120 / 90)
    rows = [  # positive, [(negative, weight), ...]
        (
            r[0] * front + (1 - r[0]) * side,
            [
                (front, -f(prompt.perp_neg_f_fs, r[0])),
                (side, -f(prompt.perp_neg_f_sf, 1 - r[0])),
            ],
        ),
        (
            r[1] * side + (1 - r[1]) * back,
            [
                (side, -f(prompt.perp_neg_f_sb, r[1])),
                (front, -f(prompt.perp_neg_f_fsb, r[1])),
            ],
        ),
        (overhead, []),
    ]
    for i, (positive, negatives) in enumerate(rows):

        def unet(embedding, i=i):
            with torch.no_grad():
                return guidance.unet(x_t[i : i + 1], t[i], embedding[None]).sample[0].double()

        u = unet(prompt.uncond_text_embeddings_vd[0])
        e = unet(positive) - u
        total = e.clone()
        for negative, weight in negatives:
            n = unet(negative) - u
            total += weight * (n - (n * e).sum() / (e * e).sum() * e)
        expected = sigma[i] ** 2 * (u + s * total - eps[i])
        torch.testing.assert_close(got[i].permute(2, 0, 1).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_image_loss_is_the_formula(make, kind):
    guidance, prompt = make(kind, use_img_loss=True, guidance_scale=2.0), random_prompt()
    rgb = images()
    got, out = gradient(guidance, rgb, prompt, loss="loss_sds_img")
    torch.manual_seed(0)
    z = guidance.encode_images(rgb.permute(0, 3, 1, 2))
    t, eps = torch.randint(20, 981, (2,)), torch.randn_like(z)
    alpha, sigma = guidance._alpha_sigma(t)
    x_t = alpha * z + sigma * eps
    with torch.no_grad():
        c = noise(guidance, x_t, t, prompt.text_embeddings, alpha, sigma)
        u = noise(guidance, x_t, t, prompt.uncond_text_embeddings, alpha, sigma)
        estimate = (x_t - sigma * (c + 2 * (c - u))) / alpha
        decoded = (guidance.vae.decode(estimate / 0.7).sample / 2 + 0.5).clamp(0, 1)
    expected = sigma**2 * alpha / sigma * (rgb.permute(0, 3, 1, 2) - decoded)
    torch.testing.assert_close(got.permute(0, 3, 1, 2), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out["loss_sds_img"], expected.square().sum() / 4, rtol=1e-3, atol=0)
    assert out["loss_sds"] > 0


@pytest.mark.parametrize("var_red", [True, False])
def test_sjc_in_the_form_of_its_paper(make, var_red):
    """D(x + s n; s), the denoiser of the score model in the variance-exploding form."""
    guidance = make(use_sjc=True, var_red=var_red, guidance_scale=3.0)
    prompt, y = random_prompt(), latents().permute(0, 3, 1, 2)
    got, _ = gradient(guidance, latents(), prompt, rgb_as_latents=True)
    t, n, _, alpha, sigma = draws(guidance, y)
    s = sigma / alpha
    x = y + s * n
    with torch.no_grad():
        scaled = x / (1 + s**2).sqrt()
        c = noise(guidance, scaled, t, prompt.text_embeddings, alpha, sigma)
        u = noise(guidance, scaled, t, prompt.uncond_text_embeddings, alpha, sigma)
    denoised = x - s * (c + 3 * (c - u))
    expected = -(denoised - (y if var_red else x)) / s
    torch.testing.assert_close(got.permute(0, 3, 1, 2), expected, rtol=1e-3, atol=1e-3)


# --- schedules, clipping --------------------------------------------------------------------------


def test_schedules(make):
    guidance = make(
        min_step_percent=[0, 0.3, 0.1, 10], max_step_percent=0.9, grad_clip=[0, 2.0, 0.5, 10]
    )
    for step, expected in [(0, (300, 900, 2.0)), (5, (200, 900, 1.25)), (10, (100, 900, 0.5))]:
        guidance.do_update_step(0, step)
        got = (guidance.min_step, guidance.max_step, guidance.grad_clip_val)
        assert got == pytest.approx(expected, abs=1)
    annealed = make(sqrt_anneal=True, trainer_max_steps=100, max_step_percent=[0, 0.92, 0.5, 9])
    for step, expected in [(0, 920), (25, 920 - 450), (100, 20), (400, 20)]:
        annealed.do_update_step(0, step)
        assert annealed.min_step == annealed.max_step == pytest.approx(expected, abs=1)
    with pytest.raises(UserError, match=r"0\.9 and 0\.5"):
        make(min_step_percent=0.9, max_step_percent=0.5)


def test_the_gradient_is_finite_and_clipped(make, monkeypatch):
    guidance = make(grad_clip=0.25)
    bad = torch.full((2, 4, 8, 8), 1e4)
    bad[:, 0] = torch.nan
    bad[:, 1, 0, 0], bad[:, 2] = torch.inf, -1e4
    monkeypatch.setattr(guidance, "get_noise_pred", lambda *args: bad)
    got, _ = gradient(guidance, latents(), random_prompt(), rgb_as_latents=True)
    got = got.permute(0, 3, 1, 2)
    assert (got[:, 0] == 0).all() and (got[:, 1, 0, 0] == 0).all()
    torch.testing.assert_close(got[:, 2], torch.full_like(got[:, 2], -0.25))
    torch.testing.assert_close(got[:, 3], torch.full_like(got[:, 3], 0.25))


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluation_finds_the_mode_and_draws_nothing(make, tmp_path):
    guidance, mode = make(max_items_eval=2), latents(5, n=1).permute(0, 3, 1, 2)[0]
    oracle = SimpleNamespace(schedule=SimpleNamespace(alphas_cumprod=guidance.alphas))
    unet = GaussianUNet(oracle, std=0.0)
    unet.config = guidance.unet.config
    guidance.unet = unet
    prompt = random_prompt()
    prompt.text_embeddings = prompt.uncond_text_embeddings = as_embedding(mode)[None]
    z, views = latents(n=3), (torch.full((3,), 5.0), torch.full((3,), 90.0), torch.full((3,), 2.0))
    without, _ = gradient(guidance, z, prompt, views=views, rgb_as_latents=True)
    after = torch.get_rng_state()
    got, out = gradient(guidance, z, prompt, views=views, rgb_as_latents=True, guidance_eval=True)
    assert torch.equal(got, without) and torch.equal(torch.get_rng_state(), after)
    evaluated = out["eval"]
    t, _, x_t, _, _ = draws(guidance, z.permute(0, 3, 1, 2))
    assert evaluated["bs"] == 2
    assert evaluated["noise_levels"] == pytest.approx((t[:2] / 1000).tolist())
    assert evaluated["texts"][0] == f"n{float(t[0]) / 1000:.2f}\ne5.0\na90.0\nc2.00"
    with torch.no_grad():
        expected = guidance.decode_latents(mode[None]).permute(0, 2, 3, 1).expand(2, -1, -1, -1)
        noisy = guidance.decode_latents(x_t[:2]).permute(0, 2, 3, 1)
    for name in ("imgs_1orig", "imgs_final"):
        torch.testing.assert_close(evaluated[name], expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(evaluated["imgs_noisy"], noisy)
    # one step: less noise than before, of the same kind
    next_t = [(int(i) - 1) // 20 * 20 for i in t[:2]]
    abar, now = (guidance.alphas[k].view(-1, 1, 1, 1) for k in (next_t, t[:2]))
    eps = (x_t[:2] - now.sqrt() * mode) / (1 - now).sqrt()
    with torch.no_grad():
        one = guidance.decode_latents(abar.sqrt() * mode + (1 - abar).sqrt() * eps)
    torch.testing.assert_close(evaluated["imgs_1step"], one.permute(0, 2, 3, 1), rtol=0, atol=5e-3)

    from threestudio.systems.base import BaseLift3DSystem

    class System(BaseLift3DSystem):
        def configure(self):
            pass

    system = System({})
    system.set_save_dir(str(tmp_path))
    system.guidance_evaluation_save(images(n=3), evaluated)
    assert (tmp_path / "it0-train.png").is_file()


def test_how_many_are_evaluated(make):
    prompt = random_prompt()
    for limit, expected in [(1, 1), (0, 2), (9, 2)]:
        guidance = make(max_items_eval=limit, max_step_percent=0.05)
        out = guidance(latents(), prompt, *VIEWS, rgb_as_latents=True, guidance_eval=True)
        assert len(out["eval"]["imgs_final"]) == out["eval"]["bs"] == expected
        assert out["eval"]["imgs_final"].shape[1:] == (16, 16, 3)


# --- options and mistakes -------------------------------------------------------------------------


def test_sizes_are_the_models(make, tiny_sd):
    guidance = make(model=tiny_sd(width=24, tokens=5, sample_size=4))
    assert (guidance.latent_size, guidance.image_size, guidance.text_width) == (4, 8, 24)
    prompt = random_prompt(tokens=5, width=24)
    assert guidance(images(size=30), prompt, *VIEWS)["loss_sds"].isfinite()
    assert guidance.weights_dtype == torch.float32, "float16 is for CUDA"
    wide = guidance.decode_latents(torch.zeros(1, 4, 4, 4), latent_height=6, latent_width=8)
    assert wide.shape == (1, 3, 12, 16)


def test_memory_options_do_not_change_the_gradient(make):
    prompt = random_prompt()
    plain, _ = gradient(make(), images(), prompt)
    for option in ("attention_slicing", "channels_last_format", "sequential_cpu_offload"):
        guidance = make(**{f"enable_{option}": True})
        got, _ = gradient(guidance, images(), prompt)
        torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
        if option == "sequential_cpu_offload":
            assert next(guidance.unet.parameters()).device.type == "meta"
        if option == "channels_last_format":
            assert guidance.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        if option == "attention_slicing":
            names = {type(p).__name__ for p in guidance.unet.attn_processors.values()}
            assert names == {"SlicedAttnProcessor"}


def test_token_merging(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    with pytest.raises(UserError, match="pip install tomesd"):
        make(token_merging=True)
    patched = []
    fake = SimpleNamespace(apply_patch=lambda unet, **kwargs: patched.append((unet, kwargs)))
    monkeypatch.setitem(sys.modules, "tomesd", fake)
    guidance = make(token_merging=True, token_merging_params={"ratio": 0.3})
    assert patched == [(guidance.unet, {"ratio": 0.3})]


def test_mistakes_are_one_line(make, tmp_path):
    cases = [
        (lambda: make(weighting_strategy="sd"), "did you mean 'sds'"),
        (lambda: make(use_sjc=True, use_img_loss=True), "set use_sjc=false"),
        (lambda: make(model=str(tmp_path / "nowhere")), "there is no model folder"),
        (lambda: make(model=str(tmp_path)), "cannot load scheduler"),
        (
            lambda: make()(latents(), random_prompt(width=24), *VIEWS, rgb_as_latents=True),
            "embeddings have width 24",
        ),
        (
            lambda: make(use_img_loss=True)(
                latents(), random_prompt(), *VIEWS, rgb_as_latents=True
            ),
            "needs images",
        ),
    ]
    for call, expected in cases:
        with pytest.raises(UserError) as caught:
            call()
        assert expected in str(caught.value) and "\n" not in str(caught.value)
