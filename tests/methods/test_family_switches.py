"""Switches that every method of the family has: timesteps, inner steps, bad fields."""

import math

import pytest
import torch
from lods.methods import timesteps
from lods.methods.conditions import Conditions
from torch import nn

from tests.guidance_oracles import (
    random_prompt,
)
from tests.methods.family import call, latents, make, part

__all__ = ["make"]  # a fixture


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
