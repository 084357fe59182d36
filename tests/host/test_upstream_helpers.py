"""Helpers of upstream that extensions import: the importance estimator, LPIPS, guide shapes, and
the encoding of space and time."""

import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import threestudio
from threestudio.models.estimators import ImportanceEstimator
from threestudio.models.networks import get_encoding
from threestudio.utils.errors import UserError
from threestudio.utils.ops import MeshOBJ, ShapeLoss, ce_pq_loss

# --- the importance estimator ---


def sample(fns=(), counts=(), n=8, rays=3, **more):
    options = {"near_plane": 1.0, "far_plane": 3.0, **more}
    return ImportanceEstimator().sampling(list(fns), list(counts), n, rays, **options)


def test_without_proposals_the_intervals_are_even():
    starts, ends = sample()
    edges = torch.linspace(1, 3, 9).expand(3, 9)
    torch.testing.assert_close(starts, edges[:, :-1])
    torch.testing.assert_close(ends, edges[:, 1:])


def test_or_even_in_disparity():
    starts, ends = sample(sampling_type="lindisp")
    even = torch.linspace(1, 1 / 3, 9).expand(3, 9)
    torch.testing.assert_close(1 / torch.cat([starts, ends[:, -1:]], 1), even)


def test_intervals_go_where_a_proposal_sees_density():
    """All light comes from 2.0 .. 2.2, which gets nearly all of the final edges."""

    def wall(t_starts, t_ends):
        assert t_starts.shape == t_ends.shape == (3, 40)
        middle = (t_starts + t_ends) / 2
        return 500.0 * ((middle > 2.0) & (middle < 2.2)).float()

    starts, ends = sample([wall], [40], n=20)
    assert starts.shape == (3, 40 + 20 + 1)
    assert torch.equal(starts[:, 1:], ends[:, :-1]) and bool((ends >= starts).all())
    assert starts.min() == 1 and ends.max() == 3
    inside = (starts > 1.99) & (starts < 2.26)
    assert inside.sum(1).min() >= 20


def test_what_no_proposal_sees_is_spread_to_the_end():
    starts, _ = sample([lambda a, b: torch.zeros_like(a)], [10], n=20)
    assert (starts > 2.8).sum(1).min() > 10  # light passes to the last interval


def test_stratified_intervals_move_within_their_bins():
    torch.manual_seed(0)
    starts, ends = sample(n=50, stratified=True)
    even, _ = sample(n=50)
    assert not torch.equal(starts[0], starts[1])
    assert (starts - even).abs().max() <= 2.0 / 50
    assert starts.min() >= 1 and ends.max() <= 3


@pytest.mark.parametrize("grad", [False, True])
def test_proposals_may_be_trained(grad):
    seen = []
    sample([lambda a, b: seen.append(torch.is_grad_enabled()) or a], [4], requires_grad=grad)
    assert seen == [grad]


def test_bad_calls_are_refused():
    with pytest.raises(UserError, match="1 proposals need"):
        sample([lambda a, b: a], [])
    with pytest.raises(UserError, match="sampling_type"):
        sample(sampling_type="log")
    with pytest.raises(ValueError, match="a proposal gave"):
        sample([lambda a, b: a[:1]], [4])


# --- guide shapes ---


@pytest.fixture(scope="module")
def cube():
    import trimesh

    box = trimesh.creation.box(extents=(2, 2, 2))
    return MeshOBJ(box.vertices, box.faces)


def test_the_winding_number_is_one_inside_and_zero_outside(cube):
    points = torch.tensor([[0.0, 0, 0], [0.9, -0.9, 0.9], [1.1, 0, 0], [5.0, 5, 5]])
    torch.testing.assert_close(
        cube.winding_number(points), torch.tensor([1.0, 1, 0, 0]), atol=1e-5, rtol=0
    )
    flipped = MeshOBJ(cube.v, cube.f[:, ::-1])
    assert flipped.winding_number(points[:1]).item() == pytest.approx(-1, abs=1e-5)
    half = MeshOBJ(cube.v, cube.f[:6])
    assert 0 < half.winding_number(torch.zeros(1, 2, 3)).max() < 1


def test_the_distance_is_that_to_the_surface(cube):
    points = torch.tensor(
        [[0.0, 0, 0], [3.0, 0.3, 0.2], [2.0, 2.0, 0.1], [2.0, 2.0, 2.0], [1.0, 0.2, 0.3]]
    )
    squared = torch.tensor([1.0, 4.0, 2.0, 3.0, 0.0])
    got = cube.gaussian_weighted_distance(points, 0.7)
    torch.testing.assert_close(got, torch.exp(-squared / (2 * 0.7**2)), atol=1e-6, rtol=1e-5)


def test_a_normalized_mesh_is_a_ball_of_that_size(cube):
    moved = MeshOBJ(cube.v * 3 + 5, cube.f).normalize_mesh(0.7)
    assert abs(moved.v.mean(0)).max() < 1e-12
    assert (moved.v**2).sum(1).max() == pytest.approx(0.49)


def test_the_shape_loss_prefers_density_inside(tmp_path):
    import trimesh

    # a tower along y, which is up in the file: along z here
    path = tmp_path / "tower.obj"
    trimesh.creation.box(extents=(0.4, 2.0, 0.4)).export(path)
    loss = ShapeLoss(str(path))
    tower, far = torch.tensor([[0.0, 0.0, 0.5]]), torch.tensor([[0.0, 0.5, 0.0]])
    for point, inside in ((tower, 1.0), (far, 0.0)):
        for sigma in (0.0, 3.0):
            density = torch.full((1, 1), sigma)
            occupancy = 1 - torch.exp(-0.2 * density[0])
            near = loss.sketchshape.gaussian_weighted_distance(point, 0.3)
            expected = ce_pq_loss(occupancy, torch.tensor([inside]), 1 - near)
            torch.testing.assert_close(loss(point, density), expected)
    dense, thin = torch.full((1, 1), 50.0), torch.zeros(1, 1)
    assert loss(tower, dense) < loss(tower, thin) and loss(far, dense) > loss(far, thin)
    with pytest.raises(UserError, match="is no mesh"):
        (tmp_path / "words.obj").write_text("hello")
        ShapeLoss(str(tmp_path / "words.obj"))


# --- LPIPS ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the two files' formats; and the folder."""
    from threestudio.utils.perceptual import perceptual as module

    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    net = {}
    for key, value in module._Vgg16().features.state_dict().items():
        scale = 1.0 if key.endswith("bias") else math.sqrt(2 / value[0].numel())
        net[f"features.{key}"] = scale * torch.randn(value.shape, generator=generator)
    torch.save({**net, "classifier.0.bias": torch.zeros(2)}, folder / module.VGG)
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator)
        for i, c in enumerate(module.CHANNELS)
    }
    torch.save(linear, folder / module.LPIPS)
    return folder, net, linear


@pytest.fixture
def lpips(weights, monkeypatch):
    from threestudio.utils.perceptual import perceptual as module

    monkeypatch.setattr(module, "vgg_file", lambda: weights[0] / module.VGG)
    monkeypatch.setattr(module, "lpips_file", lambda: weights[0] / module.LPIPS)
    return module


def test_lpips_is_its_formula(lpips, weights):
    _, net, linear = weights
    loss = lpips.PerceptualLoss().eval()
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1

    def features(image):
        h = (image - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        found = []
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            if block[0]:
                h = F.max_pool2d(h, 2)
            for i in block:
                h = F.conv2d(
                    h, net[f"features.{i}.weight"], net[f"features.{i}.bias"], padding=1
                ).relu()
            found.append(h)
        return found

    expected = 0.0
    for i, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        gap = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        expected = expected + (gap * linear[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
    got = loss(x, y)
    assert got.shape == (2, 1, 1, 1)
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-4, atol=1e-6)
    assert loss(x, x).abs().max() == 0 and not any(p.requires_grad for p in loss.parameters())
    named = threestudio.find("perceptual-loss")({"use_dropout": False})
    torch.testing.assert_close(named(x, y), got)


def test_lpips_says_which_file_is_missing_or_wrong(lpips, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(lpips, "lpips_file", lambda: tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"pip install lpips brings, are not there: put them at"):
        lpips.PerceptualLoss()
    torch.save({"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="is not LPIPS for VGG-16"):
        lpips.PerceptualLoss()
    monkeypatch.setattr(lpips, "vgg_file", lambda: tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="is not torchvision's vgg16"):
        lpips.PerceptualLoss()
    (tmp_path / "vgg.pth").write_bytes(b"text")
    with pytest.raises(UserError, match="cannot be read as weights"):
        lpips.PerceptualLoss()


def test_importing_lpips_needs_no_weights():
    from threestudio.utils.perceptual import PerceptualLoss

    assert issubclass(PerceptualLoss, torch.nn.Module)


# --- the encoding of space and time ---

GRID = {
    "otype": "HashGridSpatialTime",
    "n_levels": 2,
    "n_features_per_level": 2,
    "log2_hashmap_size": 8,
    "base_resolution": 4,
    "per_level_scale": 1.5,
    "static": False,
}


def test_space_and_time_add_up():
    torch.manual_seed(0)
    encoding = get_encoding(3, OmegaConf.create({**GRID, "include_xyz": True}))
    grids = encoding.encoding
    for grid in (grids.encoding, grids.encoding_time):
        torch.nn.init.normal_(grid.params)
    x = torch.rand(5, 3)
    keys = {"encoding.encoding.params", "encoding.encoding_time.params"}
    assert set(encoding.state_dict()) == keys and encoding.n_output_dims == 3 + 4
    times = torch.linspace(0, 1, 5)
    for given, wanted in ((None, 0.0), (0.3, 0.3), (times, times), (times[:, None], times)):
        grids.frame_time = given
        column = torch.as_tensor(wanted).reshape(-1, 1).expand(5, 1)
        expected = grids.encoding(x) + grids.encoding_time(torch.cat([x, column], 1))
        torch.testing.assert_close(encoding(x), torch.cat([2 * x - 1, expected], 1))
    grids.frame_time = 0.1
    before = encoding(x)
    grids.frame_time = 0.9
    assert not torch.allclose(encoding(x), before)


def test_a_static_encoding_trains_space_only():
    encoding = get_encoding(3, OmegaConf.create({**GRID, "static": True})).encoding
    encoding(torch.rand(4, 3)).sum().backward()
    assert encoding.encoding.params.grad.any() and encoding.encoding_time.params.grad is None
    encoding.set_temp_param_grad(True)
    encoding(torch.rand(4, 3)).sum().backward()
    assert encoding.encoding_time.params.grad.any()


@pytest.mark.parametrize(
    "change, text",
    [({"static": None}, "needs the option 'static'"), ({"n_level": 3}, "did you mean 'n_levels'")],
)
def test_bad_options_are_one_line(change, text):
    options = {k: v for k, v in {**GRID, **change}.items() if v is not None}
    with pytest.raises(UserError, match=text):
        get_encoding(3, OmegaConf.create(options))


def test_a_geometry_takes_the_encoding(tmp_path):
    geometry = threestudio.find("implicit-volume")(
        {"pos_encoding_config": GRID, "normal_type": None}
    )
    out = geometry(torch.rand(6, 3))
    out["density"].sum().backward()
    grids = geometry.encoding.encoding
    assert grids.encoding.params.grad.any() and grids.encoding_time.params.grad.any()
