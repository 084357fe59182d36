"""The family of methods: limits in which one is another, closed forms, and their switches."""

import importlib
import itertools
import math

import pytest
import torch
from lods.cameras import Cameras
from lods.methods import timesteps
from lods.methods.conditions import Conditions
from torch import nn

from tests.guidance_oracles import (
    GaussianUNet,
    PerpNegPrompt,
    Prompt,
    as_embedding,
    distil,
    random_prompt,
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


# --- limits ---------------------------------------------------------------------------------------


def test_csd_is_lods_at_infinity_with_a_frozen_null(make):
    want = g(make("csd"), random_prompt())
    for short in ("embedding", "lora"):
        close(g(make(short, guidance_scale=math.inf), random_prompt()), want)


@pytest.mark.parametrize("short", ["embedding", "lora", "lora of another model"])
def test_lods_towards_guided_samples(make, tiny_sd, short):
    """``prompt_scale`` r: cfg_r(eps_c, eps_n) in place of eps_c, in the same calls."""
    fields = {"guidance_scale": 5.0, "weighting_strategy": "uniform"}
    if short.endswith("model"):
        fields["pretrained_model_name_or_path_lora"] = tiny_sd(sample_size=4, seed=1)
    prompt, kind = random_prompt(), short.split()[0]
    published, guided = make(kind, **fields), make(kind, prompt_scale=3.0, **fields)
    published.initialize(prompt)
    shake(published.parameters())
    guided.load_state_dict(published.state_dict())
    texts = prompt.text_embeddings, prompt.uncond_text_embeddings
    _, _, _, eps_c, eps_n = pieces(guided, prompt, *texts)
    difference = g(guided, prompt) - g(published, prompt)
    close(difference, eps_n + 3 * (eps_c - eps_n) - eps_c)
    rows = []
    guided.model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    g(guided, prompt)
    assert rows == [4 if short.endswith("model") else 6]


def test_a_bridge_from_the_null_is_csd(make):
    prompt = random_prompt()
    source = prompt.others["source"]
    other = g(make("bridge"), prompt)
    prompt.others["source"] = prompt.uncond_text_embeddings[0]
    csd = g(make("csd"), prompt)
    close(g(make("bridge"), prompt), csd)
    assert (other - csd).abs().max() > 1e-2
    w, _, _, eps_c, eps_s = pieces(make("csd"), prompt, prompt.text_embeddings, source)
    close(other, w * (eps_c - eps_s))


@pytest.mark.parametrize("short", SHORT)
def test_a_method_may_start_as_sds_over_its_scale(make, short):
    """Before ``sds_steps`` every method has SDS' gradient, whatever it has learned, and learns."""
    first = {"sds_steps": 3, "sds_scale": 20.0}
    if short == "bridge":
        first = {"bridge_start": 3, "bridge_sds_scale": 20.0}
    prompt, plain = random_prompt(), make(short)
    plain.initialize(prompt)
    shake(plain.parameters())
    guidance = make(short, **first)
    guidance.load_state_dict(plain.state_dict())
    sds, own = g(make("sds", guidance_scale=20.0), prompt) / 20, g(plain, prompt)
    assert (sds - own).abs().max() > 1e-2
    sds = sds * (guidance.cfg.guidance_scale if guidance.grows_with_scale else 1)
    for step, want in ((0, sds), (2, sds), (3, own), (9, own)):
        guidance.do_update_step(0, step)
        close(g(guidance, prompt), want)
    guidance.do_update_step(0, 0)
    losses = {name for name in call(guidance, prompt) if name.startswith("loss_")}
    assert losses == {name for name in call(plain, prompt) if name.startswith("loss_")}


def test_vsd_starts_at_the_model_itself(make):
    prompt = random_prompt()
    guidance = make("vsd")
    w, _, _, eps_c, eps_u = pieces(
        guidance, prompt, prompt.text_embeddings, prompt.uncond_text_embeddings
    )
    start = g(guidance, prompt, c2w=torch.rand(2, 4, 4))
    close(start, w * (eps_u + 7.5 * (eps_c - eps_u) - eps_c))


def test_vsd_rows_of_one_call(make, monkeypatch):
    """LoRA and camera act in the rows of the learned prediction only, each row with its own."""
    guidance, prompt = make("vsd"), random_prompt()
    shake([*guidance.lora.parameters(), *guidance.camera.parameters()])
    y = prompt.text_embeddings.expand(2, -1, -1)
    cameras = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))
    w, eps, t, eps_c, eps_u = pieces(
        guidance, prompt, prompt.text_embeddings, prompt.uncond_text_embeddings
    )
    x_t = guidance.model.add_noise(latents(), eps, t)
    rows = []
    for i in range(2):
        with torch.no_grad(), guidance.camera.rows(cameras[[i]].flatten(1)):
            rows.append(guidance.predict_learned(x_t[[i]], t[[i]], y[[i]]))
    eps_lora = torch.cat(rows)
    assert (eps_lora - eps_c).abs().max() > 1e-2
    close(g(guidance, prompt, c2w=cameras), w * (eps_u + 7.5 * (eps_c - eps_u) - eps_lora))
    # another camera, and none (2D), are something else
    results = [g(guidance, prompt, c2w=cameras), g(guidance, prompt, c2w=cameras + 1)]
    results += [g(guidance, prompt), g(guidance, prompt, c2w=torch.zeros(2, 4, 4))]
    assert (results[0] - results[1]).abs().max() > 1e-4 < (results[0] - results[2]).abs().max()
    assert torch.equal(results[2], results[3])
    mvp = make("vsd", camera_condition_type="mvp")
    mvp.load_state_dict(guidance.state_dict())
    both = {"mvp_mtx": cameras, "c2w": cameras + 1}
    assert torch.equal(g(mvp, prompt, **both), results[0])
    # and so for the cameras of a batch
    seen, rows = [], guidance.camera.rows
    monkeypatch.setattr(guidance.camera, "rows", lambda c, *at: seen.append(c) or rows(c, *at))
    call(guidance, prompt, c2w=cameras)
    assert torch.equal(seen[-1], cameras.flatten(1))


def test_vsd_in_another_model(make, tiny_sd):
    other = make("vsd", pretrained_model_name_or_path_lora=tiny_sd(sample_size=4, seed=1))
    same = make("vsd", pretrained_model_name_or_path=tiny_sd(sample_size=4, seed=1))
    shake([*other.lora.parameters(), *other.camera.parameters()])
    same.load_state_dict(other.state_dict())
    prompt, cameras = random_prompt(), torch.ones(2, 16)
    y = prompt.text_embeddings.expand(2, -1, -1)
    w, eps, t, eps_c, eps_u = pieces(
        other, prompt, prompt.text_embeddings, prompt.uncond_text_embeddings
    )
    with torch.no_grad(), same.camera.rows(cameras):
        x_t = other.model.add_noise(latents(), eps, t)
        eps_lora = same.predict_learned(x_t, t, y)
    got = g(other, prompt, c2w=cameras.view(2, 4, 4))
    close(got, w * (eps_u + 7.5 * (eps_c - eps_u) - eps_lora))


@pytest.mark.parametrize("dropped", [True, False])
def test_vsd_learns_without_a_camera_in_a_tenth_of_the_rows(make, monkeypatch, dropped):
    guidance, seen = make("vsd", lora_cfg_training=dropped, lora_n_timestamp_samples=400), []
    monkeypatch.setattr(
        guidance.method, "predict_learned", lambda x, t, y, cameras: torch.zeros_like(x)
    )
    rows = guidance.camera.rows
    monkeypatch.setattr(guidance.camera, "rows", lambda c: seen.append(c) or rows(c))
    texts = random_prompt().get_text_embeddings(*side_view(2)).chunk(2)
    cameras = Cameras(*side_view(2), c2w=torch.arange(1.0, 33).view(2, 4, 4))
    guidance.learn(latents(), Conditions(*texts, cameras=cameras))
    none = (seen[0] == 0).all(1)
    assert 40 < none.sum() < 130 if dropped else none.sum() == 0
    rows = torch.arange(800)  # image i is row i, i + 2, ...
    want = torch.arange(1.0, 33).view(2, 16)[rows % 2]
    assert torch.equal(seen[0][~none], want[~none])


def test_vsd_saves_the_lora_and_keeps_the_camera(make, tmp_path):
    """lora_scale is 1 there: the file holds the LoRA as it is."""
    guidance = make("vsd")
    shake([*guidance.lora.parameters(), *guidance.camera.parameters()])
    path = guidance.save_learned(tmp_path / "lora.safetensors")
    again = make("vsd", weights=str(path))
    assert guidance.cfg.lora_scale == 1 and make("lora").cfg.lora_scale == 0.5
    for one, other in zip(again.lora.parameters(), guidance.lora.parameters()):
        torch.testing.assert_close(one, other)
    assert not again.camera.linear_2.weight.any()
    keys = set(guidance.state_dict())
    assert {"camera.linear_1.weight", "camera.linear_2.bias"} < keys
    assert all(key.startswith(("lora.", "camera.")) for key in keys)


def test_nfsd_is_its_pieces(make):
    prompt = random_prompt()
    texts = (prompt.text_embeddings, prompt.uncond_text_embeddings, prompt.others["nfsd_negative"])
    for threshold in (0.0, 0.2, 1.0):
        guidance = make("nfsd", nfsd_threshold=threshold, guidance_scale=3.0)
        for seed in range(4):
            w, _, t, eps_c, eps_u, bad = pieces(guidance, prompt, *texts, seed=seed)
            low = (t < 1000 * threshold).view(2, 1, 1, 1)
            domain = torch.where(low, eps_u, eps_u - bad)
            close(g(guidance, prompt, seed=seed), w * (domain + 3 * (eps_c - eps_u)))


def test_sdi_with_drawn_noise_is_sds(make, monkeypatch):
    guidance, prompt, base = make("sdi"), random_prompt(), part("methods.base").Method
    want = g(make("sds"), prompt)
    assert (g(guidance, prompt) - want).abs().max() > 1e-2
    method = guidance.method
    monkeypatch.setattr(method, "diffuse", lambda *args: base.diffuse(method, *args))
    assert torch.equal(g(guidance, prompt), want)


def test_sdi_compares_with_the_noise_that_it_has_found(make):
    """x_t is made of the latents and the found noise; by hand, for two rows of other t."""
    guidance, prompt, z = make("sdi", inversion_steps=3), random_prompt(), latents()
    y, null = prompt.get_text_embeddings(*side_view(2)).chunk(2)
    t = torch.tensor([30, 900])
    with torch.no_grad():
        x_t, eps = guidance.diffuse(z, t, Conditions(y, null))
        torch.testing.assert_close(guidance.model.add_noise(z, eps, t), x_t)
        for row, grid in enumerate(([0, 10, 20, 30], [0, 300, 600, 900])):
            x, alpha, sigma = z[[row]], torch.tensor(1.0), torch.tensor(0.0)
            for low, high in itertools.pairwise(grid):
                at = torch.tensor([low])
                e_c, e_u = (guidance.model.predict(x, at, e[[row]]) for e in (y, null))
                e = e_u - 7.5 * (e_c - e_u)
                abar = guidance.model.schedule.alphas_cumprod[high]
                x = abar.sqrt() * (x - sigma * e) / alpha + (1 - abar).sqrt() * e
                alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
            torch.testing.assert_close(x_t[[row]], x, rtol=1e-3, atol=1e-4)


def test_ism_by_hand(make):
    guidance, prompt, z = make("ism", ism_delta_t=50, ism_delta_s=200), random_prompt(), latents()
    y, null = prompt.get_text_embeddings(*side_view(2)).chunk(2)
    t = torch.tensor([20, 500])
    with torch.no_grad():
        x_t, eps = guidance.diffuse(z, t, Conditions(y, null))
        for row, grid in enumerate(([0, 0, 20], [0, 200, 400, 450, 500])):
            x, alpha, sigma = z[[row]], torch.tensor(1.0), torch.tensor(0.0)
            for low, high in itertools.pairwise(grid):
                e = guidance.model.predict(x, torch.tensor([low]), null[[row]])
                abar = guidance.model.schedule.alphas_cumprod[high]
                x = abar.sqrt() * (x - sigma * e) / alpha + (1 - abar).sqrt() * e
                alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
            torch.testing.assert_close(x_t[[row]], x, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(eps[[row]], e, rtol=1e-3, atol=1e-4)  # that at s


# --- closed forms ---------------------------------------------------------------------------------


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


# --- Perp-Neg -------------------------------------------------------------------------------------


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


# --- switches -------------------------------------------------------------------------------------


def test_monotone_timesteps_fall_with_the_root_of_the_step(make):
    fields = {"timestep_schedule": "monotone", "timestep_schedule_steps": 100}
    guidance = make("sds", min_step_percent=0.1, max_step_percent=0.9, **fields)
    cpu, got = torch.device("cpu"), []
    for step in (0, 1, 25, 100, 500):
        guidance.do_update_step(0, step)
        bounds = guidance.min_step, guidance.max_step
        schedule = guidance.model.schedule
        got.append(timesteps.draw(guidance.cfg, bounds, step, 3, cpu, schedule).tolist())
    assert got == [[t] * 3 for t in (900, 820, 500, 100, 100)]
    with pytest.raises(ValueError, match=r"set timestep_schedule_steps"):
        make("sds", timestep_schedule="monotone")
    with pytest.raises(ValueError, match="timestep_schedule must be one of random, monotone"):
        make("sds", timestep_schedule="linear")


def test_inner_adam_is_adam(lods):
    torch.manual_seed(0)
    one, other = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    inner, outer = part("learned.inner").InnerAdam([one], 0.1), torch.optim.Adam([other], lr=0.1)
    for i in range(4):
        grad = torch.randn(3, 2)
        if i == 2:  # saved and loaded on the way
            state = inner.state_dict()
            inner = part("learned.inner").InnerAdam([one], 0.1)
            inner.load_state_dict(state)
        inner.step([grad])
        other.grad = grad
        outer.step()
        torch.testing.assert_close(one, other)
    assert not list(inner.parameters())
    before = one.detach().clone()
    inner.step([torch.full((3, 2), math.nan)])
    assert one.isfinite().all() and not torch.equal(one, before)  # the momentum goes on


def test_inner_steps_where_nothing_is_learned_are_warned_about(make, monkeypatch):
    said = []
    monkeypatch.setattr("threestudio.warn", said.append)
    make("lora", prior_inner_steps=2)
    assert not said
    make("sds", prior_inner_steps=2)
    assert said == ["guidance: prior_inner_steps=2 has no effect"]


@pytest.mark.parametrize("short", ["embedding", "lora", "vsd"])
def test_inner_steps_come_before_the_gradient(make, monkeypatch, short):
    prompt, done = random_prompt(), []
    guidance = make(short, prior_inner_steps=3, prior_inner_lr=0.01)
    guidance.initialize(prompt)
    before = [p.detach().clone() for p in guidance.parameters()]
    method, distil = guidance.method, guidance.method.distil
    monkeypatch.setattr(
        method, "distil", lambda *a: done.append(int(guidance.inner.count)) or distil(*a)
    )
    out = call(guidance, prompt)
    assert done == [3] and guidance.inner.count == 3
    changes = [(p - b).abs().max() for p, b in zip(guidance.parameters(), before)]
    assert 0.005 < max(changes) < 0.031
    (loss,) = (v for k, v in out.items() if k.startswith("loss_") and k != "loss_sds")
    assert not loss.requires_grad and loss > 0
    out["loss_sds"].backward()
    assert all(p.grad is None for p in guidance.parameters())


def test_inner_steps_make_a_better_learned_part(make):
    prompt, z = random_prompt(), latents()
    losses = {}
    for steps in (1, 8):
        torch.manual_seed(0)
        guidance = make("embedding", prior_inner_steps=steps, prior_inner_lr=0.1)
        for _ in range(4):
            call(guidance, prompt)
        torch.manual_seed(9)
        guidance.method.cfg.lora_n_timestamp_samples = 64
        losses[steps] = guidance.learning_losses(z, Conditions(None, None))["loss_embedding"].item()
    assert losses[8] < losses[1]


@pytest.mark.parametrize(
    "short, field, value, text",
    [
        ("vsd", "camera_condition_type", "pose", "must be one of extrinsics, mvp, not 'pose'"),
        ("nfsd", "nfsd_threshold", 200, "nfsd_threshold must be a number from 0 to 1, not 200"),
        ("bridge", "bridge_start", -1, "bridge_start must be a whole number from 0 .*, not -1"),
        ("bridge", "bridge_sds_scale", 0, "bridge_sds_scale must be a number above 0 .*, not 0"),
        ("sds", "sds_scale", math.inf, "^sds_scale must be a number above 0 .*, not .inf"),
        ("lora", "sds_steps", -2, "sds_steps must be a whole number from 0 .*, not -2"),
        ("sdi", "inversion_steps", 0, "inversion_steps must be a whole number from 1 "),
        ("sdi", "inversion_eta", 2.0, "inversion_eta must be a number from 0 to 1, not 2"),
        ("ism", "ism_delta_s", 0, "ism_delta_s must be a whole number from 1 "),
        ("lora", "prior_inner_steps", -1, "prior_inner_steps must be a whole number from 0 "),
        *(
            (s, "guidance_scale", math.inf, "a finite number")
            for s in ("nfsd", "vsd", "sdi", "ism")
        ),
    ],
)
def test_bad_fields_are_one_line(make, short, field, value, text):
    with pytest.raises(ValueError, match=text) as error:
        make(short, **{field: value})
    assert "\n" not in str(error.value)
