"""Growing and pruning: what it judges by, what it reports, and where it stops a run."""

import math

import pytest
import torch
from lods.gaussians.densify import Densifier
from lods.gaussians.strategies import projected_size
from lods.threestudio.geometry import Gaussians

from tests.gaussians.clouds import cameras, check_consistent, make_renderer, optimizer_for, steps


def gaussians(n=60, **cfg):
    return Gaussians({"ball": {"n_points": n}, **cfg})


def rendered(geometry, size, backend="reference"):
    """What the rasteriser tells of square pictures, from a distance of 3."""
    batch = {**cameras([0, 100], size=size), "width": size}
    batch.pop("rays_d", None)
    return make_renderer(geometry, backend=backend)(**batch)["info"]


def densify(geometry, name, args, n=2, scene_scale=1.0, start=1):
    """n steps; with refine_every=1 Gaussians are grown and pruned in each."""
    args = {"refine_start_iter": 0, "refine_every": 1, "refine_stop_iter": 100, **args}
    densifier = Densifier(name, args, scene_scale)
    optimizer = optimizer_for(geometry)
    densifier.begin(geometry.count, max_steps=100)
    try:
        steps(geometry, densifier, optimizer, n, start)
    finally:
        check_consistent(geometry, optimizer)
    return densifier


# neither grows nor prunes
STILL = {"grow_grad2d": 1e9, "grow_scale2d": 1e9, "prune_opa": 0.0, "prune_scale3d": 1e9}


# -- sizes on the screen ---------------------------------------------------------------------------


@pytest.mark.parametrize("opacity", [0.02, 0.99])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_projected_size_is_three_sigma_over_the_side(opacity, backend):
    """Of a round Gaussian in the middle: 3 sigma f / z over the longer side, f the focal length."""
    for size in (24, 96):
        geometry = gaussians(4)
        with torch.no_grad():
            geometry.means.zero_()
            geometry.scales.copy_(torch.tensor([[0.003], [0.02], [0.1], [0.2]]).log().expand(4, 3))
            geometry.opacities.fill_(math.log(opacity / (1 - opacity)))
        info = rendered(geometry, size, backend)
        focal = 0.5 * size / math.tan(math.radians(20))
        want = 3 * geometry.scales[:, 0].exp() * focal / 3.0 / size
        sizes = projected_size(info)
        assert torch.allclose(sizes, want.expand(2, 4), rtol=2e-3, atol=2e-5)


def test_the_longer_axis_counts():
    """Sigma 0.2 upward, whatever it is in the other directions."""
    geometry = gaussians(4)
    with torch.no_grad():
        geometry.means.zero_()
        geometry.scales.copy_(torch.tensor([0.01, 0.01, 0.2]).log())
    info = rendered(geometry, 48)
    upright = 0.2 * math.cos(math.radians(20))  # the cameras look down by 20 degrees
    want = 3 * upright * 0.5 * 48 / math.tan(math.radians(20)) / 3.0 / 48
    assert torch.allclose(projected_size(info), torch.tensor(want), rtol=0.02)


def test_pruning_by_size_is_the_same_at_every_resolution():
    kept = []
    for size in (16, 32, 96):
        torch.manual_seed(0)
        geometry = gaussians(80)
        with torch.no_grad():
            geometry.scales.copy_(torch.linspace(-5.0, -1.0, 80)[:, None].expand(80, 3))
            colors = geometry.sh0[:, 0, 0].clone()
        args = {**STILL, "prune_scale2d": 0.05, "refine_scale2d_stop_iter": 100}
        densifier = Densifier("default", {"refine_start_iter": 0, "refine_every": 1, **args})
        optimizer, info = optimizer_for(geometry), rendered(geometry, size)
        densifier.before_backward(info)
        (info["means2d"].sum() + sum(p.sum() for p in geometry.parameters())).backward()
        densifier.begin(80, 100)
        with torch.no_grad():
            densifier.after_step(geometry, optimizer, 1, info)
        kept.append(torch.isin(colors, geometry.sh0[:, 0, 0]))
    assert 20 < kept[0].sum() < 70
    assert all(torch.equal(kept[0], other) for other in kept[1:])


@pytest.mark.parametrize("threshold, left", [(0.07, 8), (0.05, 0)])
def test_halves_are_pruned_for_their_own_size(threshold, left):
    """Of 0.1 of the picture; what they are split into has 0.1 / 1.6 = 0.0625."""
    geometry = gaussians(24)
    with torch.no_grad():
        geometry.means.zero_()
        geometry.scales.fill_(-7.0)
        focal = 0.5 * 24 / math.tan(math.radians(20))  # pictures of 32 by 24 pixels, from 3.0
        geometry.scales[:4] = math.log(0.1 * 32 / focal * 3.0 / 3)
    args = {**STILL, "grow_scale2d": 0.09, "refine_scale2d_stop_iter": 100}
    densify(geometry, "default", {**args, "prune_scale2d": threshold}, n=1)
    assert geometry.count == 20 + left


# -- collapse --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, value, advice",
    [
        ("prune_scale2d", 0.001, "raise it"),
        ("prune_scale3d", 0.001, "raise it or system.strategy.scene_scale"),
        ("prune_opa", 0.9, "lower it"),
    ],
)
def test_a_collapse_stops_with_the_setting_that_is_to_blame(setting, value, advice):
    geometry = gaussians(60)
    args = {**STILL, "refine_scale2d_stop_iter": 100, "prune_scale2d": 1e9, setting: value}
    with pytest.raises(ValueError) as raised:
        densify(geometry, "default", args)
    assert str(raised.value) == (
        "step 1 would leave 0 of the 60 Gaussians that the run began with: "
        f"system.strategy.default.{setting}={value:g} has pruned most: {advice}, or set "
        "system.strategy.name=none"
    )
    assert geometry.count == 60  # they are all there still


def test_what_is_grown_before_a_collapse_fits_the_optimizer():
    geometry = gaussians(60)
    args = {"grow_grad2d": 0.0, "grow_scale3d": 0.15, "prune_opa": 0.9}
    with pytest.raises(ValueError, match=r"prune_opa=0\.9"):
        densify(geometry, "default", args)  # which checks optimizer and geometry
    assert geometry.count > 60


def test_a_collapse_in_small_parts_is_one_too():
    """A few Gaussians at each date, each time fewer than a tenth of what is there."""
    geometry = gaussians(60)
    with torch.no_grad():
        geometry.opacities.copy_(torch.linspace(0.0, 9.0, 60))
    densifier = Densifier(
        "default", {**STILL, "prune_opa": 0.4, "refine_start_iter": 0, "refine_every": 1}
    )
    optimizer = optimizer_for(geometry)
    densifier.begin(60, 100)
    left = [60]
    with pytest.raises(ValueError, match=r"would leave 5 of the 60 .*prune_opa=0\.4 has pruned"):
        for step in range(1, 80):
            with torch.no_grad():
                geometry.opacities[geometry.opacities.argmin()] = -9.0
            steps(geometry, densifier, optimizer, 1, step)
            left.append(geometry.count)
    assert left == list(range(60, 5, -1))


def test_dying_gaussians_stop_the_mcmc_strategy():
    """All of them, where gsplat's relocation has nowhere to go, or nearly all."""
    for alive in (0, 5, 6):
        geometry = gaussians(60)
        with torch.no_grad():
            geometry.opacities.fill_(-9.0)
            geometry.opacities[:alive] = 2.0
        if alive == 6:
            densify(geometry, "mcmc", {}, n=1)
            continue
        with pytest.raises(ValueError) as raised:
            densify(geometry, "mcmc", {}, n=1)
        assert f"step 1 would leave {alive} of the 60 Gaussians" in str(raised.value)
        assert "system.strategy.mcmc.min_opacity=0.005 takes the others for dead" in str(
            raised.value
        )


@pytest.mark.parametrize("away", [55, 54])
def test_noise_that_carries_gaussians_out_of_view_stops_the_mcmc_strategy(away):
    """More than nine of ten are in no view between two dates; those that are faint too count as
    dead."""
    geometry = gaussians(60)
    with torch.no_grad():
        geometry.opacities.fill_(2.0)
        geometry.means[:away] += 1e3
    if away == 54:
        densify(geometry, "mcmc", {"noise_lr": 0.0}, n=1)
        return
    with pytest.raises(ValueError) as raised:
        densify(geometry, "mcmc", {"noise_lr": 0.0, "refine_every": 3}, n=3)
    assert "step 3 would leave 5 of the 60" in str(raised.value)
    assert "mcmc.noise_lr=0 has moved the others out of all views" in str(raised.value)


# -- reports ---------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    lines = {"info": [], "warn": []}
    for level, heard in lines.items():
        monkeypatch.setattr(f"lods.log.{level}", heard.append)
    return lines


GROW = {"grow_grad2d": 0.0, "grow_scale3d": 0.0, "grow_scale2d": 1e9, "prune_opa": 0.0}


def test_changes_are_said_and_counted(said):
    geometry = gaussians(60)
    said["info"].clear()
    census = densify(geometry, "default", {**GROW, "prune_scale3d": 1e9}, n=2).census
    cloned, split, pruned = (census.total[k] for k in ("cloned", "split", "pruned"))
    assert geometry.count == 60 + cloned + split - pruned and split > 60
    assert [line.split(":")[0] for line in said["info"]] == ["step 1", "step 2"]
    assert said["info"][-1].endswith(f"{geometry.count} now")

    geometry = gaussians(60)
    said["info"].clear()
    with torch.no_grad():
        geometry.opacities[:7] = -9.0
    census = densify(geometry, "mcmc", {"cap_max": 64, "noise_lr": 0.0}, n=1).census
    assert census.total == {"relocated": 7, "added": 3} and geometry.count == 63
    assert said["info"] == ["step 1: 7 Gaussians relocated, 3 added, 63 now"]


def test_nothing_is_said_where_nothing_changes(said):
    geometry = gaussians(60)
    densify(geometry, "default", STILL)
    changes = [line for line in said["info"] if line.startswith("step ")]  # not of the backend
    assert not changes and geometry.count == 60


def test_counts_go_on_after_a_checkpoint():
    densifier = densify(gaussians(60), "default", {**GROW, "prune_scale3d": 1e9})
    stored, fresh = densifier.state_dict(), Densifier("default", {})
    fresh.load_state_dict(stored, "cpu")
    fresh.begin(999, 100, resumed=True)
    assert fresh.census.state_dict() == densifier.census.state_dict()
    assert fresh.census.first == 60
    del stored["census"]  # of a version that did not count
    Densifier("default", {}).load_state_dict(stored, "cpu")


@pytest.mark.parametrize(
    "key, value",
    [
        ("census", 3),
        ("census", {"first": 5, "total": torch.zeros(1), "causes": {}}),
        ("census", {"first": -1, "total": {}, "causes": {}}),
        ("census", {"first": 5, "total": {"cloned": 0, "split": 0, "pruned": 1.5}, "causes": {}}),
        ("census", {"first": 5, "total": {}, "causes": {}}),
        ("state", {"grad2d": "1"}),
        ("state", {"count": torch.full((60,), math.nan)}),
        ("state", {"count": torch.zeros(60, 2)}),
    ],
)
def test_a_damaged_state_is_refused(key, value):
    densifier = Densifier("default", {})
    with pytest.raises(ValueError, match="densification state is damaged"):
        densifier.load_state_dict({**densifier.state_dict(), key: value}, "cpu")


def test_a_state_of_other_gaussians_is_refused():
    geometry = gaussians(60)
    densifier = Densifier("default", {})
    state = {**densifier.state_dict(), "state": {"count": torch.zeros(50)}}
    densifier.load_state_dict(state, "cpu")
    with pytest.raises(ValueError, match="densification state is damaged"):
        steps(geometry, densifier, optimizer_for(geometry), 1)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "mcmc"])
def test_a_cap_below_the_start_is_refused(name):
    with pytest.raises(ValueError) as raised:
        Densifier(name, {"cap_max": 59}).begin(60, 1000)
    assert f"system.strategy.{name}.cap_max=59 is below the 60 Gaussians" in str(raised.value)
    Densifier(name, {"cap_max": 60}).begin(60, 1000)
    # growth may pass the cap of the default strategy, before a checkpoint
    Densifier("default", {"cap_max": 59}).begin(60, 1000, resumed=True)
    Densifier("default", {"cap_max": 0}).begin(60, 1000)  # no limit


def test_a_strategy_that_never_acts_is_warned_about(said):
    args = {"refine_start_iter": 300, "refine_every": 100, "refine_stop_iter": 1000}
    Densifier("default", args).begin(60, 400)
    (line,) = said["warn"]
    assert "changes nothing in this run" in line and "first act at step 400" in line
    assert "trainer.max_steps 400" in line
    Densifier("default", args).begin(60, 401)
    Densifier("default", args).begin(60, -1)
    Densifier("none", {}).begin(60, 2)
    assert len(said["warn"]) == 1
    Densifier("mcmc", {**args, "refine_stop_iter": 400}).begin(60, -1)
    assert len(said["warn"]) == 2


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("default", "refine_every", 0),
        ("default", "refine_every", 2.5),
        ("default", "prune_opa", 1.0),
        ("default", "prune_opa", -0.1),
        ("default", "prune_scale2d", math.nan),
        ("default", "grow_grad2d", math.inf),
        ("default", "grow_grad2d", "0.1"),
        ("default", "grow_grad2d", None),
        ("default", "absgrad", 1),
        ("default", "cap_max", -1),
        ("default", "cap_max", True),
        ("default", "key_for_gradient", "gradient_2dgs"),
        ("mcmc", "refine_every", 0),
        ("mcmc", "noise_lr", math.nan),
        ("mcmc", "min_opacity", 1),
        ("mcmc", "cap_max", 1e9),
    ],
)
def test_settings_out_of_range_are_refused(name, key, value):
    with pytest.raises(ValueError) as raised:
        Densifier(name, {key: value})
    assert str(raised.value).startswith(f"system.strategy.{name}.{key}={value!r} must be ")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_scene_without_size_is_refused(value):
    with pytest.raises(ValueError, match="scene_scale"):
        Densifier("default", {}, value)
