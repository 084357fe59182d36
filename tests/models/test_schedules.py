"""Schedules of diffusions and of flows: their tables, weights in three spaces, and draws of t."""

import math

import pytest
import torch
from lods.models import RectifiedFlow, Schedule, VariancePreserving
from lods.models.schedule import SPACES, flow_schedule

T = torch.arange(1000)
TABLE = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
BOTH = [VariancePreserving(TABLE), RectifiedFlow(3.0)]
KINDS = {"VariancePreserving": "v_prediction", "RectifiedFlow": "flow"}


def by_name(schedule):
    return type(schedule).__name__


def test_a_table_makes_the_diffusion_that_it_always_made():
    schedule = Schedule(TABLE)
    assert type(schedule) is VariancePreserving and schedule.steps == 1000
    alpha, sigma = schedule.alpha_sigma(T)
    assert torch.equal(alpha, TABLE.sqrt()) and torch.equal(sigma, (1 - TABLE).sqrt())
    assert torch.equal(schedule.weight(T), 1 - TABLE)
    assert torch.equal(schedule.weight(T, "fantasia3d"), TABLE.sqrt() * (1 - TABLE))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_flow_has_the_sigmas_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=((T + 0.5) / 1000).tolist())
    ours = RectifiedFlow(shift)
    alpha, sigma = ours.alpha_sigma(T)
    torch.testing.assert_close(sigma, theirs.sigmas[:-1])
    torch.testing.assert_close(ours.told(T), theirs.timesteps)
    torch.testing.assert_close(alpha + sigma, torch.ones(1000))
    assert alpha.min() > 0 and sigma.min() > 0  # so that no weight is infinite


def test_the_shift_of_a_picture_that_is_dynamic_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for kind in ("exponential", "linear"):
        theirs = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, time_shift_type=kind
        )
        theirs.set_timesteps(sigmas=((T + 0.5) / 1000).tolist(), mu=calculate_shift(1024))
        ours = flow_schedule(theirs.config, 1024)
        torch.testing.assert_close(ours.alpha_sigma(T)[1], theirs.sigmas[:-1])


@pytest.mark.parametrize(
    "config, word",
    [
        ({"shift": "much"}, "shift is no number"),
        ({"shift": 0}, "above 0"),
        ({"shift": math.nan}, "above 0"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is set"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "shift is no number"),
    ],
)
def test_a_flow_that_makes_no_sense_is_refused(config, word):
    with pytest.raises(ValueError, match=word):
        flow_schedule(config, 1024)


@pytest.mark.parametrize("schedule", BOTH, ids=by_name)
def test_the_three_differences_are_multiples_of_one_another(schedule):
    """Of a prediction and the truth, each worked out from its own definition."""
    generator = torch.Generator().manual_seed(0)
    z, eps, error = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 20, 500, 980, 999])
    alpha, sigma = (a.double()[:, None] for a in schedule.alpha_sigma(t))
    if isinstance(schedule, RectifiedFlow):
        alpha = 1 - sigma
    x_t = alpha * z + sigma * eps
    flow = isinstance(schedule, RectifiedFlow)
    truth = eps - z if flow else alpha * eps - sigma * z
    v = truth + error
    eps_hat = x_t + alpha * v if flow else alpha * v + sigma * x_t
    z_hat = x_t - sigma * v if flow else alpha * x_t - sigma * v
    torch.testing.assert_close(eps_hat - eps, alpha * (v - truth), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z - z_hat, sigma * (v - truth), rtol=1e-6, atol=1e-6)
    differences = {"noise": eps_hat - eps, "velocity": v - truth, "latent": z - z_hat}
    got = schedule.to_noise(v, x_t, t, KINDS[by_name(schedule)])
    torch.testing.assert_close(got, eps_hat, rtol=1e-5, atol=1e-5)
    w = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    for of in SPACES:
        want = w.double()[:, None] * differences[of]
        for to in SPACES:
            converted = schedule.convert_weight(w, t, of, to).double()[:, None]
            torch.testing.assert_close(converted * differences[to], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", BOTH, ids=by_name)
def test_weights_are_of_noise(schedule):
    t = torch.tensor([20, 500, 980])
    alpha, sigma = schedule.alpha_sigma(t)
    one = torch.ones(3)
    close = torch.testing.assert_close
    close(schedule.weight(t), sigma**2)
    close(schedule.weight(t, "fantasia3d"), alpha * sigma**2)
    close(schedule.weight(t, "uniform"), one)
    close(schedule.weight(t, "velocity"), schedule.convert_weight(one, t, "velocity", "noise"))
    close(schedule.weight(t, "latent"), schedule.convert_weight(one, t, "latent", "noise"))
    with pytest.raises(ValueError, match="a weight is of one of"):
        schedule.convert_weight(one, t, "noise", "pixels")


def test_the_range_of_rfds_in_sigma():
    """0.3 to 0.98 of timesteps that fall are 0.02 to 0.7 of ours."""
    flow = RectifiedFlow(3.0)
    for part, sigma in ((0.02, 0.0577), (0.7, 0.875)):
        got = flow.alpha_sigma(torch.tensor(int(1000 * part)))[1].item()
        assert got == pytest.approx(sigma, abs=2e-3)
        assert flow.part_of(sigma) == pytest.approx(part, abs=1e-3)
        assert flow.at(sigma) == pytest.approx(1000 * part, abs=1.5)


@pytest.mark.parametrize("schedule", BOTH, ids=by_name)
def test_a_uniform_draw_is_the_one_of_before(schedule):
    torch.manual_seed(3)
    got = schedule.draw(64, 20, 980, "cpu", "uniform")
    torch.manual_seed(3)
    assert torch.equal(got, torch.randint(20, 981, (64,)))


def test_a_logit_normal_draw_is_cut_to_its_range():
    flow = RectifiedFlow(3.0)
    torch.manual_seed(0)
    t = flow.draw(40_000, 0, 999, "cpu")
    logit = torch.logit((t + 0.5) / 1000)
    assert abs(logit.mean().item()) < 0.02 and abs(logit.std().item() - 1) < 0.02
    low = flow.draw(40_000, 200, 499, "cpu", "logit-normal")
    assert low.min() == 200 and low.max() == 499
    inside = t[(t >= 200) & (t < 500)]
    for edge in (300, 400):
        share = (inside < edge).float().mean().item()
        assert (low < edge).float().mean().item() == pytest.approx(share, abs=0.02)
    assert flow.draw(4, 7, 7, "cpu").tolist() == [7] * 4
    with pytest.raises(ValueError, match="a density of timesteps is one of"):
        flow.draw(4, 0, 999, "cpu", "normal")


@pytest.mark.parametrize("schedule", BOTH, ids=by_name)
def test_noise_added_on_the_way_leads_to_the_next_level(schedule):
    now, then = (schedule.alpha_sigma(torch.tensor([t])) for t in (300, 700))
    variance = schedule.transition_variance(now, then)
    torch.testing.assert_close((then[0] / now[0]) ** 2 * now[1] ** 2 + variance, then[1] ** 2)


def test_schedules_that_are_alike():
    assert RectifiedFlow(3.0).is_like(RectifiedFlow(3.0))
    assert not RectifiedFlow(3.0).is_like(RectifiedFlow(1.0))
    assert not RectifiedFlow(3.0).is_like(VariancePreserving(TABLE))
    assert VariancePreserving(TABLE).is_like(VariancePreserving(TABLE + 1e-6))
    assert not VariancePreserving(TABLE).is_like(VariancePreserving(TABLE[:500]))
