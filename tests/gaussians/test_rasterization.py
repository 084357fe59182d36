"""The rasteriser: compiled kernels against the reference, and that against closed forms."""

import math

import pytest
import torch
from lods.gaussians import rasterization, reference, resolve_backend
from lods.gaussians.backends import cpu

from tests.gaussians.scenes import NAMES, assert_near, clear_cut_scene, make_scene, render

CASES = [
    {"n": 60},
    {"n": 80, "cameras": 3, "width": 50, "height": 34},
    {"n": 150, "width": 16, "height": 16, "opaque": True},
    {"n": 300, "cameras": 2, "width": 40, "height": 9, "opaque": True},
    {"n": 40, "cameras": 2, "channels": 1, "own": True},
    {"n": 30, "channels": 6, "width": 20, "height": 33},
    {"n": 1, "cameras": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGB+D", "RGB+ED", "D"])
def test_kernels_equal_the_reference(case, mode):
    scene = clear_cut_scene(**case)
    if mode == "D":
        del scene["backgrounds"]
    ours, info = render(scene, "cpu", torch.float32, render_mode=mode)
    expected, info_ = render(scene, "reference", torch.float64, render_mode=mode)
    assert (info["radii"] == info_["radii"]).all()
    assert (info["radii"] > 0).any()
    for name, value in expected.items():
        # the expected depth is a quotient of two small numbers where little is seen
        assert_near(ours[name], value, 5e-4 if mode == "RGB+ED" else 3e-5)


@pytest.mark.parametrize("tile", [16, 32])
def test_tiles_do_not_show(monkeypatch, tile):
    """A crop, by moving the Gaussians against the tiles, is the crop of the whole image."""
    monkeypatch.setattr(cpu, "tile_for", lambda *_: tile)
    scene = clear_cut_scene(n=120, width=90, height=70)
    geometry = [scene[k] for k in ("means", "quats", "scales", "opacities", "viewmats", "Ks")]
    means2d, conics, depths, extents = reference.project(*geometry, 90, 70, 0.01, 1e10, 0.3)
    rest = conics, scene["opacities"], scene["colors"], depths, extents
    whole, _ = cpu.composite(means2d, *rest, 90, 70)
    for x, y in ((1, 3), (17, 30), (32, 16)):
        offset = torch.tensor([float(x), float(y)], dtype=torch.float64)
        crop, _ = cpu.composite(means2d - offset, *rest, 41, 37)
        assert_near(crop, whole[:, y : y + 37, x : x + 41], 2e-5)


def test_gradcheck_of_the_reference():
    scene = clear_cut_scene(n=4, cameras=2, width=5, height=4)
    scene["scales"] = scene["scales"] * 3
    names = [k for k in NAMES]
    rest = {k: v for k, v in scene.items() if k not in names}

    def function(*leaves):
        leaves = dict(zip(names, leaves))
        return rasterization(**leaves, **rest, backend="reference", render_mode="RGB+D")[:2]

    leaves = [scene[k].clone().requires_grad_() for k in names]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-5)


def on_axis(depths, opacities, colors, scale=0.1, size=33, focal=40.0, **extra):
    """Isotropic Gaussians on the optical axis, seen at the middle of the middle pixel."""
    n = len(depths)
    means = torch.zeros(n, 3)
    means[:, 2] = torch.tensor(depths)
    K = torch.tensor([[[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]])
    return {
        "means": means,
        "quats": torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1),
        "scales": torch.full((n, 3), scale),
        "opacities": torch.tensor(opacities),
        "colors": torch.tensor(colors),
        "viewmats": torch.eye(4)[None],
        "Ks": K,
        "width": size,
        "height": size,
        **extra,
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_gaussian_has_its_closed_form(backend):
    """alpha = o exp(-r^2 / 2 s^2) with s^2 = (f scale / z)^2 + eps2d, nothing below 1/255."""
    scene = on_axis([2.0], [0.8], [[0.5, 0.25, 1.0]])
    image, alpha, _ = rasterization(**scene, backend=backend, render_mode="RGB+ED")
    pixel = torch.arange(33) - 16.0
    r2 = pixel[:, None] ** 2 + pixel**2
    expected = 0.8 * torch.exp(-r2 / (2 * ((40 * 0.1 / 2) ** 2 + 0.3)))
    assert ((expected * 255 - 1).abs() > 1e-4).all()
    expected = expected * (expected >= 1 / 255)
    assert 0 < (expected > 0).sum() < expected.numel()
    assert torch.allclose(alpha[0, ..., 0], expected, atol=2e-6)
    color = torch.tensor([0.5, 0.25, 1.0])
    assert torch.allclose(image[0, ..., :3], expected[..., None] * color, atol=2e-6)
    assert torch.allclose(image[0, ..., 3], 2.0 * (expected > 0), atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_two_gaussians_blend_front_to_back(backend):
    color = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    scene = on_axis([3.0, 2.0], [0.5, 0.6], color, backgrounds=torch.tensor([[0.0, 0.0, 1.0]]))
    image, alpha, _ = rasterization(**scene, backend=backend, render_mode="RGB+D")
    near, far = 0.6, 0.4 * 0.5  # the second Gaussian is the nearer one
    expected = torch.tensor([far, near, 1 - near - far, near * 2 + far * 3])
    assert torch.allclose(image[0, 16, 16], expected, atol=1e-6)
    assert abs(alpha[0, 16, 16, 0].item() - (near + far)) < 1e-6


def test_what_lies_behind_an_opaque_wall_is_not_seen():
    depths, opacity = [2.0 + 0.01 * i for i in range(100)], [0.95] * 100
    scene = on_axis(depths, opacity, [[1.0, 0, 0]] * 60 + [[0, 1.0, 0]] * 40, scale=50.0)
    ours, _ = render(scene, "cpu", torch.float32)
    expected, _ = render(scene, "reference", torch.float64)
    assert ours["image"][..., 1].abs().max() == 0
    assert ours["alpha"].min() > 1 - 2e-3  # 0.05^3 > 1e-4 >= 0.05^4: three are blended
    assert abs(ours["alpha"][0, 16, 16, 0].item() - (1 - 0.05**3)) < 1e-6
    for name in ("colors", "opacities"):
        assert ours[name][3:].abs().max() == 0
        assert_near(ours[name], expected[name], 1e-4)


@pytest.mark.parametrize("opacity", [1.0, 0.998])
def test_clamped_alphas_have_no_gradient(opacity):
    """Where o exp(-sigma) exceeds 0.999 alpha is 0.999, and its derivative 0, not that of exp."""
    colors = [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]
    scene = on_axis([2.0, 3.0], [opacity, 0.5], colors, scale=50.0, size=9)
    ours, _ = render(scene, "cpu", torch.float32)
    expected, _ = render(scene, "reference", torch.float64)
    for name in ("opacities", "means2d", "colors"):
        # 1 / (1 - 0.998) magnifies the rounding of single precision
        assert_near(ours[name], expected[name], 1e-3)
    assert bool(ours["opacities"][0] == 0) == (opacity > 0.999)
    assert ours["opacities"][1] != 0 and (ours["colors"] != 0).all()


def test_the_order_of_the_input_does_not_matter():
    scene = clear_cut_scene(n=100, cameras=2)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    per_gaussian = NAMES[:5]
    mixed = {k: v[order] if k in per_gaussian else v for k, v in scene.items()}
    a, _ = render(scene, "cpu", torch.float32)
    b, _ = render(mixed, "cpu", torch.float32)
    assert torch.equal(a["image"], b["image"])
    for name in per_gaussian:
        assert torch.equal(a[name][order], b[name])


def test_background_is_what_transmittance_lets_through():
    scene = clear_cut_scene(cameras=2)
    scene = {k: v.float() if torch.is_tensor(v) else v for k, v in scene.items()}
    image, alpha, _ = rasterization(**scene, backend="cpu")
    bare, alpha_, _ = rasterization(**{**scene, "backgrounds": None}, backend="cpu")
    expected = bare + (1 - alpha) * scene["backgrounds"][:, None, None]
    assert torch.equal(alpha, alpha_)
    assert torch.allclose(image, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_see(backend):
    """No Gaussians, or only such that cannot be drawn: the background, and zero gradients."""
    nan, inf = float("nan"), float("inf")
    means = [[0, 0, -2], [0, 0, 0], [nan, 0, 2], [0, inf, 2], [900, 0, 2], [0, 0, 2], [0, 0, 0.005]]
    opacity = [0.9, 0.9, 0.9, 0.9, 0.9, 0.0, 0.9]
    for n in (7, 0):
        scene = on_axis([1.0] * n, opacity[:n], torch.ones(n, 3).tolist())
        scene["means"] = torch.tensor(means, dtype=torch.float32)[:n]
        scene["colors"] = torch.ones(n, 3)
        scene["backgrounds"] = torch.tensor([[0.1, 0.2, 0.3]])
        result, info = render(scene, backend, torch.float32, render_mode="RGB+ED")
        expected = torch.tensor([0.1, 0.2, 0.3, 0.0]).expand(1, 33, 33, 4)
        assert torch.equal(result["image"], expected)
        assert (result["alpha"] == 0).all() and (info["radii"] == 0).all()
        for name in ("means", "quats", "scales", "opacities", "colors"):
            assert result[name].shape == scene[name].shape
            assert (result[name] == 0).all()


def test_undrawn_gaussians_change_nothing():
    scene = clear_cut_scene(n=50)
    more = {k: torch.cat([v, v[:9]]) if k in NAMES[:5] else v for k, v in scene.items()}
    more["means"] = more["means"].clone()
    more["means"][50:53] = float("nan")
    more["means"][53:56, 2] = -50
    more["opacities"] = more["opacities"].clone()
    more["opacities"][56:] = 0
    a, _ = render(scene, "cpu", torch.float32)
    b, _ = render(more, "cpu", torch.float32)
    assert torch.equal(a["image"], b["image"])
    for name in NAMES[:5]:
        assert torch.equal(a[name], b[name][:50])
        assert (b[name][50:] == 0).all()
    assert torch.isfinite(b["viewmats"]).all()


def test_needles_and_giants():
    """Extreme shapes: the exact extents lose no pixel, and everything stays finite."""
    scene = make_scene(5, n=24, width=70, height=50)
    scene["scales"][:8] = torch.tensor([3.0, 1e-4, 1e-4], dtype=torch.float64)
    scene["scales"][8:12] = 30.0
    scene["opacities"][:12] = torch.linspace(0.01, 0.999, 12)
    ours, _ = render(scene, "cpu", torch.float32)
    expected, _ = render(scene, "reference", torch.float64)
    assert ((ours["image"] - expected["image"]).abs() < 2e-3).double().mean() > 0.999
    assert all(torch.isfinite(x).all() for x in ours.values())


def test_absgrad_sums_magnitudes_over_pixels():
    scene = clear_cut_scene(n=3, width=9, height=7)
    del scene["backgrounds"]
    ours, info = render(scene, "cpu", torch.float32, absgrad=True)
    geometry = [scene[k] for k in ("means", "quats", "scales", "opacities", "viewmats", "Ks")]
    means2d, conics, depths, extents = reference.project(*geometry, 9, 7, 0.01, 1e10, 0.3)
    means2d = means2d.requires_grad_()
    image, alpha = reference.composite(
        means2d, conics, scene["opacities"], scene["colors"], depths, extents, 9, 7
    )
    g = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (image, alpha)]
    pixels = ((image * cotangents[0]).sum(-1) + (alpha * cotangents[1]).sum(-1)).reshape(-1)
    grads = [torch.autograd.grad(p, means2d, retain_graph=True)[0] for p in pixels]
    assert_near(ours["means2d"], sum(grads), 1e-5)
    expected = sum(g.abs() for g in grads)
    assert (expected > grads[0].new_zeros(1)).any() and not torch.allclose(expected, sum(grads))
    assert_near(info["means2d"].absgrad, expected, 1e-5)


def test_projection_equals_gsplats_torch_reference():
    """gsplat's own reference implementation, on the CPU, as a third party."""
    theirs = pytest.importorskip("gsplat.cuda._torch_impl")
    scene = {k: v.float() for k, v in make_scene(1, 200, 2).items() if torch.is_tensor(v)}
    scene["opacities"] = torch.ones(200)  # its radii know no opacity
    covars, _ = theirs._quat_scale_to_covar_preci(scene["quats"], scene["scales"], True, False)
    radii, means2d, depths, conics, _ = theirs._fully_fused_projection(
        scene["means"], covars, scene["viewmats"], scene["Ks"], 37, 21
    )
    geometry = [scene[k] for k in ("means", "quats", "scales", "opacities", "viewmats", "Ks")]
    drawn = (radii > 0).all(-1)
    assert drawn.any() and not drawn.all()
    for module in (reference, cpu):
        ours = module.project(*geometry, 37, 21, 0.01, 1e10, 0.3)
        # sqrt(2 ln 255) = 3.329 instead of 3.33: after rounding up at most one pixel less
        difference = radii - ours[3].ceil()
        assert (difference[drawn] >= 0).all() and (difference[drawn] <= 1).all()
        assert ((difference > 0).double().mean() < 0.01) and (ours[3][~drawn] == 0).all()
        for a, b in zip(ours, (means2d, conics, depths)):
            assert torch.allclose(a[drawn], b[drawn], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("absgrad", [False, True])
def test_gsplats_default_strategy_runs_on_it(absgrad, packed):
    gsplat = pytest.importorskip("gsplat")
    scene = {k: v.float() if torch.is_tensor(v) else v for k, v in make_scene(2).items()}
    params = {k: torch.nn.Parameter(scene[k]) for k in ("means", "quats", "colors")}
    params["scales"] = torch.nn.Parameter(scene["scales"].log())
    params["opacities"] = torch.nn.Parameter(scene["opacities"].clamp(0.01, 0.99).logit())
    optimizers = {k: torch.optim.Adam([p], lr=1e-3) for k, p in params.items()}
    strategy = gsplat.DefaultStrategy(
        refine_start_iter=-1, refine_every=1, grow_grad2d=1e-5, absgrad=absgrad, verbose=False
    )
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state(scene_scale=1.0)
    for step in range(1, 3):
        leaves = {**params, "scales": params["scales"].exp()}
        leaves["opacities"] = params["opacities"].sigmoid()
        image, _, info = rasterization(
            **{**scene, **leaves}, backend="cpu", absgrad=absgrad, packed=packed
        )
        strategy.step_pre_backward(params, optimizers, state, step, info)
        image.square().mean().backward()
        strategy._update_state(params, state, info, packed=packed)
        dense = rasterization(**{**scene, **leaves}, backend="cpu", packed=False)[2]
        seen = (dense["radii"] > 0).all(-1).sum(0)
        assert torch.equal(state["count"], seen.float())
        assert (state["grad2d"][seen > 0] > 0).any() and (state["grad2d"][seen == 0] == 0).all()
        before = len(params["means"])
        strategy.step_post_backward(params, optimizers, state, step, info, packed=packed)
        assert len(params["means"]) > before
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


def test_threads_and_repeats_give_the_same_bits():
    """Same bits from run to run and from one thread or several: nothing is summed in an order
    that depends on timing."""
    scene = make_scene(7, n=3000, width=110, height=100)
    scene["scales"] = scene["scales"] * 0.3
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(render(scene, "cpu", torch.float32)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            if name != "viewmats" and name != "backgrounds":  # sums over threads, in their order
                assert torch.equal(value, other[name]), name
    assert torch.equal(results[1]["viewmats"], results[2]["viewmats"])


def test_inputs_changed_between_forward_and_backward_are_noticed():
    scene = on_axis([2.0], [0.8], [[0.5, 0.25, 1.0]])
    scene["means"] = scene["means"].requires_grad_()
    image, _, _ = rasterization(**scene, backend="cpu")
    with torch.no_grad():
        scene["means"] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        image.sum().backward()


def test_what_does_not_fit_is_refused():
    scene = on_axis([2.0], [0.8], [[0.5, 0.25, 1.0]])
    for change, message in (
        ({"quats": torch.ones(2, 4)}, "quats has the shape"),
        ({"backgrounds": torch.ones(1, 4)}, "backgrounds has the shape"),
        ({"render_mode": "rgb"}, "render_mode 'rgb' is unknown"),
        ({"backend": "vulkan"}, "must be one of auto, cpu.*not 'vulkan'"),
        ({"near_plane": 0.0}, "near_plane"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            rasterization(**{**scene, **change})
        assert "\n" not in str(error.value)


def test_backends_are_chosen_by_device_and_availability(monkeypatch):
    from lods.gaussians.backends import gsplat as adapter

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(adapter, "missing", lambda: "no nvcc")
    assert resolve_backend("auto", cpu) == "cpu"
    assert resolve_backend("auto", cuda) == "cpu"
    with pytest.raises(ValueError, match=r"gsplat.*no nvcc"):
        resolve_backend("gsplat", cuda)
    monkeypatch.setattr(adapter, "missing", lambda: "")
    assert resolve_backend("auto", cuda) == "gsplat"
    assert resolve_backend("auto", cpu) == "cpu"
    with pytest.raises(ValueError, match="not on a CUDA device"):
        resolve_backend("gsplat", cpu)


def test_exp_is_exact_enough():
    """The vector exponential against math.exp, over its whole range."""
    import numba
    import numpy as np
    from lods.gaussians.backends import kernels, simd

    exp2_8, load8, store8 = kernels.exp2_8, simd.load8, simd.store8

    @numba.njit
    def exp2_all(x, out, state, end):
        for i in range(0, len(x), 8):
            store8(out, np.uint64(i), exp2_8(load8(x, np.uint64(i)), state, end))

    x = np.linspace(-99.5, 3, 80000, dtype=np.float32)
    out = np.empty_like(x)
    exp2_all(x, out, kernels.new_states(1, 0, 16)[0], np.uint64(0))
    assert np.abs(out / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7
    assert math.isclose(out[-1], 8, rel_tol=1e-6)


def test_what_cannot_be_drawn_is_refused():
    scene = make_scene(0, channels=4)
    with pytest.raises(ValueError, match="4 channels at most, not 5"):
        rasterization(**scene, absgrad=True, render_mode="RGB+D", backend="cpu")
    scene["colors"] = scene["colors"][..., :0]
    with pytest.raises(ValueError, match="colors has no channels"):
        rasterization(**scene | {"backgrounds": None}, backend="cpu")
