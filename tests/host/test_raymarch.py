"""Ray marching: samples against brute force, weights against closed forms, kernels against twin."""

import math

import pytest
import torch

from threestudio.models.raymarch import (
    OccupancyGrid,
    accumulate_along_rays,
    importance_sampling,
    march,
    march_torch,
    render_weights,
    resolve_backend,
)

BOX = torch.tensor([-1.0, -1.2, -0.8, 1.0, 0.9, 1.1])
STEP = 0.03
both = pytest.mark.parametrize("backend", ["cpu", "torch"])


def make_rays(n=40, seed=0):
    """Rays from outside (one in three misses the box) and from inside, unit and not; the last
    three: along an axis, without a direction, and not a number."""
    g = torch.Generator().manual_seed(seed)
    origins = torch.randn(n, 3, generator=g)
    origins *= torch.where(torch.arange(n) % 4 == 0, 0.2, 2.5)[:, None] / origins.norm(
        dim=-1, keepdim=True
    )
    targets = (torch.rand(n, 3, generator=g) * 2 - 1) * (1 + torch.arange(n) % 3)[:, None]
    dirs = targets - origins
    dirs[::2] /= dirs[::2].norm(dim=-1, keepdim=True)
    origins[-3], dirs[-3] = torch.tensor([-2.0, 0.1, 0.1]), torch.tensor([1.0, 0.0, 0.0])
    dirs[-2], dirs[-1] = 0, math.nan
    return origins, dirs, 0.01 * torch.rand(n, generator=g)


def random_cells(share, seed=0):
    return torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(seed)) < share


def brute_force(rays_o, rays_d, occupied, starts, far, steps=400):
    """In double: (ray, k) of the midpoints in occupied cells, and of those on a cell's face, where
    rounding decides."""
    taken, doubtful = set(), set()
    size = torch.tensor(occupied.shape)
    low, high = BOX[:3].double(), BOX[3:].double()
    for r in range(len(rays_o)):
        t = starts[r].double() + (torch.arange(steps) + 0.5) * STEP
        cell = (rays_o[r].double() + t[:, None] * rays_d[r].double() - low) / (high - low) * size
        inside = ((cell >= 0) & (cell < size)).all(-1) & (t <= far)
        x, y, z = cell.where(inside[:, None], 0.0).floor().long().unbind(-1)
        near = ((cell - cell.round()).abs() < 1e-4).any(-1) & (rays_d[r] != 0).any()
        taken |= {(r, int(k)) for k in (inside & occupied[x, y, z]).nonzero()}
        doubtful |= {(r, int(k)) for k in near.nonzero()}
    return taken, doubtful


@both
@pytest.mark.parametrize(("share", "far"), [(2.0, 1e10), (0.4, 1e10), (0.4, 2.1)])
def test_the_samples_are_the_steps_with_their_middle_in_an_occupied_cell(backend, share, far):
    """Share 2: all cells are occupied, and the samples are the constant steps in the box."""
    rays_o, rays_d, starts = make_rays()
    occupied = random_cells(share)
    rays, t0, t1 = march.traverse(rays_o, rays_d, occupied, BOX, starts, far, STEP, backend)
    torch.testing.assert_close(t1 - t0, torch.full_like(t0, STEP), atol=1e-5, rtol=0)
    place = (t0 - starts[rays]) / STEP
    assert (place - place.round()).abs().max() < 1e-3
    order = rays * 1000 + place.round()
    assert (order.diff() > 0).all()  # packed: by ray, then by distance
    found = {(int(r), round(float(k))) for r, k in zip(rays, place)}
    taken, doubtful = brute_force(rays_o, rays_d, occupied, starts, far)
    assert len(taken) > 150 and len(doubtful) < 60
    assert found - doubtful == taken - doubtful
    missed = set(range(len(rays_o))) - {r for r, _ in taken}
    assert {38, 39} <= missed and len(missed) > 5  # among them: no direction, not a number


@pytest.mark.parametrize("seed", [1, 2])
def test_kernel_and_twin_take_the_same_samples(monkeypatch, seed):
    rays_o, rays_d, starts = make_rays(200, seed)
    arguments = rays_o, rays_d, random_cells(0.3, seed), BOX, starts, 2.5, 0.011
    compiled = march.traverse(*arguments, backend="cpu")
    twin = march.traverse(*arguments, backend="torch")
    monkeypatch.setattr(march_torch, "PIECE", 5000)  # a few rays at a time
    pieces = march.traverse(*arguments, backend="torch")
    assert len(twin[0]) > 1000
    for a, b, c in zip(compiled, twin, pieces):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_empty_space_costs_neither_time_nor_memory():
    """A mask over rays and steps would have ten billion entries."""
    rays_o, rays_d, starts = make_rays(1000)
    empty = torch.zeros(4, 5, 6, dtype=torch.bool)
    rays, _, _ = march.traverse(rays_o, rays_d, empty, BOX, starts, 1e10, 3e-7, "cpu")
    assert len(rays) == 0


@both
def test_no_rays(backend):
    none = torch.zeros(0, 3)
    samples = march.traverse(none, none, random_cells(1), BOX, none[:, 0], 1e10, STEP, backend)
    assert [len(x) for x in samples] == [0, 0, 0]


# --- weights and sums ---------------------------------------------------------------------------

COUNTS = [0, 3, 1, 0, 5, 40, 0]


def make_samples(dtype=torch.float32, scale=8.0):
    g = torch.Generator().manual_seed(0)
    rays = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    t0 = torch.rand(len(rays), generator=g, dtype=torch.float64).to(dtype)
    t1 = t0 + 0.3 * torch.rand(len(rays), generator=g, dtype=torch.float64).to(dtype)
    sigmas = scale * torch.rand(len(rays), generator=g, dtype=torch.float64).to(dtype)
    return sigmas, t0, t1, rays, len(COUNTS)


@both
def test_weights_are_the_light_that_arrives_times_what_is_stopped(backend):
    sigmas, t0, t1, rays, n = make_samples()
    weights, trans, alphas = render_weights(sigmas, t0, t1, rays, n, backend)
    at = 0
    for count in COUNTS:
        left = 1.0
        for i in range(at, at + count):
            passed = math.exp(-float(sigmas[i]) * (float(t1[i]) - float(t0[i])))
            got = [float(x[i]) for x in (weights, trans, alphas)]
            assert got == pytest.approx([left * (1 - passed), left, 1 - passed], rel=2e-5, abs=1e-9)
            left *= passed
        at += count
    opacity = accumulate_along_rays(weights, None, rays, n, backend)
    depths = torch.zeros(n).index_add(0, rays, sigmas * (t1 - t0))
    torch.testing.assert_close(opacity[:, 0], 1 - torch.exp(-depths))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_kernel_and_twin_agree_forward_and_backward(scale):
    sigmas, t0, t1, rays, n = make_samples(scale=scale)
    g = torch.Generator().manual_seed(1)
    values = torch.rand(len(rays), 3, generator=g)
    cotangents = [torch.randn(len(rays), generator=g) for _ in range(3)]
    cotangents.append(torch.randn(n, 3, generator=g))
    results = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        s, v = (x.to(dtype).requires_grad_() for x in (sigmas, values))
        out = render_weights(s, t0.to(dtype), t1.to(dtype), rays, n, backend)
        image = accumulate_along_rays(out[0], v, rays, n, backend)
        grads = torch.autograd.grad((*out, image), (s, v), [c.to(dtype) for c in cotangents])
        results.append([x.double() for x in (*out, image, *grads)])
    for compiled, twin in zip(*results):
        assert twin.abs().max() > 0.05
        torch.testing.assert_close(compiled, twin, rtol=2e-5, atol=2e-6)


def test_one_gradient_may_be_unwanted():
    sigmas, _, _, rays, n = make_samples()
    values = torch.rand(len(rays), 2)
    for wanted in range(2):
        inputs = [sigmas.clone(), values.clone()]
        inputs[wanted].requires_grad_()
        out = [accumulate_along_rays(*inputs, rays, n, name) for name in ("cpu", "torch")]
        grads = [torch.autograd.grad(x.square().sum(), inputs[wanted])[0] for x in out]
        torch.testing.assert_close(*grads)


def test_gradients_of_the_twin():
    sigmas, t0, t1, rays, n = make_samples(torch.float64)
    values = torch.rand(len(rays), 2, dtype=torch.float64, requires_grad=True)
    sigmas.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: march_torch.render_weights(s, t0, t1, rays, n), (sigmas,)
    )
    assert torch.autograd.gradcheck(
        lambda w, v: march_torch.accumulate(w, v, rays, n), (sigmas, values)
    )


@both
def test_a_solid_ray_does_not_disturb_the_others(backend):
    sigmas, t0, t1, rays, n = make_samples()
    expected = render_weights(sigmas, t0, t1, rays, n, backend)
    solid = torch.where(rays == 4, torch.tensor(1e30), sigmas).requires_grad_()
    got = render_weights(solid, t0, t1, rays, n, backend)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a[rays != 4], b[rays != 4])
    torch.testing.assert_close(got[0][rays == 4], torch.tensor([1.0, 0, 0, 0, 0]))
    (grad,) = torch.autograd.grad(got[0].square().sum(), solid)
    assert torch.isfinite(grad).all() and (grad[rays == 4] == 0).all()


@both
def test_small_floats_are_widened(backend):
    sigmas, t0, t1, rays, n = make_samples()
    weights, _, _ = render_weights(sigmas.bfloat16(), t0, t1, rays, n, backend)
    expected, _, _ = render_weights(sigmas.bfloat16().float(), t0, t1, rays, n, backend)
    assert weights.dtype == torch.float32 and torch.equal(weights, expected)
    image = accumulate_along_rays(weights, torch.ones(len(rays), 1).half(), rays, n, backend)
    assert image.dtype == torch.float32


# --- the grid -----------------------------------------------------------------------------------


def full_grid(resolution=(4, 5, 6)):
    grid = OccupancyGrid(BOX, resolution)
    grid.fill()
    return grid


def test_buffers_are_those_of_nerfacc():
    grid = OccupancyGrid(BOX, (4, 5, 6))
    state = grid.state_dict()
    assert {k: (tuple(v.shape), v.dtype) for k, v in state.items()} == {
        "resolution": ((3,), torch.int32),
        "aabbs": ((1, 6), torch.float32),
        "occs": ((120,), torch.float32),
        "binaries": ((1, 4, 5, 6), torch.bool),
    }
    assert state["resolution"].tolist() == [4, 5, 6] and torch.equal(state["aabbs"][0], BOX)
    assert not state["binaries"].any()
    assert OccupancyGrid(BOX, 8).binaries.shape == (1, 8, 8, 8)


@both
def test_what_cannot_be_seen_is_dropped_and_not_even_looked_up(backend):
    """alpha = 1 - exp(-1.5) everywhere: sample i meets exp(-1.5 i) >= 1e-4 for i <= 6."""
    rays_o, rays_d, _ = make_rays()
    looked_up = []

    def sigma_fn(t0, t1, rays):
        looked_up.append(len(rays))
        return 50 + 0 * t0

    options = {"render_step_size": STEP, "backend": backend}
    everything, _, _ = full_grid().sampling(rays_o, rays_d, **options)
    seen, _, _ = full_grid().sampling(rays_o, rays_d, sigma_fn, **options)
    count = torch.bincount(everything, minlength=40)
    assert count.max() > 60
    assert torch.equal(torch.bincount(seen, minlength=40), count.clamp(max=7))
    assert looked_up == [int(count.clamp(max=32).sum())]
    looked_up.clear()  # without early stop: all, in rounds
    kept, _, _ = full_grid().sampling(rays_o, rays_d, sigma_fn, early_stop_eps=0.0, **options)
    assert torch.equal(kept, everything) and sum(looked_up) == len(everything)


def test_the_alpha_threshold_is_at_most_the_mean_occupancy():
    rays_o, rays_d, _ = make_rays()
    grid = full_grid()

    def kept(alpha, mean):
        grid.occs.fill_(mean)
        sigma = -math.log(1 - alpha) / STEP
        samples = grid.sampling(
            rays_o, rays_d, lambda t0, t1, rays: sigma + 0 * t0, early_stop_eps=0.0,
            render_step_size=STEP, alpha_thre=0.01,
        )  # fmt: skip
        return len(samples[0])

    everything = kept(0.02, 1.0)
    assert everything > 400
    assert kept(0.005, 1.0) == 0
    assert kept(0.005, 0.001) == everything
    assert kept(0.0005, 0.001) == 0


def test_pruning_changes_no_ray_by_more_than_what_it_drops():
    """Samples of alpha < a that are dropped lower an opacity by less than their number times a;
    those behind T < 1e-4 by less than 1e-4."""
    rays_o, rays_d, _ = make_rays(100)
    rays_o, rays_d = rays_o[:97], rays_d[:97]

    def sigma_fn(t0, t1, rays):
        x = rays_o[rays] + 0.5 * (t0 + t1)[:, None] * rays_d[rays]
        return 30 * torch.sin(9 * x).prod(-1).clamp(min=0)

    def opacity(rays, t0, t1):
        weights, _, _ = render_weights(sigma_fn(t0, t1, rays), t0, t1, rays, 97)
        return accumulate_along_rays(weights, None, rays, 97)[:, 0]

    grid = full_grid()
    everything = grid.sampling(rays_o, rays_d, render_step_size=STEP)
    fewer = grid.sampling(rays_o, rays_d, sigma_fn, render_step_size=STEP, alpha_thre=0.01)
    counts = [torch.bincount(x[0], minlength=97) for x in (everything, fewer)]
    lost = opacity(*everything) - opacity(*fewer)
    assert len(fewer[0]) < 0.7 * len(everything[0]) and opacity(*fewer).max() > 0.5
    assert (lost >= -1e-5).all()
    assert (lost <= 1e-4 + 0.01 * (counts[0] - counts[1])).all()


def test_a_density_that_is_not_a_number_is_not_swept_under_the_carpet():
    grid = OccupancyGrid(BOX, 4)
    grid.update_every_n_steps(0, lambda x: torch.full((len(x), 1), math.nan))
    assert grid.binaries.all()
    rays_o, rays_d, _ = make_rays()
    samples = grid.sampling(
        rays_o, rays_d, lambda t0, t1, rays: t0 * math.nan, render_step_size=STEP, alpha_thre=0.01
    )
    assert len(samples[0]) > 400


def test_stratified_samples_are_shifted_together_by_less_than_a_step():
    rays_o, rays_d, _ = make_rays()
    plain = full_grid().sampling(rays_o, rays_d, render_step_size=STEP, near_plane=0.5)
    torch.manual_seed(0)
    rays, t0, _ = full_grid().sampling(
        rays_o, rays_d, render_step_size=STEP, near_plane=0.5, stratified=True
    )
    assert plain[1].min() >= 0.5 and t0.min() >= 0.5
    place = (plain[1] - 0.5) / STEP
    assert (place - place.round()).abs().max() < 1e-3
    shift = ((t0 - 0.5) / STEP) % 1
    for r in rays.unique():
        own = torch.exp(2j * math.pi * shift[rays == r])  # on a circle: 0.999 is next to 0
        assert (own - own[0]).abs().max() < 0.02
    assert shift.min() < 0.2 and shift.max() > 0.8


# --- updates ------------------------------------------------------------------------------------

CUBE = torch.tensor([-1.0, -1, -1, 1, 1, 1])


def ball(x, radius=0.6):
    return (x.norm(dim=-1, keepdim=True) < radius).float()


def corner_distances(resolution):
    """Distance from the origin to the nearest and to the farthest point of each cell."""
    edges = torch.linspace(-1, 1, resolution + 1)
    low = torch.cartesian_prod(*[edges[:-1]] * 3)
    high = low + 2 / resolution
    nearest = torch.zeros(3).clamp(low, high).norm(dim=-1)
    farthest = torch.maximum(low.abs(), high.abs()).norm(dim=-1)
    return nearest, farthest


def test_updates_converge_to_the_cells_of_a_ball():
    torch.manual_seed(0)
    grid = OccupancyGrid(CUBE, 8)
    nearest, farthest = corner_distances(8)
    for step in range(0, 256, 16):
        grid.update_every_n_steps(step, ball)
        occupied = grid.binaries.flatten()
        assert occupied[farthest < 0.6].all() and not occupied[nearest > 0.6].any()
    for step in range(256, 4096, 16):
        grid.update_every_n_steps(step, ball)
    occupied = grid.binaries.flatten()
    assert occupied[farthest < 0.6].all() and not occupied[nearest > 0.6].any()
    # of a cell that the sphere cuts, what is inside is found in the end
    assert occupied[nearest < 0.5].all()


def test_an_update_is_due_every_16_steps_and_looks_at_each_cell_once():
    torch.manual_seed(0)
    grid = OccupancyGrid(CUBE, 8)
    seen = []

    def look(x):
        index = ((x + 1) / 2 * 8).floor().long()
        seen.append(index[:, 0] * 64 + index[:, 1] * 8 + index[:, 2])
        return ball(x)

    for step in range(1, 16):
        grid.update_every_n_steps(step, look)
    assert not seen
    grid.update_every_n_steps(240, look)
    assert torch.equal(seen[-1], torch.arange(512))  # each point in its own cell
    occupied = grid.binaries.flatten().nonzero()[:, 0]
    assert 20 < len(occupied) < 128
    grid.update_every_n_steps(256, look)
    assert len(seen[-1].unique()) == len(seen[-1]) <= 128 + len(occupied)
    assert set(occupied.tolist()) < set(seen[-1].tolist())
    grid.fill()
    grid.update_every_n_steps(512, look)
    assert 128 < len(seen[-1].unique()) == len(seen[-1]) <= 256


def test_occupancy_is_a_decaying_maximum_and_its_threshold_at_most_the_mean():
    grid = OccupancyGrid(CUBE, 4)
    grid.update_every_n_steps(0, lambda x: torch.where(x[:, :1] < 0, 0.005, 0.001))
    assert grid.binaries[0, :2].all() and not grid.binaries[0, 2:].any()  # above 0.003, the mean
    grid.update_every_n_steps(0, lambda x: torch.full((len(x), 1), 0.02))
    assert grid.binaries.all()  # the threshold is 0.01
    for _ in range(3):
        grid.update_every_n_steps(0, lambda x: torch.zeros(len(x), 1))
    torch.testing.assert_close(grid.occs, torch.full((64,), 0.02 * 0.95**3))


def test_an_update_after_a_resume_is_the_same_update():
    torch.manual_seed(0)
    grid, resumed = OccupancyGrid(CUBE, 8), OccupancyGrid(CUBE, 8)
    for step in (0, 16, 256):
        grid.update_every_n_steps(step, ball)
    resumed.load_state_dict(grid.state_dict())
    before = grid.occs.clone()
    for g in (grid, resumed):
        torch.manual_seed(1)
        g.update_every_n_steps(272, ball)
    assert not torch.equal(grid.occs, before)
    assert torch.equal(grid.occs, resumed.occs) and torch.equal(grid.binaries, resumed.binaries)


# --- importance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [False, True])
def test_importance_samples_cover_the_ray_and_crowd_where_the_density_is(stratified):
    rays_o = torch.tensor([[-2.0, 0.1, 0.1], [-2.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    rays_d = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])

    def sigma_fn(t0, t1, rays):  # a slab about x = 0.5, which the third ray does not meet
        x = rays_o[rays, 0] + 0.5 * (t0 + t1) * rays_d[rays, 0]
        return 20.0 * ((x - 0.5).abs() < 0.1)

    torch.manual_seed(0)
    rays, t0, t1 = importance_sampling(
        rays_o, rays_d, BOX, sigma_fn, n_coarse=40, n_fine=100, stratified=stratified
    )
    assert rays.tolist() == [0] * 100 + [2] * 100
    for start, first, last in ((0, 1.0, 3.0), (100, 0.0, 1.0)):
        own0, own1 = t0[start : start + 100], t1[start : start + 100]
        torch.testing.assert_close(own0[0], torch.tensor(first), atol=1e-5, rtol=0)
        torch.testing.assert_close(own1[-1], torch.tensor(last), atol=1e-5, rtol=0)
        assert torch.equal(own0[1:], own1[:-1]) and (own1 >= own0).all()
    assert ((t0[:100] > 2.3) & (t1[:100] < 2.7)).sum() > 90
    torch.testing.assert_close(  # without density: evenly
        t1[100:] - t0[100:], torch.full((100,), 0.01), atol=0.0101 if stratified else 1e-5, rtol=0
    )
    weights, _, _ = render_weights(sigma_fn(t0, t1, rays), t0, t1, rays, 3)
    opacity = accumulate_along_rays(weights, None, rays, 3)
    torch.testing.assert_close(
        opacity[:, 0], torch.tensor([1 - math.exp(-4), 0, 0]), atol=0.01, rtol=0
    )


# --- backends -----------------------------------------------------------------------------------


def test_the_backend_follows_device_and_dtype(monkeypatch):
    from threestudio.models.raymarch import march_nerfacc

    lines, warnings = [], []
    monkeypatch.setattr(march.threestudio, "info", lines.append)
    monkeypatch.setattr(march.threestudio, "warn", warnings.append)
    monkeypatch.setattr(march_nerfacc, "_not_loaded", lambda: "not built")
    march.announce.cache_clear()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_backend("auto", cpu, torch.float32) == "cpu"
    assert resolve_backend("auto", cpu, torch.float64) == "torch"
    assert resolve_backend("torch", cpu, torch.float32) == "torch"
    assert lines == ["Ray marching: cpu", "Ray marching: torch"]  # each once
    assert resolve_backend("auto", cuda, torch.float32) == "torch"
    (line,) = warnings
    assert line.startswith("Ray marching: torch (nerfacc: not built)") and not lines[2:]
    for mistake, remedy in (
        (("cuda", cpu, torch.float32), "choose from"),
        (("cpu", cpu, torch.float64), "use 'torch'"),
        (("nerfacc", cpu, torch.float32), "use backend='auto'"),
        (("nerfacc", cuda, torch.float32), "not built"),
    ):
        with pytest.raises(ValueError, match=remedy):
            resolve_backend(*mistake)
    monkeypatch.setattr(march_nerfacc, "_not_loaded", lambda: "")
    assert resolve_backend("auto", cuda, torch.float32) == "nerfacc"
    assert resolve_backend("auto", cuda, torch.float64) == "torch"
    march.announce.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "nerfacc"])
def test_cuda_agrees_with_the_cpu(backend):
    device = torch.device("cuda")
    try:
        resolve_backend(backend, device, torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    rays_o, rays_d, starts = make_rays(97)
    rays_o, rays_d, starts = rays_o[:94], rays_d[:94], starts[:94]
    rays_d = torch.nn.functional.normalize(rays_d, dim=-1)
    arguments = rays_o, rays_d, random_cells(0.4), BOX, starts
    expected = march.traverse(*arguments, 1e10, STEP, "cpu")
    on_device = [x.to(device) for x in arguments]
    got = march.traverse(*on_device, 1e10, STEP, backend)
    counts = [torch.bincount(x[0].cpu(), minlength=94) for x in (expected, got)]
    # rounding decides for midpoints on faces of cells
    assert (counts[0] - counts[1]).abs().sum() <= 0.01 * len(expected[0])
    sigmas, t0, t1, rays, n = make_samples()
    results = []
    for name, where in (("cpu", torch.device("cpu")), (backend, device)):
        s = sigmas.detach().to(where).requires_grad_()
        weights, _, _ = render_weights(s, t0.to(where), t1.to(where), rays.to(where), n, name)
        values = torch.arange(3.0, device=where).expand(len(s), 3)
        image = accumulate_along_rays(weights, values, rays.to(where), n, name)
        (grad,) = torch.autograd.grad(image.square().sum(), s)
        results.append([x.detach().cpu() for x in (weights, image, grad)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
