"""The report's tables of the tuning, from small tables."""

import math
from statistics import fmean

import pytest

from evaluation.grid import written
from tests.study.test_report import made, make_rows, number


def test_tuning_says_what_was_tried_and_chosen(tmp_path):
    rows = make_rows(("sds", "csd"))
    for r in rows:
        r["settings"] = {"sds": "scale=7 lr=0.1", "csd": "scale=3"}[r["prior"]]
    tried = []
    for prior, settings in (("sds", "scale=7"), ("sds", "scale=20"), ("csd", "scale=1")):
        base = make_rows((prior,), prompts=["a tree", "a donut"], seeds="0")
        tried += [{**r, "grid": "tuning", "settings": settings} for r in base]
    page, _ = made(tmp_path, rows, tuning=tried)
    table = next(t for t in page.tables if "in the results" in t[0])
    told = {tuple(r[:2]): r[-1] for r in table[1:]}
    assert told["sds", "scale=7"] == "chosen" and told["sds", "scale=20"] == ""
    assert told["csd", "scale=1"] == ""
    scores = [float(r["object_accuracy"]) for r in tried if r["settings"] == "scale=20"]
    shown = next(r for r in table if r[1] == "scale=20")
    assert number(shown[3]) == pytest.approx(100 * fmean(scores), abs=0.051)
    # a study of another grid may use them: only grids with sds, csd and vsd are the results
    vsd = make_rows(("vsd",))
    study = [{**r, "grid": "study", "prompt": "a tree", "settings": "scale=20"} for r in rows[:3]]
    page, _ = made(tmp_path, [*rows, *vsd, *study], tuning=tried)
    table = next(t for t in page.tables if "in the results" in t[0])
    assert {tuple(r[:2]): r[-1] for r in table[1:]}["sds", "scale=20"] == ""


def test_what_a_setting_does_is_shown_at_its_best(tmp_path):
    """The lowest mean over prompts at each value; a run that failed counts for nothing."""
    distances = {
        ("sds", 5, 0.5): (30.0, 50.0),
        ("sds", 5, 1): (10.0, 20.0),
        ("sds", 100, 1): (60.0, 80.0),
        ("sds", 100, 2): (90.0, 90.0),
        ("vsd", 5, 1): (7.0, 9.0),
        ("vsd", 5, 2): (1.0, 1.0),
        ("csd", None, 1): (2.0, 4.0),
        ("csd", None, 2): (3.0, 5.0),
        ("nfsd", math.inf, 1): (6.0, 8.0),
        ("nfsd", 5, 1): (7.0, 7.0),
        ("nfsd", 5, 2): (0.5, 1.0),  # no mean of the one that did not fail
    }
    tried = []
    for (prior, scale, rate), values in distances.items():
        rows = make_rows((prior,), prompts=["a tree", "a donut"], seeds="0")
        guidance = f" system.guidance.guidance_scale={written(float(scale))}" if scale else ""
        weight = " 'system.loss.lambda_sds=${div:1,${system.guidance.guidance_scale}}'"
        for row, value in zip(rows, values):
            row |= {"grid": "tuning", "settings": f"scene_lr={rate:.1f}{guidance}{weight}"}
            row |= {"frechet": str(value), "status": "RuntimeError" if value == 1.0 else "ok"}
        tried += rows
    page, _ = made(tmp_path, make_rows(), tuning=tried)
    by_scale, by_rate = (t for t in page.tables if t[0][0] == "method" and t[0][1] in ("5", "0.5"))
    # vsd was tried at one scale, csd has none
    told = ["sds", "15.0", "70.0", ""], ["nfsd", "7.0", "", "7.0"]
    assert by_scale == [["method", "5", "100", "inf"], *told]
    assert by_rate == [
        ["method", "0.5", "1", "2"],
        ["sds", "40.0", "15.0", "90.0"],
        ["csd", "", "3.0", "4.0"],
    ]
    assert "Fréchet distance by guidance scale" in page.text
    assert "learning rate of the learned part" not in page.text  # none was given


def test_a_second_round_is_shown_beside_the_first(tmp_path):
    """Means over the prompts that all settings have, and over all of those that went on."""
    tried = []
    for setting, distances in (("a=1", (10, 20, 60)), ("a=2", (20, 30)), ("a=3", (12, 22, 5))):
        rows = make_rows(("sds",), prompts=["a tree", "a donut", "a lamp"], seeds="0")
        for row, distance in zip(rows, distances):
            row |= {"grid": "tuning", "settings": f"scene_lr={setting[2:]}"}
            tried.append(row | {"frechet": str(distance)})
    rows = [{**r, "settings": "scene_lr=3"} for r in make_rows(("sds",))]
    page, _ = made(tmp_path, rows, tuning=tried)
    table = next(t for t in page.tables if "in the results" in t[0])
    assert table[0][-2:] == ["Fréchet distance, 3 prompts", "in the results"]
    told = {r[1]: (r[2], r[4], r[5], r[6]) for r in table[1:]}
    assert told == {
        "scene_lr=1": ("3 of 3", "15.0", "30.0", ""),
        "scene_lr=2": ("2 of 2", "25.0", "", ""),
        "scene_lr=3": ("3 of 3", "17.0", "13.0", "chosen"),
    }
    # what a rate does is compared on the prompts that all have
    rates = next(t for t in page.tables if t[0] == ["method", "1", "2", "3"])
    assert rates[1] == ["sds", "15.0", "25.0", "17.0"]
