"""The hash grid: layout and entries by hand, the twin in closed form, the kernels against it."""

import copy
import sys
import types

import pytest
import torch

import threestudio
from threestudio.models import hashgrid
from threestudio.models.hashgrid import HashGrid, grid_layout, hash_encode, native, twin
from threestudio.utils.errors import UserError

SMALL = {"n_levels": 4, "log2_hashmap_size": 9, "base_resolution": 4, "per_level_scale": 1.6}
DEFAULT = 1.447269237440378  # the default configs' per_level_scale: 4096 cells on level 15


def table(layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(layout.n_params, generator=g) - 0.5


def points(kind, dims=3, n=200, seed=0):
    """Points in the unit cube: anywhere, along rays through it, on its border; and around it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, dims, generator=g)
    if kind == "rays":
        steps = torch.linspace(0, 1, 20)[:, None]
        x = torch.cat([a + steps * (b - a) for a, b in zip(x[0:20:2], x[1:20:2])])
    elif kind == "border":
        side = torch.arange(n) % (2 * dims)
        x[torch.arange(n), side // 2] = (side % 2).float()
        x[: 2 * 2**dims] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * dims).repeat(2, 1)
    elif kind == "outside":
        x = 6 * x - 2.5
    return x


def close(a, b, tolerance=1e-5):
    """Equal up to a part of the largest entry."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


# ------------------------------------------------------------------------------- layout
def test_layout_of_the_default_config():
    layout = grid_layout(3, 16, 2, 19, 16, DEFAULT)
    # 16 * 2^(8 l / 15) vertices a side, rounded up
    sides = [16, 24, 34, 49, 71, 102, 148, 213, 308, 446, 646, 934, 1352, 1956, 2831, 4096]
    assert [level.resolution for level in layout.levels] == sides
    assert [level.dense for level in layout.levels] == [True] * 5 + [False] * 11  # 71^3 < 2^19
    sizes = [16**3, 24**3, 34**3, 49**3 + 7, 71**3 + 1] + [2**19] * 11  # multiples of 8
    assert [level.size for level in layout.levels] == sizes
    assert [level.offset for level in layout.levels] == [sum(sizes[:l]) for l in range(16)]
    assert layout.levels[0].scale == 15 and layout.n_output_dims == 32
    assert layout.n_params == 2 * sum(sizes) == 12_599_920


def test_layout_of_published_grids():
    """Parameter counts that tiny-cuda-nn has for other grids: a finest level of 2048 cells
    (torch-ngp, nerfstudio), and instant-ngp's fox (b = 1.51572)."""
    assert grid_layout(3, 16, 2, 19, 16, 2 ** (7 / 15)).n_params == 12_196_240
    assert grid_layout(3, 16, 2, 19, 16, 1.51572).n_params == 13_074_912


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_input_dims", 5),
        ("n_levels", 0),
        ("n_levels", "16"),
        ("n_features_per_level", 3),
        ("log2_hashmap_size", 40),
        ("base_resolution", 0),
        ("base_resolution", 2.5),
        ("per_level_scale", 0.5),
        ("per_level_scale", float("nan")),
        ("per_level_scale", 8.0),  # 16 levels of it: too many cells
        ("interpolation", "Linaer"),
        ("backend", "cuda"),
    ],
)
def test_a_bad_value_is_named(key, value):
    with pytest.raises(UserError, match=key):
        HashGrid(**{key: value})


# ------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_dense_level_reproduces_linear_functions(backend, dims):
    """Guards the interpolation, the 0.5, the strides, and the gradient's scale."""
    layout = grid_layout(dims, 1, 1, 10, base_resolution=5)  # vertices at (i - 1/2) / 4
    slope = torch.tensor([1.5, -2.0, 0.75])[:dims]
    vertices = torch.cartesian_prod(*[torch.arange(5)] * dims)
    params = torch.zeros(layout.n_params)
    entries = sum(vertices[:, d] * 5**d for d in range(dims))
    params[entries] = ((vertices - 0.5) / 4) @ slope + 0.25
    x = (0.874 * points("anywhere", dims)).requires_grad_()  # before the last vertex at 3.5 / 4
    out = hash_encode(x, params, layout, backend)
    torch.testing.assert_close(out[:, 0], x @ slope + 0.25)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, slope.expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
@pytest.mark.parametrize("log2_size", [10, 6])
def test_vertices_have_the_entries_of_tiny_cuda_nn(backend, interpolation, log2_size):
    """On a vertex there is its entry alone, inside and outside of the cube: dense (729 vertices in
    736 entries) and hashed (in 64), in integers that wrap at 2^32."""
    layout = grid_layout(3, 1, 2, log2_size, 9, interpolation=interpolation)
    params = table(layout)
    vertices = torch.randint(-30, 30, (300, 3), generator=torch.Generator().manual_seed(1))
    vertices[:2] = torch.tensor([[0, 0, 0], [8, 8, 8]])
    out = hash_encode((vertices - 0.5) / 8, params, layout, backend)
    for vertex, features in zip(vertices.tolist(), out):
        if log2_size == 10:
            entry = (vertex[0] + 9 * vertex[1] + 81 * vertex[2]) % 2**32 % 736
        else:
            i, j, k = (c % 2**32 for c in vertex)
            entry = (i ^ j * 2654435761 % 2**32 ^ k * 805459861 % 2**32) % 64
        torch.testing.assert_close(features, params[2 * entry : 2 * entry + 2])


def test_smoothstep_is_halfway_between_and_flat_at_vertices():
    layout = grid_layout(2, 1, 1, 10, 5, interpolation="Smoothstep")
    params = table(layout)
    x = torch.tensor([[1.5, 1.5], [1.75, 1.5], [2.0, 1.5]]) / 4  # from vertex (2, 2) to (3, 2)
    x = x.double().requires_grad_()
    out = hash_encode(x, params.double(), layout)
    left, right = params[12].double(), params[13].double()
    # s(1/2) = 1/2, s(1/4) = 5/32
    expected = torch.stack([left, left + (right - left) * 5 / 32, (left + right) / 2])
    torch.testing.assert_close(out[:, 0], expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[0].abs().max() < 1e-6
    torch.testing.assert_close(gradient[2, 0], 4 * 1.5 * (right - left), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
def test_gradcheck_of_the_twin(dims, interpolation):
    layout = grid_layout(dims, 2, 1, 3, 3, 1.7, interpolation)
    x = points("anywhere", dims, n=3).double().requires_grad_()
    params = table(layout).double().requires_grad_()

    def encode(x, params):
        return hash_encode(x, params, layout, "torch")

    assert torch.autograd.gradcheck(encode, (x, params))
    assert torch.autograd.gradgradcheck(encode, (x, params))


# ------------------------------------------------------------------- kernels against twin
def derivatives(x, params, layout, backend, dtype):
    """Features, gradients by random cotangents, and the gradients of those gradients."""
    g = torch.Generator().manual_seed(3)
    cotangent = torch.randn(len(x), layout.n_output_dims, generator=g).to(dtype).requires_grad_()
    along, mass = torch.randn(x.shape, generator=g), torch.randn(params.shape, generator=g)
    x, params = x.to(dtype).requires_grad_(), params.to(dtype).requires_grad_()
    out = hash_encode(x, params, layout, backend)
    to_x, to_params = torch.autograd.grad(out, (x, params), cotangent, create_graph=True)
    second = torch.autograd.grad(to_x, (x, params, cotangent), along.to(dtype), retain_graph=True)
    third = torch.autograd.grad(to_params, (x, cotangent), mass.to(dtype))
    return [y.detach() for y in (out, to_x, to_params, *second, *third)]


@pytest.mark.parametrize("kind", ["anywhere", "rays", "border", "outside"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"interpolation": "Smoothstep"},
        {"n_input_dims": 2, "n_features_per_level": 1},
        {"n_features_per_level": 8, "n_levels": 2, "interpolation": "Smoothstep"},
    ],
    ids=["linear", "smoothstep", "2d", "8 features"],
)
def test_kernels_equal_the_twin(config, kind):
    layout = grid_layout(**{**SMALL, **config})
    x, params = points(kind, layout.n_input_dims), table(layout)
    ours = derivatives(x, params, layout, "cpu", torch.float32)
    theirs = derivatives(x, params, layout, "torch", torch.float64)
    assert all(y.abs().max() > 0.1 for y in theirs)
    for a, b in zip(ours, theirs):
        close(a, b)


def test_more_points_than_a_block_and_any_number_of_threads(monkeypatch):
    """Each sum has one order, whatever the number of threads: equal bit by bit."""
    from threestudio.models.hashgrid import function, kernels

    layout = grid_layout(3, 2, 1, 6, 3, 1.7)
    x, params = points("anywhere", n=kernels.BLOCK + 300), table(layout)
    monkeypatch.setattr(function, "_run", lambda kernel, workers, *args: kernel(*args))

    def run(workers):
        monkeypatch.setattr(function, "_workers", lambda work: workers)
        p, q = params.clone().requires_grad_(), x.clone().requires_grad_()
        out = hash_encode(q, p, layout, "cpu")
        return [out.detach(), *torch.autograd.grad((out**2).sum(), (q, p))]

    one = run(1)
    close(one[0], hash_encode(x, params, layout, "torch"))
    for workers in (1, 3):
        assert all(torch.equal(a, b) for a, b in zip(one, run(workers)))


def test_a_gradient_to_positions_alone_leaves_the_table_alone(monkeypatch):
    """A normal costs no pass over the table; and without it, no gradient to positions is taken."""
    from threestudio.models.hashgrid import function

    layout = grid_layout(**SMALL)
    x, params = points("anywhere").requires_grad_(), table(layout).requires_grad_()

    def refuse(*args):
        raise AssertionError("not asked for")

    for positions, leaf, other in ((x, x, "_scatter"), (x.detach(), params, "_positions")):
        out = hash_encode(positions, params, layout, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(function, other, refuse)
            (gradient,) = torch.autograd.grad(out.sum(), leaf)
        assert gradient.abs().max() > 0


def test_third_derivatives():
    layout = grid_layout(**SMALL, interpolation="Smoothstep")
    results = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        x, params = points("anywhere").to(dtype), table(layout).to(dtype)
        leaves = x, params = x.requires_grad_(), params.requires_grad_()
        out = hash_encode(x, params, layout, backend)
        (first,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((second**2).sum(), leaves))
    for a, b in zip(*results):
        close(a, b)


def test_positions_far_away_and_not_finite():
    layout = grid_layout(**SMALL)
    x = points("anywhere", n=6)
    x[0, 0], x[1, 1], x[2, 2], x[3, 0] = 1e30, float("nan"), float("inf"), -1e12
    ours, theirs = (hash_encode(x, table(layout), layout, b) for b in ("cpu", "torch"))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isfinite().all(-1).tolist() == [True, False, False, True, True, True]


# ------------------------------------------------------------------------------- module
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_points(backend):
    layout = grid_layout(**SMALL)
    x, params = torch.empty(0, 3, requires_grad=True), table(layout).requires_grad_()
    out = hash_encode(x, params, layout, backend)
    assert out.shape == (0, layout.n_output_dims)
    to_x, to_params = torch.autograd.grad(out.sum(), (x, params))
    assert to_x.shape == (0, 3) and not to_params.any()


def test_module():
    torch.manual_seed(0)
    grid = HashGrid(3, **SMALL)
    assert list(grid.state_dict()) == ["params"] and grid.n_output_dims == 8
    assert grid.params.dtype == torch.float32 and grid.params.shape == (grid.layout.n_params,)
    assert 0.9e-4 < grid.params.max() <= 1e-4 and -1e-4 <= grid.params.min() < -0.9e-4
    x = points("anywhere").double()
    out = grid(x)
    assert out.dtype == torch.float32
    close(out, hash_encode(x, grid.params, grid.layout, "torch"))
    assert torch.equal(copy.deepcopy(grid)(x), out)
    out.sum().backward()  # the weights of a point and level sum up to 1
    torch.testing.assert_close(
        grid.params.grad.sum(), torch.tensor(8.0 * len(x)), rtol=1e-4, atol=0
    )
    with pytest.raises(ValueError, match=r"\(200, 2\).*\(N, 3\)"):
        grid(x[:, :2])
    with pytest.raises(ValueError, match="params has the shape"):
        hash_encode(x, grid.params[:-1], grid.layout)


def test_the_twin_keeps_no_level_and_computes_the_same_gradients(monkeypatch):
    """Bit for bit those of one pass, second derivatives included."""
    layout = grid_layout(3, 8, 2, 10, 4, 1.5, "Smoothstep")
    generator = torch.Generator().manual_seed(0)
    params, x = (torch.rand(n, generator=generator) for n in (layout.n_params, 3 * 200))

    def bytes_and_results():
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no address is used twice
            return tensor

        own, where = params.clone().requires_grad_(), x.view(200, 3).clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = twin._hash_encode_torch(where, own, layout)
        kept.pop(own.untyped_storage()._cdata, None)
        weights = torch.linspace(-1, 1, features.numel()).view_as(features)
        first = torch.autograd.grad(features, (where, own), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (where, own))
        return sum(s.nbytes() for s in kept.values()) / 200, [features, *first, *second]

    kept, results = bytes_and_results()
    monkeypatch.setattr(twin, "checkpoint", lambda level, *args, **options: level(*args))
    kept_by_one_pass, expected = bytes_and_results()
    assert kept < 20 and kept_by_one_pass > 8 * 96  # bytes a point; 12 are its position
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


def test_backends(monkeypatch):
    cpu, cuda, single = torch.device("cpu"), torch.device("cuda"), torch.float32
    resolve = hashgrid.resolve_backend
    hashgrid.announce.cache_clear()
    lines = []
    monkeypatch.setattr(threestudio, "info", lines.append)
    assert [resolve("auto", cpu, single, 3) for _ in range(3)] == ["cpu"] * 3
    assert lines == ["hash grid: cpu"]
    assert resolve("auto", cpu, torch.float64, 3) == "torch"
    assert resolve("auto", cpu, single, 4) == "torch"
    for args, match in (
        (("cpu", cpu, torch.float64, 3), "float32 on cpu, not in torch.float64"),
        (("cpu", cuda, single, 3), "on cuda; or set backend to auto"),
        (("cpu", cpu, single, 4), "2 or 3 input dimensions"),
        (("tinycudann", cpu, single, 3), "float32 on cuda"),
        (("tinycudan", cpu, single, 3), "did you mean 'tinycudann'"),
    ):
        with pytest.raises(UserError, match=match):
            resolve(*args)
    monkeypatch.setattr(native, "missing", lambda: "not installed; pip install it")
    assert resolve("auto", cuda, single, 3) == "torch"
    with pytest.raises(UserError, match="pip install"):
        resolve("tinycudann", cuda, single, 3)
    monkeypatch.setattr(native, "missing", lambda: "")
    assert resolve("auto", cuda, single, 3) == "tinycudann"


def test_tinycudann_gets_our_config_and_parameters(monkeypatch):
    """With a stand-in for the package; that its numbers are ours needs a CUDA device."""
    seen = []

    class Encoding(torch.nn.Module):
        def __init__(self, n_input_dims, encoding_config, seed=1337, dtype=None):
            super().__init__()
            seen.append((n_input_dims, encoding_config, dtype))
            self.params = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x.sum(1, keepdim=True) * self.params[:2]

    native._module.cache_clear()
    monkeypatch.setitem(sys.modules, "tinycudann", types.SimpleNamespace(Encoding=Encoding))
    grid = HashGrid(3, **SMALL, interpolation="Smoothstep")
    x = points("anywhere")
    for _ in range(2):
        out = native.encode(x, grid.params, grid.layout)
        torch.testing.assert_close(out, x.sum(1, keepdim=True) * grid.params[:2])
    (gradient,) = torch.autograd.grad(out.sum(), grid.params)
    torch.testing.assert_close(gradient[:2], x.sum().expand(2))
    config = {
        "otype": "HashGrid",
        "n_features_per_level": 2,
        "interpolation": "Smoothstep",
        **SMALL,
    }
    assert seen == [(3, config, torch.float32)]
    native._module.cache_clear()
    assert list(grid.state_dict()) == ["params"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
def test_tinycudann_equals_the_twin(interpolation):
    if native.missing():
        pytest.skip(native.missing())
    layout = grid_layout(**SMALL, interpolation=interpolation)
    x, params = points("anywhere").cuda(), table(layout).cuda()
    results = []
    for backend in ("tinycudann", "torch"):
        leaves = [y.clone().requires_grad_() for y in (x, params)]
        out = hash_encode(*leaves, layout, backend)
        g = torch.Generator().manual_seed(3)
        cotangent = torch.randn(out.shape, generator=g).cuda()
        results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
    for a, b in zip(*results):
        close(a, b, 1e-4)
