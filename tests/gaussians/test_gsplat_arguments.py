"""gsplat's arguments, one by one: what they mean here is what they mean there, or one line says
that they are not supported."""

import enum
import inspect

import gsplat
import pytest
import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci
from gsplat.cuda._torch_impl import _spherical_harmonics as harmonics_of_gsplat
from gsplat.cuda._wrapper import RollingShutterType
from lods.gaussians import backends, rasterization

from tests.gaussians.scenes import NAMES, assert_near, complete, make_scene, render

CPU_BACKENDS = ["cpu", "reference"]


def scene_of(seed, dtype=torch.float32, **kwargs):
    scene = make_scene(seed, **kwargs)
    return {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in scene.items()}


def test_the_signature_is_gsplats_and_a_backend():
    theirs = inspect.signature(gsplat.rasterization).parameters
    ours = dict(inspect.signature(rasterization).parameters)
    backend = ours.pop("backend")
    assert backend.kind is inspect.Parameter.KEYWORD_ONLY and backend.default == "auto"
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        default = parameter.default
        # by its name, so that gsplat is not imported for it
        default = default.name if isinstance(default, enum.Enum) else default
        assert ours[name].default == default and ours[name].kind is parameter.kind, name


# --- harmonics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["shared", "of each camera"])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_sh_degree_draws_the_colours_of_gsplats_harmonics(degree, own):
    scene = scene_of(1, torch.float64, n=30, cameras=2)
    g = torch.Generator().manual_seed(degree)
    shape = (*((2,) if own else ()), 30, 16, 3)  # more than the degree needs
    coefficients = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    means = scene["means"].clone().requires_grad_()
    centres = torch.inverse(scene["viewmats"])[:, :3, 3]
    directions = means - centres[:, None]
    colors = harmonics_of_gsplat(degree, directions, coefficients.expand(2, 30, 16, 3))
    colors = (colors + 0.5).clamp_min(0)
    results = []
    for given in ({"colors": coefficients, "sh_degree": degree}, {"colors": colors}):
        rest = {**scene, "means": means, **given}
        image, _, _ = rasterization(**rest, backend="reference")
        grads = torch.autograd.grad(image.square().sum(), (means, coefficients), retain_graph=True)
        results.append((image, *grads))
    for ours, expected in zip(*results):
        assert_near(ours, expected, 1e-6)


def test_more_harmonics_than_there_are_cannot_be_asked_for():
    scene = scene_of(0, n=5)
    scene["colors"] = torch.rand(5, 4, 3)
    with pytest.raises(ValueError, match=r"sh_degree=2 needs colors of at least 9 harmonics"):
        rasterization(**scene, sh_degree=2)


# --- packed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_packed_info_has_the_rows_of_what_is_drawn(backend):
    scene = scene_of(3, n=80, cameras=3)
    dense, info = render(scene, backend, torch.float32, packed=False)
    packed, rows = render(scene, backend, torch.float32, packed=True)
    drawn = (info["radii"] > 0).all(-1)
    assert 0 < drawn.sum() < drawn.numel()
    cameras, gaussians = drawn.nonzero(as_tuple=True)
    assert torch.equal(rows["camera_ids"], cameras)
    assert torch.equal(rows["gaussian_ids"], gaussians)
    assert torch.equal(rows["batch_ids"], torch.zeros_like(cameras))
    for name in ("radii", "means2d", "depths", "conics", "opacities"):
        assert torch.equal(rows[name], info[name][drawn]), name
    for name in dense:
        expected = dense[name][drawn] if name == "means2d" else dense[name]
        assert torch.equal(packed[name], expected), name


def test_packed_rows_get_the_absolute_gradients_of_theirs():
    scene = scene_of(3, n=40, cameras=2)
    _, info = render(scene, "cpu", torch.float32, absgrad=True)
    _, rows = render(scene, "cpu", torch.float32, absgrad=True, packed=True)
    drawn = (info["radii"] > 0).all(-1)
    assert info["means2d"].absgrad.sum() > 0
    assert torch.equal(rows["means2d"].absgrad, info["means2d"].absgrad[drawn])


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_batch_dimensions_are_scenes_of_their_own(own, packed):
    scenes = [scene_of(seed, n=20, cameras=2, own=own) for seed in range(6)]
    batch = {
        k: torch.stack([s[k] for s in scenes]).unflatten(0, (2, 3)) for k in (*NAMES, "Ks")
    } | {"width": scenes[0]["width"], "height": scenes[0]["height"]}
    options = {"render_mode": "RGB+ED", "absgrad": True, "packed": packed}
    options["near_plane"] = 1.5  # takes some away
    together, info = render(batch, "cpu", torch.float32, **options)
    assert together["image"].shape == (2, 3, 2, 21, 37, 4) and info["n_batches"] == 6
    # the same random cotangents, part by part
    rows = 0
    for i, scene in enumerate(scenes):
        leaves = {k: scene[k].clone().requires_grad_() for k in NAMES}
        image, alpha, alone = rasterization(**{**scene, **leaves}, backend="cpu", **options)
        alone["means2d"].retain_grad()
        g = torch.Generator().manual_seed(0)
        loss = 0
        for x, whole in ((image, together["image"]), (alpha, together["alpha"])):
            cotangent = torch.randn(whole.shape, generator=g, dtype=torch.float64).float()
            loss = loss + (x * cotangent.flatten(0, 1)[i]).sum()
        loss.backward()
        assert torch.equal(together["image"].flatten(0, 1)[i], image)
        for name, leaf in leaves.items():
            assert torch.equal(together[name].flatten(0, 1)[i], leaf.grad), name
        grads = together["means2d"], info["means2d"].absgrad
        if packed:
            mine = info["batch_ids"] == i
            parts = [x[mine] for x in grads]
            assert torch.equal(info["gaussian_ids"][mine], alone["gaussian_ids"])
            rows += int(mine.sum())
        else:
            parts = [x.flatten(0, 1)[i] for x in grads]
            assert torch.equal(info["radii"].flatten(0, 1)[i], alone["radii"])
        assert torch.equal(parts[0], alone["means2d"].grad)
        assert torch.equal(parts[1], alone["means2d"].absgrad)
    assert not packed or rows == len(info["batch_ids"]) < 6 * 2 * 20


# --- what is left out, and in which parts it is drawn ---------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_radius_clip_leaves_out_what_is_small_in_both_directions(backend):
    scene = scene_of(4, n=60)
    scene["opacities"] = torch.ones(60)  # the radii of gsplat's own reference know no opacity
    covars, _ = _quat_scale_to_covar_preci(scene["quats"], scene["scales"], True, False)
    radii, *_ = _fully_fused_projection(
        scene["means"], covars, scene["viewmats"], scene["Ks"], 37, 21
    )
    large = ~(radii[0] <= 6).all(-1)
    assert 0 < large.sum() < (radii[0] > 0).all(-1).sum()
    clipped, info = render(scene, backend, torch.float32, radius_clip=6.0)
    kept = {k: v[large] if k in NAMES[:5] else v for k, v in scene.items()}
    expected, _ = render(kept, backend, torch.float32)
    assert ((info["radii"][0] > 0).all(-1) & ~large).sum() == 0
    assert_near(clipped["image"], expected["image"], 1e-6)
    assert_near(clipped["means"][large], expected["means"], 1e-5)
    assert (clipped["means"][~large] == 0).all()


def test_tiles_of_32_pixels_draw_the_same():
    scene = scene_of(5, n=100, cameras=2, width=70, height=45)
    small, _ = render(scene, "cpu", torch.float32)
    large, _ = render(scene, "cpu", torch.float32, tile_size=32)
    for name in small:
        assert_near(large[name], small[name], 2e-5)


@pytest.mark.parametrize("backend, chunk", [("cpu", 4), ("reference", 1), ("reference", 3)])
def test_chunks_of_channels_draw_the_same(backend, chunk):
    scene = scene_of(6, n=40, channels=5)
    whole, _ = render(scene, backend, torch.float32, render_mode="RGB+D")
    options = {"render_mode": "RGB+D", "channel_chunk": chunk}
    parts, _ = render(scene, backend, torch.float32, **options)
    for name in whole:
        assert_near(parts[name], whole[name], 2e-5)


def test_the_compiled_kernels_blend_four_channels_at_a_time():
    with pytest.raises(ValueError, match="channel_chunk=3 is not supported, only 4 or more"):
        rasterization(**scene_of(0, n=5), channel_chunk=3, backend="cpu")


# --- what is not supported ------------------------------------------------------------------------

OTHER = {
    "tile_size": 8,
    "sparse_grad": True,
    "rasterize_mode": "antialiased",
    "distributed": True,
    "camera_model": "fisheye",
    "segmented": True,
    "covars": torch.eye(3).repeat(5, 1, 1),
    "with_ut": True,
    "with_eval3d": True,
    "radial_coeffs": torch.zeros(1, 6),
    "tangential_coeffs": torch.zeros(1, 2),
    "thin_prism_coeffs": torch.zeros(1, 4),
    "ftheta_coeffs": object(),
    "rolling_shutter": RollingShutterType.ROLLING_TOP_TO_BOTTOM,
    "viewmats_rs": torch.eye(4)[None],
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_supported_is_refused_by_name(name, backend):
    with pytest.raises(ValueError, match=rf"{backend}.*{name}\S* is not supported") as error:
        rasterization(**scene_of(0, n=5), **{name: OTHER[name]}, backend=backend)
    line = str(error.value)
    assert "\n" not in line and len(line) < 160
    assert "only" in line or "leave it out" in line


def test_every_argument_is_done_or_refused():
    """None is forgotten: all that a backend may leave undone is tried above."""
    assert backends.base.PLAIN.keys() == OTHER.keys()
    for name in OTHER:
        default = inspect.signature(rasterization).parameters[name].default
        assert backends.base.PLAIN[name] == default


def test_gsplats_own_backend_gets_every_argument_as_it_is(monkeypatch):
    calls, signature = [], inspect.signature(gsplat.rasterization)
    monkeypatch.setattr(gsplat, "rasterization", lambda **given: calls.append(given))
    given = complete(**scene_of(0, torch.float64, n=5), **{**OTHER, "rolling_shutter": "GLOBAL"})
    backends.get("gsplat").rasterization(**given)
    [call] = calls
    assert call.keys() == signature.parameters.keys()
    assert call["rolling_shutter"] is RollingShutterType.GLOBAL
    assert call["camera_model"] == "fisheye" and call["ftheta_coeffs"] is OTHER["ftheta_coeffs"]
    assert call["means"].dtype == torch.float32
