"""The NeRF renderer: a ball of known density against closed forms, and what a system sees."""

import copy
import math

import pytest
import torch

import threestudio
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.errors import UserError

RADIUS, DISTANCE = 0.5, 2.5


class Ball(BaseImplicitGeometry):
    """Density sigma inside the radius (or falling linearly to its border, if soft), one colour."""

    def configure(self):
        super().configure()
        self.sigma = torch.nn.Parameter(torch.tensor(2.0))
        self.color = torch.nn.Parameter(torch.tensor([0.2, 0.5, 0.9]))
        self.soft = False
        self.sizes = []  # points of each call

    def forward_density(self, points):
        self.sizes.append(len(points))
        assert points.abs().max() <= 1  # encodings end at the box
        r = points.norm(dim=-1, keepdim=True) / RADIUS
        return self.sigma * ((1 - r).clamp(min=0) if self.soft else (r < 1).float())

    def forward(self, points, output_normal=False):
        out = {"density": self.forward_density(points)}
        out["features"] = self.color.expand(len(points), 3)
        if output_normal:
            out["normal"] = torch.nn.functional.normalize(points, dim=-1)
        return out


class Recorder(BaseMaterial):
    """The features as they are; remembers what it was given."""

    def forward(self, features, **kwargs):
        self.given = kwargs
        return features


def make(background=None, **cfg):
    scene = {
        "geometry": Ball({}),
        "material": Recorder({}),
        "background": threestudio.find("solid-color-background")(background),
    }
    return threestudio.find("nerf-volume-renderer")({"num_samples_per_ray": 128, **cfg}, **scene)


def make_rays(size=6, batch=1, spread=0.7):
    """Parallel rays along -x (and +x, ...), and their distances from the origin."""
    line = torch.linspace(-spread, spread, size) + 0.003
    y, z = torch.meshgrid(line, line, indexing="ij")
    origins = torch.stack([torch.full_like(y, DISTANCE), y, z], dim=-1).repeat(batch, 1, 1, 1)
    dirs = torch.tensor([-1.0, 0.0, 0.0]).expand_as(origins).clone()
    origins[1::2, ..., 0] *= -1
    dirs[1::2] *= -1
    batch = {"rays_o": origins, "rays_d": dirs, "light_positions": torch.ones(batch, 3)}
    return batch, (y**2 + z**2).sqrt()


def closed_form(impact, sigma=2.0):
    """Opacity 1 - e^-a with a = sigma chord, and the sum of w t: the integral of sigma e^-s t."""
    half = (RADIUS**2 - impact**2).clamp(min=0).sqrt()
    a, first = 2 * sigma * half, DISTANCE - half
    opacity = 1 - torch.exp(-a)
    return opacity, first * opacity + (1 - torch.exp(-a) * (1 + a)) / sigma


def test_what_was_pruned_is_not_where_nothing_is_to_be(monkeypatch):
    """A checkpoint of a run that pruned, rendered with grid_prune=false."""
    pruned = make(grid_prune=True)
    pruned.estimator.binaries[:] = False
    for prune in (True, False):
        renderer = make(grid_prune=prune)
        renderer.load_state_dict(pruned.state_dict())
        assert bool(renderer.estimator.binaries.any()) != prune


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_ball_has_the_opacity_of_its_chords(backend):
    renderer = make(grid_prune=False, num_samples_per_ray=512, backend=backend).eval()
    batch, impact = make_rays(8)
    out = renderer(**batch)
    opacity, depth = closed_form(impact)
    step = renderer.render_step_size
    assert step == 1.732 * 2 / 512 and opacity.max() > 0.8 and opacity.min() == 0
    # the chord is cut into whole steps: at most one too many or too few
    assert (out["opacity"][0, ..., 0] - opacity).abs().max() < 2 * step
    assert (out["depth"][0, ..., 0] - depth).abs().max() < 6 * step
    assert torch.equal(out["comp_rgb_bg"], torch.ones(1, 8, 8, 3))
    torch.testing.assert_close(
        out["comp_rgb_fg"], out["opacity"] * renderer.geometry.color, rtol=1e-4, atol=1e-6
    )
    assert torch.equal(out["comp_rgb"], out["comp_rgb_fg"] + (1 - out["opacity"]))
    assert (out["comp_rgb"][0, impact > RADIUS] == 1).all()


def test_half_the_step_halves_the_error():
    batch, impact = make_rays(30)
    errors = []
    for n in (64, 128):
        out = make(grid_prune=False, num_samples_per_ray=n).eval()(**batch)
        error = (out["opacity"].detach()[0, ..., 0] - closed_form(impact)[0]).abs()
        errors.append(float(error[impact < RADIUS].mean()))
    assert errors[0] > 1e-3 and 0.35 < errors[1] / errors[0] < 0.65


def test_pruning_saves_samples_and_keeps_the_image():
    torch.manual_seed(0)
    batch, _ = make_rays(8)
    images, samples = [], []
    for prune in (False, True):
        renderer = make(grid_prune=prune, randomized=False)
        renderer.geometry.soft = True
        for step in range(0, 64, 16):
            renderer.update_step(0, step)
        out = renderer(**batch)
        images.append(out["comp_rgb"])
        samples.append(len(out["ray_indices"]))
    assert 0 < samples[1] < 0.5 * samples[0] and images[0].min() < 0.8
    torch.testing.assert_close(*images, atol=0.02, rtol=0)


def test_importance_samples_give_the_same_ball():
    cfg = {"estimator": "importance", "num_samples_per_ray_importance": 128}
    renderer = make(**cfg)
    assert set(renderer.state_dict()) == {"bbox"}
    batch, impact = make_rays(8)
    opacity, depth = closed_form(impact)
    for out in (renderer(**batch), renderer.eval()(**batch)):
        assert (out["opacity"][0, ..., 0] - opacity).abs().max() < 0.04
        assert (out["depth"][0, ..., 0] - depth).abs().max() < 0.1


# --- what a system sees -------------------------------------------------------------------------

IMAGES = {"comp_rgb", "comp_rgb_fg", "comp_rgb_bg", "opacity", "depth", "z_variance"}


def test_outputs_while_training_and_in_evaluation():
    renderer = make(grid_prune=False)
    batch, _ = make_rays(4, batch=2)
    out = renderer(**batch)
    per_sample = {
        "weights": (1,), "t_points": (1,), "t_intervals": (1,), "t_dirs": (3,), "points": (3,),
        "ray_indices": (), "density": (1,), "features": (3,),
    }  # fmt: skip
    assert set(out) == IMAGES | set(per_sample)
    n = len(out["ray_indices"])
    for name, shape in per_sample.items():
        assert out[name].shape == (n, *shape)
    points = batch["rays_o"].view(-1, 3)[out["ray_indices"]] + out["t_points"] * out["t_dirs"]
    torch.testing.assert_close(out["points"], points, atol=1e-6, rtol=0)
    opacity = torch.zeros(32, 1).index_add(0, out["ray_indices"], out["weights"])
    torch.testing.assert_close(out["opacity"].view(32, 1), opacity)
    out["comp_rgb"].sum().backward()
    assert renderer.geometry.sigma.grad != 0 and renderer.geometry.color.grad.abs().min() > 0
    evaluated = renderer.eval()(**batch)
    assert set(evaluated) == IMAGES
    for name in IMAGES:
        channels = 3 if name.startswith("comp") else 1
        assert evaluated[name].shape == (2, 4, 4, channels) == out[name].shape


def test_normals_are_drawn_when_the_material_needs_them():
    renderer = make(grid_prune=False, return_comp_normal=True, return_normal_perturb=True)
    renderer.material.requires_normal = True
    renderer.geometry.sigma.data.fill_(1000.0)
    batch, impact = make_rays(5, spread=0.3)
    out = renderer(**batch)
    assert out["normal_perturb"].shape == out["normal"].shape == out["points"].shape
    for image in (out["comp_normal"], renderer.eval()(**batch)["comp_normal"]):
        hit = batch["rays_o"][0].clone()  # on the front of the ball
        hit[..., 0] = (RADIUS**2 - impact**2).sqrt()
        expected = 0.5 * (hit / RADIUS + 1)
        torch.testing.assert_close(image[0], expected, atol=0.05, rtol=0)
    plain = make(grid_prune=False)
    plain.material.requires_normal = True
    assert "comp_normal" not in plain(**batch) and "comp_normal" in plain.eval()(**batch)


def test_the_batch_reaches_the_material_in_both_modes():
    renderer = make(grid_prune=False)
    batch, _ = make_rays(3, batch=2)
    batch["light_positions"] = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    for _ in range(2):
        out = renderer(**batch, elevation="high")
        given = renderer.material.given
        assert given["elevation"] == "high"
        if renderer.training:
            image = out["ray_indices"] // 9
            assert torch.equal(given["light_positions"], batch["light_positions"][image])
            assert torch.equal(given["positions"], out["points"])
            assert torch.equal(given["viewdirs"], out["t_dirs"])
        renderer.eval()


def test_background_colours_replace_the_background():
    renderer = make(grid_prune=False).eval()
    batch, impact = make_rays(4, batch=2)
    color = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    out = renderer(**batch, bg_color=color)
    assert torch.equal(out["comp_rgb_bg"], torch.ones(2, 4, 4, 3))
    for image, c in zip(out["comp_rgb"], color):
        assert (image[impact > RADIUS] == c).all()
    pixels = color[:, None, None].expand(2, 4, 4, 3)
    assert torch.equal(renderer(**batch, bg_color=pixels)["comp_rgb"], out["comp_rgb"])


@pytest.mark.parametrize("chunk", [7, 160000])
def test_evaluation_in_pieces_is_evaluation_in_one_piece(chunk):
    batch, _ = make_rays(4, batch=2)
    outs = []
    for size in (0, chunk):
        renderer = make(grid_prune=False, eval_chunk_size=size).eval()
        renderer.material.requires_normal = True
        outs.append(renderer(**batch))
    assert "comp_normal" in outs[1]
    for name, image in outs[0].items():
        assert torch.equal(image, outs[1][name])
    if chunk == 7:
        assert max(renderer.geometry.sizes) == 7


def test_jitter_is_for_training():
    batch, _ = make_rays(4)
    renderer = make(grid_prune=False)
    assert renderer.randomized
    assert not torch.equal(renderer(**batch)["depth"], renderer(**batch)["depth"])
    assert not renderer.eval().randomized
    assert torch.equal(renderer(**batch)["depth"], renderer(**batch)["depth"])
    assert renderer.train().randomized
    renderer.eval()
    for module in renderer.modules():  # as Lightning does after a validation
        module.training = True
    assert renderer.randomized
    assert not make(randomized=False).train().randomized
    renderer.randomized = False  # as subclasses for upstream do
    assert not renderer.randomized


# --- empty scenes, z variance -------------------------------------------------------------------


def test_an_empty_scene_is_background_that_backward_can_walk_through(monkeypatch):
    lines = []
    monkeypatch.setattr(threestudio, "warn", lines.append)
    renderer = make({"learned": True, "color": [0.1, 0.2, 0.3]})
    batch, _ = make_rays(4)
    for _ in range(2):
        out = renderer(**batch)
        assert torch.equal(out["comp_rgb"], out["comp_rgb_bg"]) and (out["opacity"] == 0).all()
        (out["comp_rgb"].sum() + out["z_variance"].sum() + out["opacity"].sum()).backward()
    assert renderer.geometry.sigma.grad == 0 and (renderer.geometry.color.grad == 0).all()
    assert torch.equal(renderer.background.env_color.grad, torch.full((3,), 32.0))
    assert len(lines) == 1 and "grid is empty" in lines[0]
    with torch.no_grad():
        assert torch.equal(renderer.eval()(**batch)["comp_rgb"], out["comp_rgb_bg"])


def test_rays_that_miss_the_box_are_background():
    for cfg in ({"grid_prune": False}, {"estimator": "importance"}):
        batch, _ = make_rays(4)
        batch["rays_d"] = -batch["rays_d"]
        out = make(**cfg)(**batch)
        assert (out["comp_rgb"] == 1).all() and (out["opacity"] == 0).all()
        out["comp_rgb"].sum().backward()


def test_z_variance_is_that_of_where_light_is_stopped():
    """Along a chord l the density of t is proportional to e^(-sigma t)."""
    renderer = make(grid_prune=False, num_samples_per_ray=512).eval()
    batch, impact = make_rays(8)
    out = renderer(**batch)
    opacity, variance = (out[k].detach()[0, ..., 0] for k in ("opacity", "z_variance"))
    assert 0 < (opacity > 0.5).sum() < 64 and (opacity == 0).any()
    assert (variance[opacity <= 0.5] == 0).all()
    for b, got in zip(impact[opacity > 0.5], variance[opacity > 0.5]):
        chord = 2 * math.sqrt(RADIUS**2 - float(b) ** 2)
        t = torch.linspace(0, chord, 1001)
        p = torch.exp(-2 * t) / torch.exp(-2 * t).sum()
        expected = (p * (t - (p * t).sum()) ** 2).sum()
        assert float(got) == pytest.approx(float(expected), rel=0.08)


def test_z_variance_has_finite_gradients_where_there_is_next_to_nothing():
    renderer = make(grid_prune=False)
    renderer.geometry.sigma.data.fill_(1e-9)
    batch, _ = make_rays(4)
    out = renderer(**batch)
    out["z_variance"].sum().backward()
    assert (out["z_variance"] == 0).all() and torch.isfinite(renderer.geometry.sigma.grad)


# --- state --------------------------------------------------------------------------------------


def test_checkpoint_keys_are_upstreams():
    state = make().state_dict()
    grid = {f"estimator.{k}" for k in ("resolution", "aabbs", "occs", "binaries")}
    assert set(state) == {"bbox"} | grid
    assert state["estimator.binaries"].shape == (1, 32, 32, 32)
    assert state["estimator.aabbs"].tolist() == [[-1, -1, -1, 1, 1, 1]]
    assert make(radius=2.0).state_dict()["estimator.aabbs"].max() == 2


def test_the_grid_is_updated_while_training_only():
    renderer = make()
    grid = renderer.estimator

    def touched(step, **kwargs):
        before = grid.occs.clone()
        grid.occs.zero_()
        renderer.do_update_step(0, step, **kwargs)
        changed = bool(grid.occs.any())
        grid.occs.copy_(before)
        return changed

    assert touched(0) and touched(16) and not touched(17)
    assert not touched(0, on_load_weights=True)
    renderer.eval()
    assert not touched(0)
    renderer.train()
    renderer.do_update_step(0, 0)
    # density * step, and so occupied
    assert grid.occs.max() == pytest.approx(2 * renderer.render_step_size)
    centre = grid.binaries[0, 12:20, 12:20, 12:20]
    assert centre.all() and not grid.binaries[0, 0].any()
    full = make(grid_prune=False)
    full.do_update_step(0, 0)
    assert full.estimator.binaries.all()


def test_a_resumed_renderer_goes_on_alike():
    torch.manual_seed(0)
    first, second = make(), make()
    batch, _ = make_rays(4)
    first.do_update_step(0, 0)
    first.do_update_step(0, 256)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    outs = []
    for renderer in (first, second):
        torch.manual_seed(1)
        renderer.do_update_step(0, 272)
        outs.append(renderer(**batch))
    assert len(outs[0]["ray_indices"]) > 10
    assert torch.equal(first.estimator.occs, second.estimator.occs)
    for name in outs[0]:
        assert torch.equal(outs[0][name], outs[1][name])


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({"estimator": "proposal"}, "use occgrid, or importance"),
        ({"estimator": "occ-grid"}, "did you mean 'occgrid'"),
        ({"backend": "nerfac"}, "did you mean 'nerfacc'"),
    ],
)
def test_mistakes_are_one_sentence(cfg, expected):
    with pytest.raises(UserError, match=expected):
        make(**cfg)
