"""Methods on a flow whose velocity is known in closed form."""

import pytest
import torch
from lods.methods import find, registry
from lods.models import RectifiedFlow
from lods.prompts import EmbeddedPrompts, TextSettings

from tests.flow_model import GaussianModel, as_diffusion
from tests.ideal_model import CHANNELS, SIZE

FLOW = RectifiedFlow(3.0)
PLAIN = TextSettings(view_dependent_prompting=False)
OURS = ["asd", "bridge", "csd", "embedding", "ism", "lora", "nfsd", "rfds", "rfds-rev", "sdi"]
OURS += ["pfd", "refine", "sds", "ucm", "vsd"]
# UCM's steps are equal in the noise of a flow and in the timesteps of a diffusion
COMPARED = [name for name in OURS if name != "ucm"]
OWN = {"bridge": {"bridge_start": 0}, "sdi": {"inversion_eta": 0.0}, "ucm": {"ucm_random_steps": 0}}


def made(name, schedule=FLOW, std=0.0, prompt="a", null="n", **values):
    torch.manual_seed(0)
    method = find(name)(GaussianModel(schedule, std), **OWN.get(name, {}), **values)
    method.start(EmbeddedPrompts(method.model, prompt, null, PLAIN))
    return method


def gradient(method, z, seed=1):
    """The gradient of loss_sds with respect to the latents, times their number; nothing is learned,
    so that all methods draw the same (t, eps)."""
    z, method.learn = z.clone().requires_grad_(), lambda *args: {}
    torch.manual_seed(seed)
    loss = method(latents=z).terms["loss_sds"]
    return torch.autograd.grad(loss, z)[0] * len(z)


def latents(rows=3, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CHANNELS, SIZE, SIZE, generator=generator)


def test_these_are_all_methods():
    ours = [name.removeprefix("lods-") for name, cls in registry.ours().items() if not cls.edits]
    assert sorted(OURS) == sorted(ours)


@pytest.mark.parametrize("name", ["sds", "embedding", "lora", "rfds", "rfds-rev", "ucm"])
def test_no_gradient_at_the_only_picture(name):
    """Where prompt and null prompt both mean one picture, and z is that picture."""
    method = made(name, null="a")
    picture = method.model.network(torch.zeros(1), method.prompts.plain("prompt")[None])
    got = gradient(method, picture)
    away = gradient(method, picture + 1)
    assert got.abs().max() < 1e-3 * away.abs().max()


@pytest.mark.parametrize("name", ["sds", "embedding", "lora"])
def test_particles_move_to_the_mean_of_the_pictures(name):
    method = made(name, std=0.3, null="a", guidance_scale=7.5, weighting_strategy="latent")
    picture = method.model.network(torch.zeros(1), method.prompts.plain("prompt")[None])
    z = (picture + 1 + latents(16)).requires_grad_()
    optimizer = torch.optim.Adam([z, *method.parameters()], lr=0.03)
    torch.manual_seed(2)
    for step in range(300):
        method.step(step)
        optimizer.zero_grad()
        method(latents=z).total.backward()
        optimizer.step()
    away = z.detach().mean(0) - picture  # 1 at first
    assert away.square().mean().sqrt() < (0.3 if name == "sds" else 0.5)


@pytest.mark.parametrize("strategy", ["uniform", "latent"])
@pytest.mark.parametrize("name", COMPARED)
def test_the_same_pictures_as_a_flow_and_as_a_diffusion(name, strategy):
    """With the same t and eps, and weights of noise or of latents, which no scaling of x_t
    changes."""
    values = {"std": 0.5, "weighting_strategy": strategy}
    flow = gradient(made(name, FLOW, **values), latents())
    diffusion = gradient(made(name, as_diffusion(FLOW), **values), latents())
    assert flow.abs().max() > 1e-2
    torch.testing.assert_close(flow, diffusion, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["sds", "embedding", "csd"])
def test_a_weight_of_velocities_is_converted(name):
    """1 / alpha of the flow, in place of the diffusion's own alpha, which is another."""
    flow = gradient(made(name, FLOW, std=0.5, weighting_strategy="velocity"), latents(1))
    plain = made(name, as_diffusion(FLOW), std=0.5, weighting_strategy="uniform")
    noise = gradient(plain, latents(1))
    torch.manual_seed(1)
    t = FLOW.draw(1, plain.min_step, plain.max_step, "cpu", "uniform")
    w = FLOW.convert_weight(torch.ones(1), t, "velocity", "noise").view(-1, 1, 1, 1)
    assert w.item() > 1.01
    torch.testing.assert_close(flow, w * noise, rtol=2e-3, atol=2e-3)


def test_lods_with_a_frozen_null_is_sds_over_its_scale():
    for s in (2.0, 7.5, 100.0):
        sds = gradient(made("sds", std=0.5, guidance_scale=s), latents())
        for name in ("embedding", "lora"):
            got = gradient(made(name, std=0.5, guidance_scale=s), latents())
            torch.testing.assert_close(got, sds / s, rtol=1e-4, atol=1e-5)


def test_lods_at_infinity_is_csd():
    csd = gradient(made("csd", std=0.5), latents())
    for name in ("embedding", "lora"):
        got = gradient(made(name, std=0.5, guidance_scale=float("inf")), latents())
        torch.testing.assert_close(got, csd, rtol=1e-5, atol=1e-6)


def test_the_learned_part_learns_velocities():
    method, z = made("embedding", std=0.5), latents()
    torch.manual_seed(1)
    got = method.learn(z, method.prompts.conditions(_front(3)))["loss_embedding"]
    torch.manual_seed(1)
    t = FLOW.draw(3, 0, 999, "cpu", "logit-normal")
    eps = torch.randn_like(z)
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in FLOW.alpha_sigma(t))
    eps_hat = method.model.predict(alpha * z + sigma * eps, t, method._null(3))
    v = (eps_hat - (alpha * z + sigma * eps)) / alpha
    torch.testing.assert_close(got, (v - (eps - z)).square().mean(), rtol=1e-3, atol=1e-5)
    uniform = made("embedding", std=0.5, learned_density="uniform")
    torch.manual_seed(1)
    other = uniform.learn(z, uniform.prompts.conditions(_front(3)))["loss_embedding"]
    assert not torch.allclose(got, other)


def _front(rows):
    from lods import Cameras

    return Cameras(*torch.zeros(3, rows))


def test_rfds_is_sds_on_velocities():
    """By hand, from v alone: cfg_s(v(y), v(n)) - (eps - z)."""
    method, z = made("rfds", std=0.5, guidance_scale=5.0), latents()
    assert (method.min_step, method.max_step) == (20, 700)
    got = gradient(method, z)
    torch.manual_seed(1)
    t = torch.randint(20, 701, (3,))
    eps = torch.randn_like(z)
    s = FLOW.alpha_sigma(t)[1].view(-1, 1, 1, 1)
    x_t, model = (1 - s) * z + s * eps, method.model
    conditions = method.prompts.conditions(_front(3))
    v = {}
    for which in ("prompt", "null"):
        m = model.network(t, getattr(conditions, which))
        d = (x_t - (1 - s) * m) / ((1 - s) ** 2 * 0.25 + s**2)
        v[which] = s * d - (m + (1 - s) * 0.25 * d)
    want = v["null"] + 5.0 * (v["prompt"] - v["null"]) - (eps - z)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_rfds_rev_takes_the_noise_that_the_paper_has():
    method, z = made("rfds-rev", std=0.5), latents()
    t = torch.tensor([50, 300, 600])
    conditions = method.prompts.conditions(_front(3))
    torch.manual_seed(7)
    x_new, noise = method.diffuse(z, t, conditions)
    torch.manual_seed(7)
    eps = torch.randn_like(z)
    s = FLOW.alpha_sigma(t)[1].view(-1, 1, 1, 1)
    x_t = (1 - s) * z + s * eps
    v = (method.model.predict(x_t, t, conditions.prompt) - x_t) / (1 - s)
    want = eps + (1 - s) * (v + z - eps)
    torch.testing.assert_close(noise, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_new, (1 - s) * z + s * want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_ucm_follows_the_velocity_to_the_noise(count):
    method, z = made("ucm", std=0.5, ucm_steps=count), latents()
    conditions = method.prompts.conditions(_front(3))
    got = method.coupled(z, conditions)
    x, m = z.double(), method.model.network(torch.zeros(3), conditions.prompt).double()
    for k in range(count):
        s, step = k / count, 1 / count
        d = (x - (1 - s) * m) / ((1 - s) ** 2 * 0.25 + s**2)
        x = x + step * (s * d - (m + (1 - s) * 0.25 * d))
    torch.testing.assert_close(got.double(), x, rtol=0, atol=0.05)
    assert (got - z).abs().max() > 0.5


def test_ucm_starts_with_drawn_noise():
    method, z = made("ucm"), latents()
    method.cfg.ucm_random_steps = 10
    conditions, t = method.prompts.conditions(_front(3)), torch.tensor([100, 200, 300])
    noises = {}
    for step in (9, 10):
        method.step(step)
        torch.manual_seed(3)
        noises[step] = method.diffuse(z, t, conditions)[1]
    torch.manual_seed(3)
    assert torch.equal(noises[9], torch.randn_like(z))
    assert not torch.equal(noises[9], noises[10])


def test_asd_compares_with_a_later_time_and_the_same_noise():
    method, z = made("asd", std=0.5, asd_random_shift=False, asd_shift=0.5), latents()
    t = torch.tensor([20, 120, 980])
    assert method.later(t).tolist() == [20, 170, 999]  # 980 + 480 is beyond the last
    conditions = method.prompts.conditions(_front(3))
    torch.manual_seed(5)
    got = method.own_gradient(z, t, conditions)
    torch.manual_seed(5)
    eps, model = torch.randn_like(z), method.model
    x, later = model.add_noise(z, eps, t), torch.tensor([20, 170, 999])
    y, n = (model.predict(x, t, text) for text in (conditions.prompt, conditions.null))
    compared = model.predict(model.add_noise(z, eps, later), later, conditions.prompt)
    want = method.weight(t).view(-1, 1, 1, 1) * (n + 7.5 * (y - n) - compared)
    torch.testing.assert_close(got, want)


def test_a_model_without_a_null_prediction_is_refused():
    model = GaussianModel(FLOW)
    model.no_null = "it was distilled; take another"
    with pytest.raises(ValueError, match="SDS needs a null prediction: it was distilled; take"):
        find("sds")(model)
