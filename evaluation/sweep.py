"""What a setting does: ``python -m evaluation.sweep [--grid scales] [--setting ...]``.

From the rows of a grid in ``tuning.csv`` it makes, in the same folder, ``GRID.csv``, a row for each
representation, method and value of the setting with means over prompts, their 95 % intervals and
the metrics at which this value is the best, and ``GRID.webp``: methods down, values across, the
first picture of a prompt's contact sheets, and the truth's.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

from evaluation.csvfile import write_rows
from evaluation.machine import OBJECTS
from evaluation.measures import Metric, measures_of
from evaluation.montage import montage
from evaluation.results import CEILING, KEYS, by_seed, latest, rank, read, values
from evaluation.statistics import interval
from evaluation.table import sheet_path
from evaluation.tool import parser_of, write_files
from evaluation.tuning import value_of
from threestudio.utils.errors import UserError

SCALE = "system.guidance.guidance_scale"
FIRST = ("representation", "method", "value", "runs", "failed", "prompts", "best")
Curve = dict[float, list[dict]]  # value -> rows
Curves = dict[tuple[str, str], Curve]  # (representation, method) -> curve


def swept(rows: Iterable[dict], grid: str, setting: str) -> Curves:
    """(representation, method) -> its rows by the value of the setting. Raises :class:`UserError`
    where runs of one value differ in another setting: then no value stands for one thing."""
    found: Curves = {}
    settings: dict[tuple[str, str, float], set[str]] = {}
    for row in latest(rows):
        value = value_of(row["settings"], setting)
        if row["grid"] == grid and row["prior"] != CEILING and value is not None:
            key = row["canvas"], row["prior"]
            found.setdefault(key, {}).setdefault(value, []).append(row)
            settings.setdefault((*key, value), set()).add(row["settings"])
    for (on, method, value), texts in settings.items():
        if len(texts) > 1:
            raise UserError(
                f"{method} on {on} was run at {setting}={value:g} with several other settings: "
                f"{', '.join(sorted(texts))}"
            )
    return dict(sorted(found.items(), key=lambda item: (item[0][0], rank(item[0][1]))))


def best_value(curve: Curve, metric: Metric) -> float | None:
    """The value with the best mean, of those that finished all prompts and seeds that any did."""
    done = {
        v: values((r for r in rows if r["status"] == "ok"), metric.column)
        for v, rows in curve.items()
    }
    most = max(map(len, done.values()), default=0)
    full = [v for v, runs in done.items() if runs and len(runs) == most]
    return max(full, key=lambda v: metric.better * interval(done[v], draws=1).mean, default=None)


def table(curves: Curves) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of the table."""
    rows, measures = [], measures_of([r for c in curves.values() for of in c.values() for r in of])
    every = [r for c in curves.values() for of in c.values() for r in of if r["status"] == "ok"]
    shown = [m for m in measures.metrics if values(every, m.column)]
    for (on, method), curve in curves.items():
        best = {m.column: best_value(curve, m) for m in shown if m.better}
        for value, of in sorted(curve.items()):
            done = [r for r in of if r["status"] == "ok"]
            row = {"representation": on, "method": method, "value": f"{value:g}"}
            row |= {"runs": str(len(done)), "failed": str(len(of) - len(done))}
            row |= {"prompts": str(len({r["prompt"] for r in done}))}
            row |= {"best": " ".join(name for name, at in best.items() if at == value)}
            for m in shown:
                i = interval(values(done, m.column))
                ends = {m.column: i.mean, f"{m.column}_low": i.low, f"{m.column}_high": i.high}
                row |= {k: f"{v:.6g}" if math.isfinite(v) else "" for k, v in ends.items()}
            rows.append(row)
    ends = [f"{m.column}{end}" for m in shown for end in ("", "_low", "_high")]
    return [*FIRST, *ends], rows


def sheet_of(folder: Path, rows: Iterable[dict], prompt: str, seed: str) -> Path | None:
    """The contact sheet of a prompt and seed among rows; None where they are not there."""
    for row in rows:
        if (row["prompt"], row["seed"]) == (prompt, seed):
            return sheet_path(folder, *(row[k] for k in KEYS), settings=row["settings"])
    return None


def shared(curves: Curves) -> list[tuple[str, str]]:
    """The (prompt, seed) that all have, in order."""
    cells = [{(r["prompt"], r["seed"]) for r in of} for c in curves.values() for of in c.values()]
    return sorted(set.intersection(*cells), key=lambda cell: (cell[0], by_seed(cell[1])))


def draw(file: Path, folder: Path, truths: list[dict], curves: Curves, cell) -> None:
    """The picture of one (prompt, seed), with the truth in the last column."""
    steps = sorted({value for curve in curves.values() for value in curve})
    sheets, names = [], []
    for (on, method), curve in curves.items():
        columns = [curve.get(value, []) for value in steps]
        columns.append([row for row in truths if row["canvas"] == on])
        sheets.append([sheet_of(folder, rows, *cell) for rows in columns])
        names.append(f"{method}\n{on}")
    heads = [f"{value:g}" for value in steps]
    montage(file, sheets, names, [*heads, f"true: {cell[0]}"], pictures=1)


def make(folder: Path, grid: str, setting: str, prompt: str | None = None) -> list[Path]:
    """Write the table and the picture; returns the files that are there."""
    found = latest(read(folder / "tuning.csv", (*KEYS, "settings", "status")) or ())
    curves = swept(found, grid, setting)
    if not curves:
        raise UserError(
            f"{folder / 'tuning.csv'} has no runs of the grid {grid} that vary {setting}: "
            f"evaluate.py evaluation/grids/{grid}.yaml makes them"
        )
    cells = shared(curves)
    if prompt is not None and prompt not in {p for p, _ in cells}:
        there = ", ".join(dict.fromkeys(p for p, _ in cells)) or "none"
        raise UserError(f"not all values were run with {prompt!r}; those with all: {there}")
    files = [folder / f"{grid}.csv", folder / f"{grid}.webp"]
    write_rows(files[0], *table(curves))
    shown = [cell for cell in cells if prompt in (None, cell[0])]
    if shown:
        truths = [r for r in found if r["grid"] == grid and r["prior"] == CEILING]
        draw(files[1], folder, truths, curves, shown[0])
    return [file for file in files if file.exists()]


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("sweep", __doc__)
    parser.add_argument("--folder", type=Path, default=OBJECTS, help="of tuning.csv")
    parser.add_argument("--grid", default="scales", help="whose rows (default scales)")
    parser.add_argument("--setting", default=SCALE, help=f"which was varied (default {SCALE})")
    parser.add_argument("--prompt", help="of the picture (default: the first that all have)")
    options = parser.parse_args(arguments)
    return write_files(lambda: make(options.folder, options.grid, options.setting, options.prompt))


if __name__ == "__main__":
    sys.exit(main())
