"""The judge of the world of real objects: what it is asked, what is counted, and its training."""

import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pocket import judge, judge_check
from pocket.judge import PALETTE, SLUGS, Judge
from pocket.world import COLOURS, NAMES, VIEWS, view_of
from tests.study.world_renders import plain_renders


def _labels(names, colours, views, azimuths):
    return {
        "object": np.array([NAMES.index(n) for n in names]),
        "colour": np.array([PALETTE.index(c) for c in colours]),
        "view": np.array([VIEWS.index(v) for v in views]),
        "azimuth": np.array(azimuths, float),
    }


def test_answers_are_counted_where_they_apply():
    """The barrel has no colours and no front, the dog no colours."""
    true = _labels(
        ["car", "car", "dog", "barrel"], ["red", "blue", "own", "own"],
        ["front", "side", "back", "front"], [0, 100, 170, 0],
    )  # fmt: skip
    said = _labels(
        ["car", "dog", "dog", "barrel"], ["red", "red", "red", "red"],
        ["front", "side", "side", "back"], [44, 146, -171, 180],
    )  # fmt: skip
    assert judge.accuracies(said, true) == {
        "object": 0.75, "colour": 0.5, "view": pytest.approx(2 / 3),
        "azimuth": pytest.approx(2 / 3),  # 46 degrees off is wrong, 19 about 180 are right
        "n": 4, "n_colour": 2, "n_view": 3,
    }  # fmt: skip


def test_a_share_of_nothing_is_no_number():
    none = _labels(["barrel"], ["own"], ["front"], [0])
    found = judge.accuracies(none, none)
    assert found["object"] == 1 and np.isnan([found["colour"], found["view"]]).all()


def test_labels_are_those_of_the_series_and_the_camera(tmp_path):
    renders = plain_renders(tmp_path, ("car", "chair"))
    series = [(s.slug, s.colour) for s in renders.series]
    shown = (("car", "blue"), 3), (("car", ""), 4), (("chair", ""), 5)
    rows = [(series.index(s), v) for s, v in shown]
    found = judge.labels_of(renders, rows)
    cameras = renders.cameras(rows)
    assert [NAMES[k] for k in found["object"]] == ["car", "car", "chair"]
    # the car is red of its own, so that a red one is no other; the chair's own blue is
    assert [PALETTE[k] for k in found["colour"]] == ["blue", "red", "own"]
    assert found["view"].tolist() == [view_of(e, a) for e, a in cameras[:, :2]]
    assert np.array_equal(found["azimuth"], cameras[:, 1])


def test_a_verdict_is_the_best_answer_and_the_angle_of_the_turn():
    class Says(torch.nn.Module):
        def forward(self, images):
            rows = images[:, 0, 0, 0].long()
            return {
                "object": torch.eye(40)[rows], "colour": torch.eye(5)[rows],
                "view": torch.eye(4)[rows],
                "turn": 3 * torch.tensor([[0.0, 1], [1, 0], [-1, -1], [0, -1]])[rows],
                "features": images.flatten(1),
            }  # fmt: skip

    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    said = judge.verdict(Says(), images, batch=3)
    for name in ("object", "colour", "view"):
        assert said[name].tolist() == [0, 1, 2, 3]
    assert np.allclose(said["azimuth"], [0, 90, -135, 180])
    assert said["features"].shape == (4, 12)


def test_pictures_of_any_size_are_averaged_to_the_judges(monkeypatch):
    torch.manual_seed(0)
    one = Judge().eval()
    small = torch.rand(2, 3, 64, 64)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        for name, value in one(small).items():
            assert torch.allclose(value, one(large)[name], atol=1e-5)
    assert sum(p.numel() for p in one.parameters()) * 2 < 4e6  # bytes in half precision


def test_saved_weights_are_read_as_they_are_and_only_for_these_objects(tmp_path):
    torch.manual_seed(0)
    one, file = Judge().eval(), tmp_path / "judge.safetensors"
    judge.save(one, file)
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(one(images)["object"], judge.load(file)(images)["object"], atol=0.02)
    state = load_file(file)
    save_file(state, file, metadata={"objects": "|".join(reversed(NAMES))})
    with pytest.raises(ValueError, match="judges other objects than this world's"):
        judge.load(file)
    state.pop("mix.0.weight")
    save_file(state, file, metadata={"objects": "|".join(NAMES)})
    with pytest.raises(ValueError, match=r"is not of this judge: see 'mix\.0\.weight'"):
        judge.load(file)
    file.write_text("no weights")
    with pytest.raises(ValueError, match="train the judge first"):
        judge.load(file)


def test_training_pictures_are_moved_renders_before_backgrounds():
    clear, full = torch.zeros(64, 4, 16, 16), torch.zeros(64, 4, 16, 16)
    full[:, 3] = full[:, 0] = 1.0  # opaque red
    made = judge.augment(clear, np.random.default_rng(0))
    assert made.shape == (64, 3, 16, 16) and made.min() >= 0 and made.max() <= 1
    colours = made[32:].mean((2, 3))  # the second half is not softened
    assert (made[32:] - colours[:, :, None, None]).abs().max() < 0.35  # of nothing but noise
    assert 0.3 < (colours.min(1).values > 0.8).float().mean() < 0.9  # mostly white
    red = judge.augment(full, np.random.default_rng(0))
    inside = red[:, :, 6:10, 6:10].mean((2, 3))
    assert (inside[:, 0] > 0.8).all() and inside[:, 1].median() < 0.1
    assert torch.equal(red, judge.augment(full, np.random.default_rng(0)))


def test_training_is_resumed_and_writes_weights_that_load(tmp_path):
    plain_renders(tmp_path / "renders", ("car", "dog", "barrel"), size=64)
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    judge.train(tmp_path, 2, batch=8, file=once)
    assert judge.load(once).training is False
    (tmp_path / "judge_state.pt").rename(tmp_path / "kept.pt")
    for _ in range(2):  # the second has nothing left to do
        judge.train(tmp_path, 2, batch=8, file=twice)
    a, b = load_file(once), load_file(twice)
    assert all(torch.equal(a[k], b[k]) for k in a)
    (tmp_path / "renders" / "car").rename(tmp_path / "renders" / "spaceship")
    with pytest.raises(ValueError, match="spaceship is no object of the world"):
        judge.train(tmp_path, 3, batch=8, file=twice)


def test_damages_do_what_they_say():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(judge_check.blurred(images, 1e-3), images)
    soft = judge_check.blurred(images, 2)
    assert soft.std() < 0.3 * images.std() and torch.allclose(soft.mean(), images.mean(), atol=0.01)
    assert (judge_check.noisy(torch.full_like(images, 0.5), 0.1) - 0.5).std() == pytest.approx(
        0.1, rel=0.03
    )
    assert torch.allclose(judge_check.faded(images, 1), images)
    assert (judge_check.faded(images, 0) == 1).all()


def test_the_next_colour_is_another_for_every_paint_and_none_for_others():
    labels = _labels(["car"] * 5, PALETTE, ["front"] * 5, [0] * 5)
    found = [PALETTE[k] for k in judge_check.next_colour(labels)["colour"]]
    assert found[0] == "own" and sorted(found[1:]) == sorted(COLOURS)
    assert all(a != b for a, b in zip(found[1:], COLOURS))


def test_the_check_is_of_held_out_views_and_of_painted_ones_where_colours_change(tmp_path):
    renders = plain_renders(tmp_path, ("car", "dog"))
    table = judge_check.check(Judge().eval(), renders, 100)
    by = {(row["test"], row["level"]): row for row in table}
    assert by["as they are", "white"]["n"] == 2 * 2 + 4  # views 24 and 49, and one in each colour
    assert by["another colour", ""]["n"] == by["another colour", ""]["n_colour"] == 4
    assert len(by) == len(table)


def test_slugs_are_in_the_order_of_the_answers():
    assert [slug.replace("-", " ") for slug in SLUGS] == list(NAMES)


def test_the_committed_weights_are_small_and_of_this_world():
    assert judge.WEIGHTS.stat().st_size < 4e6
    said = judge.verdict(judge.load(), torch.ones(2, 3, 128, 128))
    assert {name: len(value) for name, value in said.items()} == dict.fromkeys(said, 2)


def test_the_committed_check_holds_what_is_claimed():
    with open(judge_check.OUT) as file:
        found = {(r["test"], r["level"]): r for r in csv.DictReader(file)}
    levels = {("blurred", judge_check.BLURS), ("noise", judge_check.NOISES)}
    assert {(t, f"{level:g}") for t, all_ in levels for level in all_} <= set(found)
    for level in ("white", "any"):
        true = {k: float(found["as they are", level][k]) for k in ("object", "colour", "view")}
        assert true["object"] > 0.97 and true["colour"] > 0.97 and true["view"] > 0.87
    # of 128 pixels, a blur by 4 or a noise of 0.1 is more than samples of a model have
    for spoilt in (("blurred", "4"), ("noise", "0.1"), ("half-transparent", "0.75")):
        assert float(found[spoilt]["object"]) > 0.95 and float(found[spoilt]["colour"]) > 0.95
    assert float(found["another colour", ""]["colour"]) < 0.02
