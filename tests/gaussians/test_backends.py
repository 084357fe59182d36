"""The CUDA packages behind our functions. On a CPU their glue is tested with stand-ins that have
the packages' interfaces and conventions; what needs a device is marked ``gpu``."""

import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lods.gaussians import backends, neighbours, rasterization, reference, resolve_backend
from lods.threestudio.geometry import Gaussians

from tests.gaussians.scenes import assert_near, complete, is_clear_cut, make_scene, render

INRIA = ["gswarp", "diff-gaussian-rasterization"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- the interface of 3DGS ------------------------------------------------------------------------


class Settings(NamedTuple):
    image_height: int
    image_width: int
    tanfovx: float
    tanfovy: float
    bg: torch.Tensor
    scale_modifier: float
    viewmatrix: torch.Tensor
    projmatrix: torch.Tensor
    sh_degree: int
    campos: torch.Tensor
    prefiltered: bool
    debug: bool


def with_setting(name, kind):
    """The settings of another version, with one more."""
    return NamedTuple("Settings", [*Settings.__annotations__.items(), (name, kind)])


LaterSettings = with_setting("antialiasing", bool)


def stand_in(name, output, settings=Settings):
    """A package with the interface of 3DGS over the reference's blending. Projection and
    conventions are written here, from those of the interface and not from our glue.

    ``output(image, radii, depth, alpha)`` is what a call returns; depth is accumulated."""
    package = ModuleType(name)
    package.calls = []

    class GaussianRasterizer(torch.nn.Module):
        def __init__(self, raster_settings):
            super().__init__()
            self.settings = raster_settings

        def forward(
            self, means3D, means2D, opacities, colors_precomp=None, scales=None, rotations=None
        ):
            s, n = self.settings, len(means3D)
            package.calls.append(s)
            assert type(s) is settings and not s.prefiltered and s.scale_modifier == 1
            for x, shape in ((means2D, 3), (opacities, 1), (colors_precomp, 3), (rotations, 4)):
                assert x.shape == (n, shape) and x.dtype == torch.float32 and x.is_contiguous()
            assert torch.allclose(rotations.norm(dim=-1), torch.ones(n))  # it does not normalise
            W, H = s.image_width, s.image_height
            row = torch.cat([means3D, torch.ones(n, 1)], dim=-1)
            camera, clip = row @ s.viewmatrix, row @ s.projmatrix
            origin = torch.cat([s.campos, torch.ones(1)]) @ s.viewmatrix
            assert origin[:3].abs().max() < 1e-4
            ndc = clip[:, :2] / (clip[:, 3:] + 1e-7) + means2D[:, :2]
            pixel = ((ndc + 1) * torch.tensor([W, H]) - 1) / 2  # the first pixel is at (0, 0)
            z = camera[:, 2]
            fx, fy = W / (2 * s.tanfovx), H / (2 * s.tanfovy)
            x = (camera[:, 0] / z).clamp(-1.3 * s.tanfovx, 1.3 * s.tanfovx)
            y = (camera[:, 1] / z).clamp(-1.3 * s.tanfovy, 1.3 * s.tanfovy)
            o = torch.zeros(n)
            J = torch.stack([fx / z, o, -fx * x / z, o, fy / z, -fy * y / z], -1).view(n, 2, 3)
            T = J @ s.viewmatrix[:3, :3].T
            cov = T @ reference.covariances(rotations, scales) @ T.mT + 0.3 * torch.eye(2)
            conic = torch.linalg.inv(cov)
            radii = (3 * torch.linalg.eigvalsh(cov.detach())[:, 1].sqrt()).ceil()
            seen = (pixel + radii[:, None] > -0.5) & (pixel - radii[:, None] < torch.tensor([W, H]))
            radii = radii * (seen.all(-1) & (z > 0.2))
            image, alpha = reference.composite(
                (pixel + 0.5)[None],
                torch.stack([conic[:, 0, 0], conic[:, 0, 1], conic[:, 1, 1]], -1)[None],
                opacities[:, 0].clamp(max=0.99),
                colors_precomp,
                z[None],
                radii[None, :, None].expand(1, n, 2),
                W,
                H,
                backgrounds=s.bg[None],
                with_depth=True,
            )
            image, depth = image[0].permute(2, 0, 1).split([3, 1])
            return output(image, radii.int(), depth, alpha[0].permute(2, 0, 1))

    package.GaussianRasterizationSettings = settings
    package.GaussianRasterizer = GaussianRasterizer
    package.get_compute_depth, package.set_compute_depth = lambda: True, None
    return package


def gswarp_output(image, radii, depth, alpha):
    return image, radii, SimpleNamespace(depth=depth, alpha=alpha)


VERSIONS = {
    "gswarp": ("gswarp", gswarp_output, LaterSettings),
    "3DGS": ("diff_gaussian_rasterization", lambda image, radii, *_: (image, radii), Settings),
    "3DGS of 2024": (
        "diff_gaussian_rasterization",
        lambda image, radii, depth, _: (image, radii, 1 / depth.clamp(min=1e-3)),
        LaterSettings,
    ),
    "depth before radii": (
        "diff_gaussian_rasterization",
        lambda image, radii, depth, alpha: (image, depth, alpha, radii),
        Settings,
    ),
}


@pytest.fixture
def install(monkeypatch):
    """``install(version) -> (package, backend)``, which is then taken to be for the CPU."""

    def put(version):
        name, output, settings = VERSIONS[version]
        package = stand_in(name, output, settings)
        monkeypatch.setitem(sys.modules, name, package)
        return package, name.replace("_", "-")

    monkeypatch.setattr(backends, "_unusable", lambda b, _, given: backends.get(b).refuses(**given))
    return put


def centred_scene(size=1.0, **kwargs):
    """A scene that the interface can draw: no alpha above 0.99, the principal point in the middle,
    no pair near a threshold. ``size`` scales the world."""
    for seed in range(1000):
        scene = make_scene(seed, **kwargs)
        scene["opacities"] = 0.98 * scene["opacities"]
        scene["Ks"][:, 0, 2] = scene["width"] / 2
        scene["viewmats"][:, :3, 3] *= size
        scene |= {key: size * scene[key] for key in ("means", "scales")}
        if is_clear_cut(scene):
            return scene


CASES = [
    ({"cameras": 2}, {"render_mode": "RGB+ED"}),
    ({"channels": 5, "own": True, "width": 24, "height": 40}, {"render_mode": "RGB"}),
    ({"size": 0.05}, {"render_mode": "D"}),  # all within 0.3 of the camera
    ({"channels": 1}, {"render_mode": "RGB+D", "near_plane": 2.6, "far_plane": 3.5}),
    ({"n": 0}, {"render_mode": "RGB+ED"}),
]


@pytest.mark.parametrize("scene, options", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_interface_of_3dgs_draws_what_the_reference_draws(install, version, scene, options):
    _, backend = install(version)
    scene = centred_scene(**scene)
    calls = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        fixed = {k: scene[k].to(dtype) for k in ("viewmats", "backgrounds")}
        given = {k: v for k, v in scene.items() if k not in fixed}

        def with_cameras(fixed=fixed, **rest):
            return rasterization(**fixed, **rest)

        calls.append(render(given, name, dtype, rasterize=with_cameras, **options))
    (got, info), (expected, info_reference) = calls
    assert (expected["alpha"] > 0).any() or not len(scene["means"])
    for key in expected:
        assert_near(got[key], expected[key], 2e-4)
    for key in ("means2d", "depths", "conics", "opacities"):
        assert_near(info[key], info_reference[key], 1e-4)
    assert info.keys() == info_reference.keys() and info["radii"].dtype == torch.int32
    assert info["radii"].shape == info_reference["radii"].shape
    for key in ("width", "height", "n_cameras"):
        assert info[key] == info_reference[key]
    drawn, z = info["radii"].amin(-1) > 0, info["depths"]
    moved = (expected["means2d"] != 0).any(-1)
    assert moved.any() or not len(scene["means"])
    assert not (moved & ~drawn).any()
    near, far = options.get("near_plane", 0.01), options.get("far_plane", 1e10)
    unseen = (scene["opacities"] < 1 / 255) | (z <= near) | (z >= far)
    assert not (drawn & unseen).any()


def test_a_call_for_every_three_channels(install):
    for version, expected in (("gswarp", 2), ("3DGS", 4)):
        package, backend = install(version)
        scene = centred_scene(n=5, cameras=2, width=16, height=16)
        rasterization(**scene, packed=False, backend=backend, render_mode="RGB+ED")
        assert len(package.calls) == expected


@pytest.mark.parametrize(
    "change, match",
    [
        ({"absgrad": True}, "no absgrad"),
        ({"radius_clip": 2.0}, "radius_clip must be 0"),
        ({"camera_model": "ortho"}, "camera_model='ortho' is not supported, only 'pinhole'"),
        ({"eps2d": 0.1}, "eps2d=0.3, not 0.1"),
        ({"viewmats": torch.eye(4)[None].requires_grad_()}, "no gradient of cameras"),
        ({"Ks": torch.tensor([[[20.0, 0, 9], [0, 20, 8], [0, 0, 1]]])}, "not in the middle"),
    ],
)
def test_what_the_interface_cannot_draw(install, change, match):
    package, backend = install("gswarp")
    scene = centred_scene(n=5, width=16, height=16) | change
    with pytest.raises(ValueError, match=f"gswarp.*{match}") as error:
        rasterization(**scene, packed=False, backend=backend)
    assert "\n" not in str(error.value) and "use backend=" in str(error.value)
    assert not package.calls


def test_an_unknown_setting_of_a_fork_is_named(install):
    package, backend = install("3DGS")
    package.GaussianRasterizationSettings = with_setting("kernel_size", float)
    with pytest.raises(ValueError, match=r"\(kernel_size\)"):
        rasterization(**centred_scene(n=5), packed=False, backend=backend)


def test_gswarp_is_told_to_draw_depth(install):
    package, backend = install("gswarp")
    told = []
    package.get_compute_depth, package.set_compute_depth = lambda: False, told.append
    rasterization(**centred_scene(n=5), packed=False, backend=backend)
    assert told == [True]


# --- which one ------------------------------------------------------------------------------------


def test_auto_takes_the_first_that_can_draw_the_scene(monkeypatch):
    why = dict.fromkeys(backends.CUDA, "absent")
    for name in why:
        monkeypatch.setattr(backends.get(name), "missing", lambda name=name: why[name])
    lines, warnings = [], []
    monkeypatch.setattr("lods.log.info", lines.append)
    monkeypatch.setattr("lods.log.warn", warnings.append)
    backends.announce.cache_clear()
    scene = complete(**centred_scene(n=2, width=16, height=16), packed=False)
    resolve = resolve_backend
    assert resolve("auto", CUDA, scene) == "cpu" and resolve("auto", CUDA, scene) == "cpu"
    names = list(why)
    assert names == ["gsplat", *INRIA]
    absent = "; ".join(f"{name}: absent" for name in names)
    (line,) = warnings  # once, and not among what is only told
    assert line.startswith(f"Gaussian rasteriser: cpu ({absent})") and not lines
    assert "'pip install gswarp'" in line
    for i in (2, 1, 0):
        why[names[i]] = ""
        assert resolve("auto", CUDA, scene) == names[i]
        assert resolve(names[i], CUDA, scene) == names[i]
        assert resolve("auto", CPU, scene) == "cpu"
        with pytest.raises(ValueError, match=f"{names[i]}.*on cpu, not on a CUDA device"):
            resolve(names[i], CPU, scene)
    assert "Gaussian rasteriser: gswarp (gsplat: absent)" in lines
    why["gsplat"] = "absent"
    assert resolve("auto", CUDA, {**scene, "absgrad": True}) == "cpu"  # absgrad
    assert "gswarp: it has no absgrad" in warnings[-1]
    backends.announce.cache_clear()


@pytest.mark.parametrize(
    "backend, module, remedy",
    [
        ("gsplat", "gsplat.cuda._backend", "pip install gsplat"),
        ("gswarp", "gswarp", "pip install gswarp"),
        ("diff-gaussian-rasterization", "diff_gaussian_rasterization", "pip install .*git.https"),
    ],
)
def test_an_absent_rasteriser_says_how_to_get_it(monkeypatch, backend, module, remedy):
    missing = backends.get(backend).missing
    monkeypatch.setitem(sys.modules, module, None)  # not importable
    for cuda, match in ((False, "no CUDA device; use backend='cpu'"), (True, remedy)):
        missing.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        with pytest.raises(ValueError, match=f"{backend}.*{match}") as error:
            resolve_backend(backend, CUDA)
        assert "\n" not in str(error.value)
    missing.cache_clear()
    if backend != "gsplat":
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        assert missing() == ""
        missing.cache_clear()


# --- neighbours -----------------------------------------------------------------------------------


def cloud(n=200):
    xyz = np.random.default_rng(0).normal(size=(n, 3))
    return np.concatenate([xyz, xyz[:5]])  # some points twice


def dist_cuda2(points):
    """The mean of the squared distances to the three nearest others, by all pairs."""
    assert points.dtype == torch.float32 and points.is_contiguous() and points.shape[1] == 3
    squared = (points[:, None] - points).square().sum(-1).fill_diagonal_(float("inf"))
    return squared.topk(3, largest=False).values.mean(-1)


def test_dist_cuda2_gives_the_sizes_of_scipy(monkeypatch):
    module = SimpleNamespace(distCUDA2=dist_cuda2)
    monkeypatch.setitem(sys.modules, "simple_knn", SimpleNamespace(_C=module))
    monkeypatch.setitem(sys.modules, "simple_knn._C", module)
    monkeypatch.setitem(sys.modules, "gswarp", module)
    expected = neighbours.neighbour_scale(cloud())
    monkeypatch.setattr(neighbours, "resolve_knn_backend", lambda backend, device: backend)
    for backend in neighbours.CUDA_BACKENDS:
        got = neighbours.neighbour_scale(cloud(), CPU, backend)
        assert got.dtype == expected.dtype and np.allclose(got, expected, rtol=1e-5)


def test_which_finds_the_neighbours(monkeypatch):
    resolve = neighbours.resolve_knn_backend
    why = dict.fromkeys(neighbours.CUDA_BACKENDS, "absent; pip install it")
    with monkeypatch.context() as patch:
        patch.setattr(neighbours, "missing", why.get)
        assert resolve("auto", CUDA) == "scipy"
        for name in ("gswarp", "simple-knn"):
            with pytest.raises(ValueError, match=f"knn_backend={name}.*pip install"):
                resolve(name, CUDA)
            why[name] = ""
            assert resolve("auto", CUDA) == resolve(name, CUDA) == name
            assert resolve("auto", CPU) == "scipy"
            with pytest.raises(ValueError, match="on cpu, not on a CUDA device"):
                resolve(name, CPU)
        with pytest.raises(ValueError, match="'kd' is unknown; choose from"):
            resolve("kd", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "simple_knn", ModuleType("simple_knn"))  # another package
    neighbours.missing.cache_clear()
    with pytest.raises(ValueError, match=r"simple_knn._C cannot be loaded.*git.https"):
        resolve("simple-knn", CUDA)
    neighbours.missing.cache_clear()


def test_the_geometry_asks_for_them(monkeypatch):
    from lods.gaussians import initialize as init

    seen = []
    monkeypatch.setattr(
        init, "neighbour_scale", lambda xyz, *rest: seen.append(rest) or np.ones(len(xyz))
    )
    kind = Gaussians
    geometry = kind({"ball": {"n_points": 8}, "knn_backend": "simple-knn"})
    assert seen == [(geometry.device, "simple-knn")]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="knn_backend must be one of"):
        kind({"ball": {"n_points": 8}, "knn_backend": "kd"})


# --- on a device ----------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("backend", ["gsplat", *INRIA])
def test_a_cuda_rasteriser_equals_the_reference(backend):
    """A Gaussian that ends at 3 standard deviations may lack 0.011 of its opacity in a pixel."""
    if backends.get(backend).missing():
        pytest.skip(backends.get(backend).missing())
    scene = centred_scene(n=60, cameras=2, width=64, height=48)
    tolerance = 2e-3 if backend == "gsplat" else 2e-2
    scene = {k: v.cuda().float() if torch.is_tensor(v) else v for k, v in scene.items()}
    results = []
    for name in (backend, "reference"):
        names = ("means", "quats", "scales", "opacities", "colors")
        leaves = {k: scene[k].clone().requires_grad_() for k in names}
        image, alpha, info = rasterization(
            **{**scene, **leaves}, backend=name, render_mode="RGB+ED"
        )
        info["means2d"].retain_grad()
        g = torch.Generator().manual_seed(0)
        cotangent = torch.randn(image.shape, generator=g).cuda() * (alpha.detach() > 0.05)
        (image * cotangent).sum().backward()
        grads = {k: v.grad for k, v in leaves.items()}
        results.append({"alpha": alpha, "means2d": info["means2d"].grad, **grads})
        results[-1]["image"] = image * (alpha > 0.05)
    for key in results[0]:
        assert_near(*(r[key].cpu() for r in results), tolerance)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("backend", ["simple-knn", "gswarp"])
def test_a_cuda_search_for_neighbours_equals_scipys(backend):
    if neighbours.missing(backend):
        pytest.skip(neighbours.missing(backend))
    got = neighbours.neighbour_scale(cloud(5000), CUDA, backend)
    assert np.allclose(got, neighbours.neighbour_scale(cloud(5000)), rtol=1e-4)
