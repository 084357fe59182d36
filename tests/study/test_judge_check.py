"""The check of the judge: what it changes, what it counts, and what was found."""

import csv

import numpy as np
import pytest

from pocket.shapes import data, judge_check
from pocket.shapes.judge import load
from pocket.shapes.judge_check import Shown
from pocket.shapes.scenes import COLORS, KIND_NAMES

CAR, DUCK, DONUT = (KIND_NAMES.index(n) for n in ("car", "rubber duck", "donut"))


def seen(scene, azimuth):
    camera = data.Camera(15.0, azimuth, 45.0, 0.8, np.zeros(3))
    return data.draw(np.random.default_rng(0), scene, camera, judge_check.WHITE)[0].astype(int)


def test_an_object_with_two_fronts_looks_the_same_from_both_sides():
    duck = data.build(np.random.default_rng(0), DUCK, 0)
    assert np.abs(seen(duck, 20) - seen(duck, 200)).mean() > 5
    janus = judge_check.both_sides(duck)
    assert np.abs(seen(janus, 20) - seen(janus, 200)).max() <= 1
    # The copy does not hide the front that was there.
    eye = np.array(COLORS["black"]).max() * 255 + 10
    assert (seen(janus, 0).max(-1) < eye).sum() >= (seen(duck, 180).max(-1) < eye).sum() + 4


def test_a_mirrored_front_is_what_the_opposite_azimuth_sees():
    behind, front = Shown(DUCK, -1, 2, 180.0), Shown(DUCK, -1, 2, 0.0)
    mirrored, labels = judge_check.pictures([behind], camera_of=lambda a: 180 - a)
    assert labels.tolist() == [180.0]
    assert np.array_equal(mirrored, judge_check.pictures([front])[0])
    assert not np.array_equal(mirrored, judge_check.pictures([behind])[0])


def test_pictures_are_those_of_their_labels_and_seed():
    shown = judge_check.everything(1)
    assert len({(s.kind, s.view) for s in shown}) == len(shown) == 80
    some = shown[10:14]
    images, azimuths = judge_check.pictures(some)
    assert np.array_equal(images, judge_check.pictures(some)[0])
    assert not np.array_equal(images, judge_check.pictures(some, seed=1)[0])
    assert [data.view_of(0, a) for s, a in zip(some, azimuths) if s.view != 3] == [
        s.view for s in some if s.view != 3
    ]
    assert (images[:, 0, 0] == 1).all()  # white ground
    any_ground = judge_check.pictures(shown[:16], ground=None)[0]
    assert len(np.unique(any_ground[:, 0, 0].round(2), axis=0)) > 3
    for s in judge_check.from_behind(3, 90, 135):
        assert 90 <= abs(s.azimuth) <= 135


def test_paint_leaves_one_colour():
    car = judge_check.paint(data.build(np.random.default_rng(0), CAR, 0), COLORS["green"])
    assert len(car.colors) > 10 and np.unique(car.colors, axis=0).tolist() == [[0.10, 0.62, 0.16]]


def test_damages_do_what_they_say():
    images = judge_check.pictures([Shown(CAR, 0, 0), Shown(DONUT, 4, 1)])[0]
    assert np.allclose(judge_check.blurred(images, 1e-3), images)
    soft = judge_check.blurred(images, 3)
    assert soft.std() < images.std() and np.allclose(soft.mean(), images.mean(), atol=5e-3)
    assert np.allclose(judge_check.faded(images, 1), images, atol=1e-6)
    assert (judge_check.faded(images, 0) == 1).all()
    assert np.allclose(judge_check.saturated(images, 1), images, atol=1e-6)
    grey = judge_check.saturated(images, 0)
    assert np.ptp(grey, axis=-1).max() < 1e-6 < np.ptp(images, axis=-1).max()
    noise = judge_check.noisy(np.full_like(images, 0.5), 0.1) - 0.5
    assert noise.std() == pytest.approx(0.1, rel=0.02)
    assert np.array_equal(judge_check.shuffled(images, 64), images)
    mixed = judge_check.shuffled(images, 16)
    assert not np.array_equal(mixed, images)
    for a, b in zip(mixed, images):
        blocks = [
            sorted(
                x[i : i + 16, j : j + 16].tobytes()
                for i in range(0, 64, 16)
                for j in range(0, 64, 16)
            )
            for x in (a, b)
        ]
        assert blocks[0] == blocks[1]


def test_scores_are_counted_where_they_apply():
    shown = [Shown(CAR, 4, 0), Shown(CAR, 4, 2), Shown(CAR, 1, 3), Shown(DUCK, -1, 1)]
    shown += [Shown(DONUT, 2, 2)]
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 3))
    said = {
        "kind": np.array([CAR, CAR, DUCK, DUCK, DUCK]),
        "color": np.array([4, 0, 0, 7, 2]),
        "view": np.array([1, 1, 1, 1, 1]),
        "features": features,
    }
    azimuths = [100.0, 45.0, 180.0, 260.0, 180.0]
    row = judge_check.score(said, shown, azimuths, {"features": features + 2})
    assert row == {
        "n": 5,
        "kind_accuracy": 0.6,
        "color_accuracy": 0.5,  # of the four with a colour
        "view_accuracy": 0.25,  # of the four with a front
        # 100 and 260 degrees; not 45, not from above, not the donut
        "front_seen_behind": 1.0,
        "frechet": pytest.approx(12.0),
        "commonest": "rubber duck",
        "commonest_kind": 0.6,
        "commonest_color": 0.5,  # not the duck's
        "commonest_view": 1.0,
    }
    said["view"][3] = 2
    assert judge_check.score(said, shown, azimuths, said)["front_seen_behind"] == 0.5
    front = judge_check.score(said, shown, np.zeros(5), said)
    assert front["front_seen_behind"] == "" and front["frechet"] == 0


@pytest.fixture(scope="module")
def small():
    """Few pictures, some of the levels."""
    with pytest.MonkeyPatch.context() as patch:
        for name, levels in (
            ("BLURS", (2.0, 6.0)),
            ("NOISES", (0.4,)),
            ("OPACITIES", (0.1,)),
            ("SATURATIONS", (0.0,)),
            ("PATCHES", (8,)),
        ):
            patch.setattr(judge_check, name, levels)
        return judge_check.check(load(), rounds=1)


def by_name(rows):
    return {(r["test"], r["level"]): r for r in rows}


def test_the_judge_sees_what_is_there(small):
    assert all(tuple(r) == judge_check.COLUMNS for r in small)
    found = by_name(small)
    assert found["another colour", "the colour that is there"]["color_accuracy"] > 0.85
    assert found["another colour", "the colour asked for"]["color_accuracy"] < 0.1
    true = found["true renders", "white ground"]
    assert true["kind_accuracy"] > 0.9
    blurred = [found["blurred", level] for level in ("2", "6")]
    assert true["frechet"] < blurred[0]["frechet"] < blurred[1]["frechet"]
    assert true["kind_accuracy"] > blurred[1]["kind_accuracy"]
    grey = found["saturation", "0"]
    assert grey["color_accuracy"] < 0.5 < true["color_accuracy"]


def committed():
    with open(judge_check.OUT) as file:
        return by_name(csv.DictReader(file))


def test_a_front_is_seen_behind_where_there_is_one(small):
    for found in (by_name(small), committed()):
        where = "over 135 degrees"
        rate = {
            t: float(found[t, where]["front_seen_behind"])
            for t in ("seen from behind", "front mirrored to the back", "front on both sides")
        }
        assert rate["seen from behind"] < 0.15
        assert rate["front mirrored to the back"] > 0.7
        assert rate["front on both sides"] > rate["seen from behind"] + 0.3


def test_the_committed_check_is_whole_and_holds_what_is_claimed():
    found = committed()
    wanted = {
        *(("blurred", f"{level:g}") for level in judge_check.BLURS),
        *(("noise", f"{level:g}") for level in judge_check.NOISES),
        *(("half-transparent", f"{level:g}") for level in judge_check.OPACITIES),
        *(("saturation", f"{level:g}") for level in judge_check.SATURATIONS),
        *(("patches shuffled", f"{level:g}") for level in judge_check.PATCHES),
    }
    assert wanted <= set(found)
    true = found["true renders", "white ground"]
    assert float(true["kind_accuracy"]) > 0.95 and float(true["color_accuracy"]) > 0.93
    assert float(true["view_accuracy"]) > 0.9
    # half a pixel is less than true renders differ by
    blurs = [f"{level:g}" for level in judge_check.BLURS if level >= 1]
    ladder = [true, *(found["blurred", level] for level in blurs)]
    distances = [float(r["frechet"]) for r in ladder]
    assert distances == sorted(distances)
    assert float(found["another colour", "the colour that is there"]["color_accuracy"]) > 0.9
    assert float(found["another colour", "the colour asked for"]["color_accuracy"]) < 0.05


def test_the_command_writes_the_table(tmp_path, monkeypatch, capsys):
    row = dict.fromkeys(judge_check.COLUMNS, "1")
    monkeypatch.setattr(judge_check, "check", lambda judge, rounds, report: [row] * rounds)
    out = tmp_path / "new" / "judge.csv"
    judge_check.main(["--rounds", "2", "--out", str(out)])
    with open(out) as file:
        assert list(csv.DictReader(file)) == [row, row]
