"""The geometry, its densification, and its renderer."""

import math

import pytest
import torch
from lods.gaussians import densify, reference
from lods.gaussians.harmonics import SH_C0, spherical_harmonics
from lods.threestudio.geometry import Gaussians

from tests.gaussians.clouds import cameras, check_consistent, make_renderer, optimizer_for, steps


@pytest.fixture(scope="module")
def make():
    """``make(n, sh_degree) -> geometry`` of n random Gaussians in a ball."""

    def build(n=60, sh_degree=0, seed=0):
        cfg = {"sh_degree": sh_degree, "init_seed": seed, "ball": {"n_points": n}}
        return Gaussians(cfg)

    return build


# -- state dicts -----------------------------------------------------------------------------------


def test_state_dict_brings_its_own_count(make):
    stored = make(80, sh_degree=1, seed=3)
    geometry = make(50, sh_degree=1)
    before = geometry.gaussians()
    optimizer = torch.optim.Adam([{"params": [p]} for p in before.values()])
    geometry.load_state_dict(stored.state_dict())
    assert geometry.count == 80
    for name, value in geometry.gaussians().items():
        assert torch.equal(value, stored.gaussians()[name])
        assert value is before[name]  # an optimizer that exists goes on training it
    assert optimizer.param_groups[0]["params"][0].shape == (80, 3)


def test_a_checkpoint_without_view_dependence_starts_one_with_it(make):
    stored, geometry = make(30, seed=3), make(50, sh_degree=2)
    geometry.load_state_dict(stored.state_dict())
    assert geometry.count == 30 and geometry.shN.shape == (30, 8, 3) and not geometry.shN.any()
    assert torch.equal(geometry.means, stored.means)


def test_state_dicts_that_do_not_fit(make):
    stored = make(20, sh_degree=2).state_dict()
    for degree in (0, 1):
        with pytest.raises(ValueError, match="sh_degree"):
            make(20, sh_degree=degree).load_state_dict(stored)
    uneven = make(20).state_dict()
    uneven["quats"] = uneven["quats"][:7]
    with pytest.raises(ValueError, match="do not agree in number"):
        make(20).load_state_dict(uneven)
    missing = make(20).state_dict()
    del missing["quats"]
    with pytest.raises(RuntimeError, match="Missing key"):
        make(20).load_state_dict(missing)


def test_weights_of_a_checkpoint(make, tmp_path):
    stored = make(33, seed=5)
    path = tmp_path / "run.ckpt"
    state = {f"geometry.{k}": v for k, v in stored.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 0, "global_step": 7}, path)
    cfg = {"init_type": "none", "weights": f"{path}:geometry"}
    geometry = Gaussians(cfg)
    assert geometry.count == 33 and torch.equal(geometry.means, stored.means)


# -- densification ---------------------------------------------------------------------------------


def binomials(n=51):
    return torch.tensor([[math.comb(i, k) for k in range(n)] for i in range(n)]).float()


def test_relocation_is_equation_9():
    from fractions import Fraction

    o, s = [0.3, 0.9, 0.02, 0.7], torch.rand(4, 3)
    ratios = torch.tensor([1, 2, 7, 60])  # 60 is clamped to 51
    new_o, new_s = densify.relocation(torch.tensor(o), s, ratios, binomials())
    for i, n in enumerate([1, 2, 7, 51]):
        single = 1 - (1 - torch.tensor(o[i]).double().item()) ** (1 / n)
        assert math.isclose(new_o[i].item(), single, rel_tol=1e-6)
        # n of them in one place are as opaque as the one was
        assert math.isclose(1 - (1 - single) ** n, o[i], rel_tol=1e-6)
        if n < 51:
            x = Fraction(single)
            total = sum(
                math.comb(j - 1, k) * (-1) ** k * float(x ** (k + 1)) / math.sqrt(k + 1)
                for j in range(1, n + 1)
                for k in range(j)
            )
            assert torch.allclose(new_s[i], s[i] * o[i] / total, rtol=1e-5)
    assert torch.allclose(new_s[0], s[0])  # alone it stays what it is
    # the sum alternates in terms of 1e14 and must still be positive and moderate
    assert torch.isfinite(new_s).all() and (new_s[3] > 0.1 * s[3]).all()


def test_covariances_match_the_rasteriser():
    quats, scales = torch.randn(30, 4), torch.rand(30, 3)
    ours, _ = densify.covariances(quats, scales)
    assert torch.allclose(ours, reference.covariances(quats, scales), atol=1e-6)


def test_gsplat_keeps_its_own_operators():
    from gsplat.strategy import ops

    before = ops.compute_relocation
    with pytest.raises(RuntimeError), densify.torch_operators():
        assert ops.compute_relocation is densify.relocation
        raise RuntimeError
    assert ops.compute_relocation is before


GROW = {"refine_start_iter": 0, "refine_every": 2, "refine_stop_iter": 100}
DEFAULT = {**GROW, "grow_grad2d": 1e-9, "grow_scale3d": 0.15, "prune_scale3d": 9.0}
MCMC = {**GROW, "cap_max": 66, "noise_lr": 1.0, "min_opacity": 0.09}


@pytest.mark.parametrize("whole", [False, True], ids=["groups", "one group"])
@pytest.mark.parametrize("name, args", [("default", DEFAULT), ("mcmc", MCMC)])
def test_strategies_keep_module_and_optimizer_together(make, name, args, whole):
    torch.manual_seed(0)
    geometry = make()
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer = optimizer_for(geometry, other, whole)
    densifier = densify.Densifier(name, args)
    steps(geometry, densifier, optimizer, 6)
    assert geometry.count > 60
    if name == "mcmc":
        assert geometry.count == 66  # 5 % twice, up to the cap
    check_consistent(geometry, optimizer)
    assert any(p is other for p in optimizer.param_groups[-1]["params"])
    n = geometry.count
    steps(geometry, densifier, optimizer, 1, start=7)  # an odd step changes no count
    assert geometry.count == n


def test_default_strategy_clones_splits_and_prunes(make, monkeypatch):
    """Which ones: those with a large gradient; small ones are cloned, large ones split."""
    torch.manual_seed(0)
    geometry = make(20)
    with torch.no_grad():
        geometry.scales[:10], geometry.scales[10:] = math.log(0.01), math.log(0.1)
        geometry.scales[19] = math.log(0.9)
        geometry.opacities[5] = -8.0
    args = {**GROW, "refine_every": 1, "grow_grad2d": 1.0, "grow_scale3d": 0.05}
    args |= {"prune_opa": 0.005, "prune_scale3d": 0.5, "verbose": True}
    densifier = densify.Densifier("default", args, scene_scale=1.0)
    optimizer = optimizer_for(geometry)
    for p in geometry.gaussians().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    old = geometry.export()
    means2d = torch.zeros(2, 20, 2, requires_grad=True)
    means2d.grad = torch.zeros(2, 20, 2)
    # gradients per pixel of a loss averaged over 2 cameras; normalised they are 8 * 2 * 0.1 = 1.6
    means2d.grad[:, [3, 12], 0] = 0.1
    # seen by one camera only: its mean is over the images that see it, so 1.6 too
    means2d.grad[0, 4, 0] = 0.1
    means2d.grad[:, 6, 0] = 0.1 / 2  # 0.8, below the threshold
    radii = torch.ones(2, 20, 2, dtype=torch.int32)
    radii[1, 4] = 0
    info = {"means2d": means2d, "radii": radii, "width": 16, "height": 16, "n_cameras": 2}
    info["gaussian_ids"] = None
    said = []
    monkeypatch.setattr("lods.log.info", said.append)
    assert densifier.after_step(geometry, optimizer, 1, info)
    assert said == ["step 1: 2 Gaussians cloned, 1 split, 2 pruned, 21 now"]
    # 20 + clones of 3 and 4 + one more from splitting 12 - 5 (faint) - 19 (big)
    assert geometry.count == 20 + 2 + 1 - 2
    check_consistent(geometry, optimizer)

    def copies(i):
        return int((geometry.means == old["means"][i]).all(1).sum())

    assert [copies(i) for i in (3, 4, 5, 6, 12, 19)] == [2, 2, 0, 1, 0, 0]
    halves = torch.isclose(geometry.scales[:, 0].exp(), old["scales"][12, 0].exp() / 1.6)
    assert int(halves.sum()) == 2
    near = (geometry.means[halves] - old["means"][12]).norm(dim=1)
    assert near.max() < 5 * 0.1 and near.min() > 0
    # new ones have no momentum
    moments = optimizer.state[geometry.means]["exp_avg"]
    assert int((moments == 0).all(1).sum()) == 2 + 2
    # the statistics start again
    assert not densifier.state["grad2d"].any() and len(densifier.state["count"]) == geometry.count


def test_gradient_scale_is_taken_out(make):
    """With the loss scale of 16-bit training the statistics are those without it."""
    states = []
    for scale in (1.0, 1024.0):
        geometry = make()
        densifier = densify.Densifier("default", {**DEFAULT, "refine_every": 50})
        optimizer = optimizer_for(geometry)
        out = make_renderer(geometry)(**cameras([0]))
        densifier.before_backward(out["info"])
        (scale * out["comp_rgb"].square().mean()).backward()
        densifier.after_step(geometry, optimizer, 1, out["info"], grad_scale=scale)
        states.append(densifier.state["grad2d"])
    assert states[0].max() > 0 and torch.allclose(*states, rtol=1e-5)


def test_opacity_reset(make):
    geometry = make(20)
    with torch.no_grad():
        geometry.opacities.fill_(2.0)
    args = {**GROW, "refine_every": 100, "reset_every": 2, "prune_opa": 0.005}
    densifier = densify.Densifier("default", args)
    optimizer = optimizer_for(geometry)
    steps(geometry, densifier, optimizer, 2)
    assert geometry.opacities.sigmoid().min() > 0.5  # not at 0 and 1
    steps(geometry, densifier, optimizer, 1, start=2)
    assert torch.allclose(geometry.opacities.sigmoid(), torch.tensor(0.01))
    assert not optimizer.state[geometry.opacities]["exp_avg"].any()
    check_consistent(geometry, optimizer)


def test_mcmc_relocates_the_dead(make):
    torch.manual_seed(0)
    geometry = make(40)
    with torch.no_grad():
        geometry.opacities.fill_(1.0)
        geometry.opacities[:5] = -9.0
    old = geometry.export()["means"].clone()
    args = {**GROW, "refine_every": 1, "cap_max": 40, "noise_lr": 0.0, "min_opacity": 0.005}
    densifier = densify.Densifier("mcmc", args)
    optimizer = optimizer_for(geometry)
    for p in geometry.gaussians().values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    densifier.after_step(geometry, optimizer, 1, {})
    assert geometry.count == 40
    moved = geometry.means[:5]
    hosts = [int((old[5:] == m).all(1).nonzero()[0]) + 5 for m in moved]  # where living ones are
    # each host and its guests share the host's opacity: 1 - (1 - o)^(1/n)
    n = torch.tensor([hosts.count(h) + 1 for h in hosts])
    expected = 1 - (1 - torch.tensor(1.0).sigmoid()) ** (1 / n)
    assert torch.allclose(geometry.opacities[:5].sigmoid(), expected, atol=1e-5)
    assert torch.allclose(geometry.opacities[hosts].sigmoid(), expected, atol=1e-5)
    check_consistent(geometry, optimizer)


def test_mcmc_noise_follows_the_covariance(make):
    torch.manual_seed(0)
    geometry = make(4000)
    with torch.no_grad():
        geometry.opacities.fill_(-9.0)  # transparent: the full noise
        geometry.scales[:] = torch.tensor([0.5, 0.1, 0.01]).log()
        geometry.opacities[0] = 5.0  # opaque: none
    old = geometry.means.detach().clone()
    args = {**GROW, "refine_stop_iter": 0, "noise_lr": 2.0}
    densifier = densify.Densifier("mcmc", args)
    optimizer = optimizer_for(geometry)
    for group in optimizer.param_groups:
        group["lr"] = 7.0 if group["name"] != "geometry.means" else 0.5
    densifier.after_step(geometry, optimizer, 1, {})
    moved = geometry.means - old
    # noise_lr * lr of the means * Sigma @ N(0, 1), times a sigmoid that is 0.622 at o = 0
    weight = 1 / (1 + math.exp(-100 * (1 - torch.sigmoid(torch.tensor(-9.0)).item() - 0.995)))
    expected = 2.0 * 0.5 * weight * torch.tensor([0.25, 0.01, 0.0001])
    assert torch.allclose(moved[1:].std(0), expected, rtol=0.05)
    assert moved[0].abs().max() < 1e-6


def test_strategy_settings(make):
    Densifier = densify.Densifier
    with pytest.raises(ValueError, match="none, default, mcmc"):
        Densifier("mcmmc", {})
    with pytest.raises(ValueError, match=r"default\.grow_grad3d is unknown: the fields are .*2d"):
        Densifier("default", {"grow_grad3d": 1.0})
    geometry = make(20)
    optimizer = torch.optim.Adam([{"params": [geometry.means]}], lr=1e-3)
    with pytest.raises(ValueError, match=r"needs geometry\.means, scales"):
        Densifier("mcmc", {}).after_step(geometry, optimizer, 1, {})
    assert Densifier("none", {}).after_step(geometry, optimizer, 1, {}) is False


def test_cap_on_growth(make):
    torch.manual_seed(0)
    geometry = make()
    densifier = densify.Densifier("default", {**DEFAULT, "cap_max": 61})
    optimizer = optimizer_for(geometry)
    steps(geometry, densifier, optimizer, 3)
    n = geometry.count
    assert n > 61
    steps(geometry, densifier, optimizer, 4, start=3)
    assert geometry.count <= n


def test_absgrad_reaches_the_statistics(make):
    """Absolute gradients are at least as large, and used where they are asked for."""
    states = {}
    for absgrad in (False, True):
        geometry = make()
        args = {**DEFAULT, "refine_every": 50, "absgrad": absgrad}
        densifier = densify.Densifier("default", args)
        assert densifier.absgrad == absgrad
        optimizer = optimizer_for(geometry)
        out = make_renderer(geometry, backend="cpu")(**cameras([0, 90]), absgrad=absgrad)
        densifier.before_backward(out["info"])
        out["comp_rgb"].square().mean().backward()
        densifier.after_step(geometry, optimizer, 1, out["info"])
        states[absgrad] = densifier.state["grad2d"]
    assert (states[True] >= states[False] * (1 - 1e-4)).all()
    assert states[True].sum() > 1.2 * states[False].sum()


# -- rendering -------------------------------------------------------------------------------------


def single(geometry, position=(0.0, 0.0, 0.0), scale=0.1, opacity=0.9, rgb=(0.8, 0.2, 0.1)):
    with torch.no_grad():
        for p in geometry.gaussians().values():
            p.data = p.data[:1].clone()
        geometry.means[:] = torch.tensor(position)
        geometry.scales.fill_(math.log(scale))
        geometry.opacities.fill_(math.log(opacity / (1 - opacity)))
        geometry.sh0[:] = (torch.tensor(rgb) - 0.5) / SH_C0
    return geometry


def test_true_opacity_and_composition(make):
    """One Gaussian in the middle: at the centre opacity, colour and depth are known."""
    renderer = make_renderer(single(make(4)), color=(0.0, 0.5, 1.0))
    out = renderer(**cameras([30.0], size=25, distance=3.0))
    assert out["comp_rgb"].shape == (1, 25, 33, 3)
    assert out["opacity"].shape == out["depth"].shape == (1, 25, 33, 1)
    centre = (0, 12, 16)
    assert math.isclose(out["opacity"][centre].item(), 0.9, abs_tol=1e-5)
    fg, bg = torch.tensor([0.8, 0.2, 0.1]), torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(out["comp_rgb"][centre], 0.9 * fg + 0.1 * bg, atol=1e-5)
    assert torch.allclose(out["comp_rgb_fg"][centre], 0.9 * fg, atol=1e-5)
    assert torch.allclose(out["comp_rgb_bg"], bg.expand(1, 25, 33, 3))
    assert math.isclose(out["depth"][centre].item(), 3.0, abs_tol=1e-4)
    # nothing in the corner
    assert out["opacity"][0, 0, 0].item() == 0 and out["depth"][0, 0, 0].item() == 0
    # the width of its picture: focal / distance * scale, squared plus eps2d
    focal = 12.5 / math.tan(math.radians(20))
    variance = (focal / 3 * 0.1) ** 2 + 0.3
    ratio = out["opacity"][0, 12, 18].item() / 0.9
    assert math.isclose(ratio, math.exp(-0.5 * 4 / variance), rel_tol=0.02)


@pytest.mark.parametrize("azimuth, elevation", [(0, 0), (0, 30), (90, 10), (200, -10)])
def test_points_land_where_the_projection_matrix_says(make, azimuth, elevation):
    """An off-centre Gaussian against ``mvp_mtx``, a description of the camera that the renderer
    does not use. Mirrored or turned cameras would fail."""
    position = (0.3, -0.2, 0.25)
    renderer = make_renderer(single(make(4), position, scale=0.02))
    batch = cameras([azimuth], elevation, size=64)
    weight = renderer(**batch)["opacity"][0, ..., 0].double()
    h, w = weight.shape
    row = (weight.sum(1) * (torch.arange(h) + 0.5)).sum() / weight.sum()
    column = (weight.sum(0) * (torch.arange(w) + 0.5)).sum() / weight.sum()
    x, y, _, scale = (batch["mvp_mtx"][0] @ torch.tensor([*position, 1.0])).tolist()
    assert math.isclose(column.item(), (x / scale + 1) / 2 * w, abs_tol=0.1)
    assert math.isclose(row.item(), (y / scale + 1) / 2 * h, abs_tol=0.1)  # its y points down


def test_the_front_is_seen_at_azimuth_0(make):
    """A red Gaussian on +x hides a blue one on -x from the camera at azimuth 0."""
    geometry = make(4)
    single(geometry)
    with torch.no_grad():
        for p in geometry.gaussians().values():
            p.data = p.data.repeat(2, *[1] * (p.dim() - 1))
        geometry.means[:, 0] = torch.tensor([0.5, -0.5])
        geometry.opacities.fill_(6.0)
        geometry.sh0[:] = (torch.tensor([[[1.0, 0, 0]], [[0, 0, 1.0]]]) - 0.5) / 0.28209479
    out = make_renderer(geometry)(**cameras([0, 180], elevation=0.0, size=25))
    front, back = out["comp_rgb"][:, 12, 16]
    assert front[0] > 0.95 and front[2] < 0.05 and back[2] > 0.95 and back[0] < 0.05


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_spherical_harmonics_match_gsplat(degree):
    from gsplat.cuda._torch_impl import _eval_sh_bases_fast

    directions = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    ours = spherical_harmonics(directions, degree)
    theirs = _eval_sh_bases_fast((degree + 1) ** 2, directions)[:, 1:]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_colours_depend_on_the_view_with_harmonics(make):
    geometry = single(make(4, sh_degree=1))
    with torch.no_grad():
        geometry.shN[0, 2] = torch.tensor([0.5, 0.0, -0.5])  # the one along x, with sign -
    renderer = make_renderer(geometry)
    near, far = renderer.colors(torch.tensor([[2.0, 0, 0], [-2.0, 0, 0]]))[:, 0]
    shift = 0.4886025 * torch.tensor([0.5, 0.0, -0.5])  # from +x the direction is -x
    base = geometry.base_colors()[0]
    assert torch.allclose(near, (base + shift).clamp_min(0), atol=1e-5)
    assert torch.allclose(far, (base - shift).clamp_min(0), atol=1e-5)
    out = renderer(**cameras([0, 180], elevation=0.0, size=25))
    assert torch.allclose(out["comp_rgb_fg"][0, 12, 16] / 0.9, near, atol=1e-3)


def test_gradients_reach_every_parameter_and_the_background(make):
    import threestudio

    geometry = make(30, sh_degree=1)
    with torch.no_grad():
        geometry.scales += torch.tensor([0.5, 0.0, -0.5])  # round ones can turn as they like
    renderer = make_renderer(geometry)
    cfg = {"color": [0.2, 0.3, 0.4], "learned": True}
    renderer.set_background(threestudio.find("solid-color-background")(cfg))
    batch = cameras([0, 120])
    target = torch.rand(2, 24, 32, 3)
    (renderer(**batch)["comp_rgb"] - target).square().mean().backward()
    for name, p in geometry.gaussians().items():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert renderer.background.env_color.grad.abs().sum() > 0
    # the directions handed to the background are those of the batch
    seen = {}
    renderer.set_background(lambda dirs: seen.setdefault("dirs", dirs)[..., :3] * 0)
    renderer(**{k: v for k, v in batch.items() if k != "rays_d"})
    assert torch.allclose(seen["dirs"], batch["rays_d"], atol=1e-5)


# -- limits ----------------------------------------------------------------------------------------


def test_no_gaussian_gets_thinner_than_its_aspect_allows(make):
    geometry = make(40)
    with torch.no_grad():
        geometry.scales.normal_(std=3)
    before = geometry.scales.detach().clone()
    geometry.clamp_aspect(math.inf)
    assert torch.equal(geometry.scales, before)
    geometry.clamp_aspect(4.0)
    sigma, largest = geometry.scales.exp(), before.exp().max(1, keepdim=True).values
    torch.testing.assert_close(sigma, before.exp().maximum(largest / 4))


def test_the_limits_of_the_settings_hold_after_a_step():
    cfg = {"ball": {"n_points": 30}, "max_scale": 0.1, "max_aspect": 5.0}
    geometry = Gaussians(cfg)
    with torch.no_grad():
        geometry.scales.normal_(std=4)
    geometry.limit_scales()
    sigma = geometry.scales.exp()
    assert sigma.max() <= 0.1 * (1 + 1e-6)
    assert (sigma.max(1).values / sigma.min(1).values).max() <= 5.0 * (1 + 1e-5)
    with pytest.raises(ValueError, match="max_aspect must be a number at least 1"):
        Gaussians({**cfg, "max_aspect": 0.5})
