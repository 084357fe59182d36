"""The grids in evaluation/grids, beside each other and beside the table of the tuning."""

import csv
import statistics

from lods.models import cards
from omegaconf import OmegaConf

from evaluation.grid import TRUE, load_grid
from evaluation.machine import ROOT
from evaluation.run import load_run
from evaluation.table import Table, key_of
from pocket.shapes.data import asked
from pocket.shapes.scenes import KINDS

GRIDS = ROOT / "evaluation/grids"


def test_shipped_grids():
    shapes, tuning, quick = (load_grid(GRIDS / f"{n}.yaml") for n in ("shapes", "tuning", "quick"))
    real = [r for r in shapes.runs if r.method != TRUE]
    cells = {(r.representation, r.method, r.prompt, r.seed) for r in real}
    assert len(cells) == len(real) == 2 * 12 * 12 * 3 + 4 * 6 * 2 and not shapes.tuning
    for grid in (shapes, tuning):
        labels = [asked(p) for p in dict.fromkeys(r.prompt for r in grid.runs)]
        colored = sum(color >= 0 for _, color in labels)
        fronts = sum(KINDS[kind].front for kind, _ in labels)
        assert len(labels) <= 2 * min(colored, fronts)
    kinds = [{asked(r.prompt)[0] for r in grid.runs} for grid in (shapes, tuning)]
    assert len(kinds[0]) == 12 and not kinds[0] & kinds[1]
    # one budget for all, but for the lower scales that were added in 2D
    tried = {}
    for r in tuning.runs:
        tried.setdefault((r.representation, r.method), set()).add(r.settings)
    budget = {"2d": range(8, 13), "gaussians": [8], "nerf": [4]}
    assert tuning.tuning
    assert all(len(settings) in budget[on] for (on, _), settings in tried.items())
    assert {r.method for r in real} == {r.method for r in tuning.runs}
    assert len([r for r in quick.runs if r.method != TRUE]) == 2 * 2 * 2
    bench = load_grid(GRIDS / "t3bench.yaml")
    assert bench.gpus == 1 and all(r.clip and not r.judge and r.method != TRUE for r in bench.runs)
    improve, long, finals = (load_grid(GRIDS / f"{n}.yaml") for n in ("improve", "long", "finals"))
    for grid in (improve, finals):
        assert not {r.prompt for r in grid.runs} & {r.prompt for r in shapes.runs}
    high = load_grid(GRIDS / "high.yaml")
    assert {r.prompt for r in high.runs} == {r.prompt for r in shapes.runs}
    # the same settings and prompts, only longer
    runs = [r for r in shapes.runs if r.representation == "gaussians"]
    chosen = {(r.method, r.prompt, r.settings) for r in runs}
    assert {(r.method, r.prompt, r.settings) for r in long.runs} < chosen
    # or there is no Fréchet distance in 3D
    for grid in (shapes, tuning, quick, improve, long, finals, high):
        labels = [asked(r.prompt) for r in grid.runs]
        assert all(color >= 0 for kind, color in labels if KINDS[kind].natural)
    for grid in (shapes, tuning, quick, bench, improve, long, finals, high):
        assert all((ROOT / name).is_file() for r in grid.runs for name in r.configs)


def test_the_committed_table_has_every_run_of_the_reported_grid():
    """Also of the same settings and steps, which the digest tells."""
    index = Table(ROOT / "docs/evaluation").index()
    runs = load_grid(GRIDS / "shapes.yaml").runs
    rows = [index.get(key_of(run)) for run in runs]
    assert len(rows) == 996 and {row and row["status"] for row in rows} == {"ok"}


def tuned(grid=None) -> dict:
    """(representation, method) -> settings -> distances, of a grid or of all in tuning.csv."""
    found = {}
    with (ROOT / "docs/evaluation/tuning.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if grid in (None, row["grid"]):
                settings = found.setdefault((row["canvas"], row["prior"]), {})
                settings.setdefault(row["settings"], []).append(float(row["frechet"] or "inf"))
    return found


def test_reported_settings_are_the_best_of_the_tuning():
    """The lowest mean Fréchet distance over the prompts of those that came to the last round, for
    each representation that was tuned."""
    found = tuned()
    assert found
    runs = load_grid(GRIDS / "shapes.yaml").runs
    tried = {on for on, _ in found}
    chosen = {(r.representation, r.method): r.settings for r in runs if r.method != TRUE}
    assert {key for key in chosen if key[0] in tried} == set(found)
    for key, settings in found.items():
        last = max(map(len, settings.values()))
        best = min(
            (s for s, distances in settings.items() if len(distances) == last),
            key=lambda s: statistics.fmean(settings[s]),
        )
        assert set(best.split()) <= set(chosen[key].split()), key


def test_the_two_best_of_each_method_come_to_the_second_round():
    first = tuned("tuning")
    runs = load_grid(GRIDS / "finals.yaml").runs
    for on in {r.representation for r in runs}:
        went_on = {}
        for r in runs:
            if r.representation == on:
                went_on.setdefault(r.method, set()).add(r.settings)
        assert went_on == {
            method: set(sorted(of, key=lambda s: statistics.fmean(of[s]))[:2])
            for (where, method), of in first.items()
            if where == on
        }
    assert not {r.prompt for r in runs} & {r.prompt for r in load_grid(GRIDS / "tuning.yaml").runs}


SHAPES = {
    "system.prompt_processor.pretrained_model_name_or_path": (
        "custom/threestudio-lods/lods/models/pocket-shapes"
    ),
    "data.width": 64,
}
KEPT = {  # of the overlays as they were when the grids ran
    "gaussians": {
        **SHAPES,
        "system.geometry.max_scale": 0.0,
        "system.geometry.ball": {"n_points": 2500, "radius": 0.6},
        "system.strategy.name": "none",
        "system.loss.lambda_sparsity": 2.0,
        "system.loss.lambda_opaque": 0.0,
    },
    "nerf": {**SHAPES, "system.loss.lambda_sparsity": 2.0, "system.loss.lambda_opaque": 0.0},
}


def test_the_overlays_new_settings_do_not_change_the_grids(lods, tmp_path):
    """A run of the reported comparison is what it was, whatever its overlay has learnt since."""
    assert cards.canonical(next(iter(SHAPES.values()))) == "pocket-shapes"
    background = {"color": [1.0, 1.0, 1.0], "random_aug": True, "random_aug_prob": 0.5}
    for name in ("shapes", "tuning", "quick"):
        runs = load_grid(GRIDS / f"{name}.yaml").runs
        runs = [r for r in runs if r.method != TRUE and r.representation in KEPT]
        firsts = {(r.representation, r.method): r for r in runs}
        for run in firsts.values():
            cfg = load_run(run, tmp_path)
            for key, value in {**KEPT[run.representation], "system.background": background}.items():
                assert OmegaConf.select(cfg, key) == value, (
                    name,
                    run.representation,
                    run.method,
                    key,
                )
