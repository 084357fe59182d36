"""Gaussians that are edited: what is locked stays, the source is drawn as it was, anchors hold."""

from pathlib import Path

import pytest
import torch
from lods.edits.trace import traced
from lods.gaussians import Gaussians as Plain
from lods.gaussians.densify import Densifier
from lods.gaussians.edited import in_box
from lods.gaussians.ply import read_ply

import threestudio
from tests.gaussians.clouds import cameras, make_renderer, optimizer_for
from tests.runs import ROOT, fit, launch, read, same, small_run, two_and_two
from threestudio.utils.errors import UserError

BOX = [-1.0, -1.0, 0.0, 1.0, 1.0, 1.0]  # the upper half
NAMES = ("means", "scales", "quats", "opacities", "sh0", "shN")
GROW = {"refine_start_iter": 0, "refine_every": 1, "refine_stop_iter": 99}
STRATEGIES = {
    "none": {},
    "default": {**GROW, "grow_grad2d": 1e-9, "refine_scale2d_stop_iter": 0},
    "mcmc": {**GROW, "min_opacity": 0.09},
}


@pytest.fixture(scope="module")
def ply(tmp_path_factory):
    """``ply(degree)``: a file of 60 Gaussians."""

    def make(degree=0):
        path = tmp_path_factory.mktemp("ply") / "object.ply"
        generator = torch.Generator().manual_seed(1)
        tensors = {
            "means": torch.rand(60, 3, generator=generator) - 0.5,
            "scales": torch.randn(60, 3, generator=generator) * 0.2 - 2.5,
            "quats": torch.randn(60, 4, generator=generator),
            "opacities": torch.randn(60, generator=generator),
            "sh0": torch.randn(60, 1, 3, generator=generator),
        }
        if degree:
            count = (degree + 1) ** 2 - 1
            tensors["shN"] = torch.randn(60, count, 3, generator=generator) * 0.1
        Plain(tensors).write_ply(path)
        return path

    return make


def geometry_of(path, degree=0, **fields):
    config = {"init_type": "file", "file": {"path": str(path)}, "sh_degree": degree, **fields}
    return threestudio.find("lods-edited-gaussians")(config)


def train(geometry, strategy, n=6, still=""):
    """Steps towards a random picture, with anchors for the loss; the parameter ``still`` stays as
    it is."""
    densifier = Densifier(strategy, STRATEGIES[strategy], 3.0)
    densifier.begin(geometry.count, n)
    optimizer, renderer, batch = optimizer_for(geometry), make_renderer(geometry), cameras([0, 100])
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["name"] == f"geometry.{still}" else 0.02
    target = torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))
    for step in range(n):
        out = renderer(**batch)
        densifier.before_backward(out["info"])
        optimizer.zero_grad()
        held = sum(geometry.anchor_losses().values())
        (((out["comp_rgb"] - target) ** 2).sum() + held).backward()
        optimizer.step()
        geometry.limit_scales()
        densifier.after_step(geometry, optimizer, step, geometry.own_info(out["info"]))
    geometry.limit_scales()
    return optimizer


# --- locked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_outside_of_the_box_keeps_every_bit(ply, tmp_path, strategy, degree):
    path = ply(degree)
    before = read_ply(path)
    geometry = geometry_of(path, degree, box=BOX)
    inside = in_box(torch.as_tensor(before["means"]), tuple(BOX))
    assert 0 < inside.sum() < 60 and geometry.count == inside.sum()
    start = geometry.count
    optimizer = train(geometry, strategy)
    after = geometry.export()
    for name in NAMES[: None if degree else -1]:
        locked = torch.as_tensor(before[name])[~inside]
        assert torch.equal(after[name][geometry.count :], locked), name
        free = torch.as_tensor(before[name])[inside]
        assert not torch.equal(after[name][: len(free)], free), name
    assert (geometry.count == start) == (strategy == "none")
    low, high = torch.tensor(BOX).view(2, 3)
    assert ((geometry.means >= low) & (geometry.means <= high)).all()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(len(p) for p in trained) == len(trained) * geometry.count
    Plain(after).write_ply(tmp_path / "after.ply")
    again = read_ply(tmp_path / "after.ply")
    for name in NAMES[: None if degree else -1]:
        assert torch.equal(
            torch.as_tensor(again[name])[geometry.count :], torch.as_tensor(before[name])[~inside]
        )


def test_the_gradients_of_a_strategy_are_those_of_the_free_ones(ply):
    geometry = geometry_of(ply(), box=BOX)
    out = make_renderer(geometry)(**cameras([0, 100]))
    out["info"]["means2d"].retain_grad()
    out["comp_rgb"].square().sum().backward()
    own, whole = geometry.own_info(out["info"]), out["info"]
    n = geometry.count
    assert own["means2d"].shape[1] == own["radii"].shape[1] == n < whole["means2d"].shape[1] == 60
    assert torch.equal(own["means2d"].grad, whole["means2d"].grad[:, :n])
    assert own["means2d"].grad.any()


def test_an_object_that_is_partly_locked_is_drawn_whole(ply):
    path, batch = ply(1), cameras([0, 100])
    pictures = [
        make_renderer(each)(**batch)["comp_rgb"]
        for each in (
            geometry_of(path, 1),
            geometry_of(path, 1, box=BOX),
            threestudio.find("lods-gaussians")(
                {"init_type": "file", "file": {"path": str(path)}, "sh_degree": 1}
            ),
        )
    ]
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(pictures[0], pictures[2])


def test_viewers_and_meshes_get_the_locked_ones_too(ply):
    geometry = geometry_of(ply(), box=BOX)
    assert geometry.count < 60
    assert len(geometry.splats()["centers"]) == len(geometry.export()["means"]) == 60


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (
            [5.0, 5.0, 5.0, 6.0, 6.0, 6.0],
            "box holds none of the 60 Gaussians, whose centres go from",
        ),
        ([1.0, 2.0], "box"),
        ([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], "is empty: x0 < x1, y0 < y1 and z0 < z1 are needed"),
    ],
)
def test_a_box_that_is_none_is_one_line(ply, box, said):
    with pytest.raises(ValueError) as caught:
        geometry_of(ply(), box=box)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# --- the source and the anchors -------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_source_is_drawn_as_it_was(ply, strategy):
    geometry, batch = geometry_of(ply(), box=BOX), cameras([0, 100])
    renderer = make_renderer(geometry)
    before = renderer(**batch)
    train(geometry, strategy)
    now = renderer(**batch)
    seen = renderer.before(geometry.source, before["comp_rgb_bg"], **batch)
    assert torch.equal(seen, before["comp_rgb"].detach())
    assert (now["comp_rgb"] - seen).abs().max() > 0.01


def test_anchor_losses_are_mean_squares_of_what_has_changed(ply):
    geometry = geometry_of(ply(1), 1, box=BOX)
    assert all(value == 0 for value in geometry.anchor_losses().values())
    with torch.no_grad():
        geometry.means += torch.tensor([0.1, 0.0, 0.2])
        geometry.scales += 0.5
        geometry.sh0 += 1.0
        geometry.shN[:, 0] += 0.1
        geometry.opacities.fill_(0.0)
    found = geometry.anchor_losses()
    expected = {"color": 3 * 0.28209479**2 + 3 * 0.01, "position": 0.05, "scale": 3 * 0.25}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4)
    was = geometry.anchor.opacities.sigmoid()
    assert found["opacity"].item() == pytest.approx((0.5 - was).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("strategy", ["default", "mcmc"])
def test_a_gaussian_that_is_made_of_another_has_its_anchor(ply, strategy):
    """Colours that nothing trains are handed on, and so are those of the anchors."""
    geometry = geometry_of(ply(), box=BOX)
    start = geometry.count
    train(geometry, strategy, still="sh0")
    assert geometry.count > start
    assert torch.equal(geometry.anchor.sh0, geometry.sh0)
    assert not torch.equal(geometry.anchor.means, geometry.means)
    assert not any(p.requires_grad for p in geometry.anchor.parameters())


# --- words ----------------------------------------------------------------------------------------


def test_a_map_is_traced_to_the_gaussians_that_make_up_its_pixels(ply):
    """The weights of a Gaussian are what a picture shows where it alone has a colour."""
    geometry = geometry_of(ply())
    renderer, batch = make_renderer(geometry), cameras([0, 100])
    views = [{k: batch[k][i : i + 1] for k in ("c2w", "fovy")} for i in range(2)]
    maps = torch.rand(2, 24, 32, generator=torch.Generator().manual_seed(3))

    def draw(colors, view):
        return renderer.draw(geometry.source, colors, **view, height=24, width=32)[0][0]

    found = traced(draw, 60, maps, views)
    for i in (0, 17, 59):
        colors = torch.zeros(60, 3)
        colors[i] = 1
        weights = torch.stack([draw(colors, view)[..., 0] for view in views])
        want = (weights * maps).sum() / weights.sum()
        assert found[i].item() == pytest.approx(want.item(), rel=1e-3)


def test_words_free_some_of_what_a_box_leaves_free(ply):
    geometry = geometry_of(ply(), box=BOX)
    source = {name: value.clone() for name, value in geometry.source.gaussians().items()}
    first, wanted = geometry.count, torch.arange(60) % 2 == 0
    geometry.restrict(wanted)
    assert geometry.count == (first + 1) // 2 == len(geometry.anchor.means)
    assert torch.equal(geometry.means, source["means"][:first][wanted[:first]])
    now = geometry.export()
    for name, value in source.items():
        rows = (tuple(row.flatten().tolist()) for row in value)
        assert set(rows) == {tuple(row.flatten().tolist()) for row in now[name]}


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_sd, ply, tmp_path, monkeypatch):
    """``run(*overrides) -> (files, overrides)`` of an edit of seconds, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def make(*more):
        files = [str(ROOT / "configs" / f"{n}.yaml") for n in ("lods-gs-embedding", "edit")]
        return files, [
            *small_run(tiny_sd()),
            f"system.geometry.file.path={ply()}",
            "system.prompt_processor.source_prompt=a blue car",
            f"system.geometry.box={BOX}",
            *more,
        ]

    return make


KEYS = ("state_dict", "optimizer_states", "lods_densifier", "rng_state", "global_step")
DENSE = "system.strategy={name: default, scene_scale: 9.0, default: {refine_start_iter: 0, "
DENSE += "refine_every: 1, refine_stop_iter: 9, grow_grad2d: 1.e-9, refine_scale2d_stop_iter: 0}}"


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param([DENSE, "system.guidance_type=lods-edit-guidance"], marks=pytest.mark.slow),
    ],
    ids=["dds", "lods-edit, densified"],
)
def test_four_steps_are_two_and_two(run, more):
    start, whole = two_and_two(run("system.renderer.backend=torch", *more), KEYS)
    now, then = (each["state_dict"]["geometry.sh0"] for each in (start, whole))
    assert not torch.equal(now[:5], then[:5])
    for name in ("source.means", "inside"):
        assert torch.equal(
            start["state_dict"][f"geometry.{name}"], whole["state_dict"][f"geometry.{name}"]
        )


def test_the_first_picture_of_the_source_is_the_source_and_nothing_moves_for_one_text(run):
    """The texts being the same too, there is no gradient in the first step."""
    same_text = "system.prompt_processor.source_prompt=a red car"
    files, overrides = run(same_text, "system.prompt_processor.prompt=a red car")
    system, _ = fit(files, overrides, max_steps=1)
    before = system.geometry.source.gaussians()
    inside = system.geometry.inside
    for name, value in system.geometry.gaussians().items():
        assert torch.equal(value, before[name][inside]), name
    other, _ = fit(*run(), max_steps=1)
    assert not torch.equal(other.geometry.sh0, before["sh0"][inside])


def test_a_run_may_change_what_the_model_sees_some_words_in(run):
    system, _ = fit(*run("system.where=a blue car", "system.where_level=0.5"), max_steps=1)
    inside = system.geometry.inside
    assert 0 < inside.sum() < 60 and system.geometry.count == inside.sum()
    locked = {n: v[~inside] for n, v in system.geometry.source.gaussians().items()}
    for name, value in system.geometry.export().items():
        assert torch.equal(value[system.geometry.count :], locked[name])
    with pytest.raises(ValueError, match="'a blue car' is seen in no Gaussian above system"):
        fit(*run("system.where=a blue car", "system.where_level=1"), max_steps=1)


@pytest.mark.slow
def test_a_run_of_an_edit_leaves_a_ply_with_the_locked_ones_as_they_were(run, ply):
    assert launch(*run("name=edit")) == 0
    [made] = Path("outputs/edit/t").glob("save/it2-export/gaussians.ply")
    before, after = read_ply(ply()), read_ply(made)
    locked = ~in_box(torch.as_tensor(before["means"]), tuple(BOX))
    for name in NAMES[:-1]:
        rows = torch.as_tensor(after[name])[-int(locked.sum()) :]
        assert torch.equal(rows, torch.as_tensor(before[name])[locked])
    state = read(made.parents[2] / "ckpts" / "last.ckpt")["state_dict"]
    same(state["geometry.inside"].sum().item(), len(state["geometry.means"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["system.geometry_type=lods-gaussians"],
            "Gaussians or a mesh: lods edit FILE",
        ),
        (
            ["system.geometry.init_type=ball"],
            "Gaussians or a mesh: lods edit FILE",
        ),
        (["system.prompt_processor.source_prompt=null"], "give source_prompt='a cat'"),
    ],
)
def test_an_edit_of_nothing_is_refused_before_anything_is_loaded(run, capsys, words, said):
    assert launch(*run(*words)) == 2
    assert said in capsys.readouterr().err


def test_a_radiance_field_is_not_edited(tiny_sd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [str(ROOT / "configs" / "lods-ngp-embedding.yaml")]
    words = [*small_run(tiny_sd()), "system.guidance_type=lods-dds-guidance"]
    assert launch(files, words) == 2
    assert "edits what is there, Gaussians or a mesh" in capsys.readouterr().err


def test_anchors_without_a_source_are_one_line(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [str(ROOT / "configs" / "lods-gs-embedding.yaml")]
    words = [
        *small_run(tiny_sd()),
        "system.loss.lambda_anchor_color=1",
        "system.geometry.init_type=ball",
    ]
    with pytest.raises((ValueError, UserError), match="lambda_anchor_"):
        fit(files, words, max_steps=1)
