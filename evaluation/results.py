"""The tables that the report is made from: reading them, and sorting runs into sections."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.csvfile import read_rows
from evaluation.measures import Measures, measures_of
from evaluation.statistics import Runs
from threestudio.utils.errors import UserError

# The order of methods in tables, and the one after which colours are given. In the CSV files the
# column `prior` has a method and `canvas` a representation.
METHODS = (
    *("sds", "csd", "vsd", "vsd-fast", "nfsd", "bridge", "sdi", "ism"),
    *("lods-embedding", "lods-lora", "lods-lora-fast"),
    *("lods-embedding-guided", "lods-lora-guided"),
)
RIVALS = ("sds", "csd", "vsd")  # whom the claim is against
MORE_RIVALS = ("vsd-fast",)  # where they were run, against them too, or in their kind's place
CEILING = "true-renders"  # rows of this method are of the true shapes: no contestant
KEYS = ("grid", "canvas", "prior", "prompt", "seed")


class Rows(list):
    """Rows of a CSV as dictionaries of strings; ``file`` is where they are from."""

    def __init__(self, rows: Iterable[dict], file: Path):
        super().__init__(rows)
        self.file = file


def read(file: Path, needed: Iterable[str] = ()) -> Rows | None:
    """The rows of a CSV, or None if there is no such file."""
    if not file.exists():
        return None
    columns, rows = read_rows(file)
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise UserError(f"{file} has no column {', '.join(lacking)}: it is no table of this report")
    return Rows(rows, file)


def number(row: dict, column: str) -> float | None:
    """A cell as a number, None where it is empty or the column is absent."""
    text = row.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        where = " ".join(row.get(k, "") for k in KEYS).strip()
        raise UserError(f"{column} of the row {where!r} is {text!r}, not a number: mend the table")
    return value


def rank(method: str) -> tuple[int, str]:
    """A key that sorts methods: the known ones in their order, then others by name."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def by_seed(seed: str) -> tuple[float, str]:
    return (float(seed) if seed.lstrip("-").isdigit() else math.inf, seed)


def values(rows: Iterable[dict], column: str) -> Runs:
    """(prompt, seed) -> value of a column, of the rows that have one."""
    found = {(r["prompt"], r["seed"]): number(r, column) for r in rows}
    return {k: v for k, v in found.items() if v is not None}


@dataclass
class Section:
    """The runs of one representation in one grid. ``runs`` has the finished ones of each
    contestant, which is a method or, where a method was run with several settings or numbers of
    steps, ``method: settings, steps``."""

    grid: str
    representation: str
    runs: dict[str, list[dict]] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)  # contestant -> method
    failed: list[dict] = field(default_factory=list)
    ceiling: list[dict] = field(default_factory=list)
    missing: int = 0  # runs that other contestants have

    @property
    def measures(self) -> Measures:
        """What its world measures."""
        return measures_of([*self.all_runs, *self.failed, *self.ceiling])

    @property
    def title(self) -> str:
        return f"{self.representation} (grid {self.grid})"

    @property
    def contest(self) -> bool:
        """Whether all of RIVALS were run, be it as one of MORE_RIVALS, and judged; else it says
        nothing of the claim."""
        judged = [values(self.all_runs, metric.column) for metric in self.measures.headline]
        return all(judged) and all(
            self.of(rival, *(more for more in MORE_RIVALS if more.startswith(f"{rival}-")))
            for rival in RIVALS
        )

    def of(self, *methods: str) -> list[str]:
        """Contestants of these methods."""
        return [c for c in self.runs if self.methods[c] in methods]

    @property
    def lods(self) -> list[str]:
        return [c for c in self.runs if self.methods[c].startswith("lods-")]

    @property
    def all_runs(self) -> list[dict]:
        return [row for rows in self.runs.values() for row in rows]

    def prompts(self) -> list[str]:
        return sorted({r["prompt"] for r in [*self.all_runs, *self.failed]})

    def seeds(self) -> list[str]:
        return sorted({r["seed"] for r in [*self.all_runs, *self.failed]}, key=by_seed)


def latest(rows: Iterable[dict]) -> list[dict]:
    """The last row of every run, sorted."""
    last = {
        tuple(r[k] for k in KEYS) + (r.get("settings", ""), r.get("steps", "")): r for r in rows
    }
    return [last[key] for key in sorted(last)]


def sections(rows: Iterable[dict]) -> list[Section]:
    """The runs of a table by grid and representation, studies last; of a run that was repeated, the
    last row."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in latest(rows):
        groups.setdefault((row["grid"], row["canvas"]), []).append(row)
    found = [_section(*key, rows) for key, rows in groups.items()]
    first = {id(s) for s in reported(found)}
    return sorted(found, key=lambda s: id(s) not in first)


def _section(grid: str, representation: str, rows: list[dict]) -> Section:
    section = Section(grid, representation)
    section.ceiling = [r for r in rows if r["prior"] == CEILING and r["status"] == "ok"]
    groups: dict[str, dict[tuple[str, str], list[dict]]] = {}
    for row in rows:
        if row["prior"] != CEILING:
            by_setting = groups.setdefault(row["prior"], {})
            key = row.get("settings", ""), row.get("steps", "")
            by_setting.setdefault(key, []).append(row)
    tried = {(r["prompt"], r["seed"]) for r in rows if r["prior"] != CEILING}
    for method in sorted(groups, key=rank):
        lengths = {steps for _, steps in groups[method]}
        for (setting, steps), mine in sorted(groups[method].items()):
            several = len(groups[method]) > 1
            name = f"{method}: {setting or 'as shipped'}" if several else method
            name += f", {steps} steps" if len(lengths) > 1 else ""
            section.methods[name] = method
            section.runs[name] = [r for r in mine if r["status"] == "ok"]
            section.failed += [r for r in mine if r["status"] != "ok"]
            section.missing += len(tried - {(r["prompt"], r["seed"]) for r in mine})
    return section


def reported(found: Iterable[Section]) -> list[Section]:
    """The sections of the grids that have all of RIVALS on some representation, or all sections
    where no grid has. The others are studies."""
    found = list(found)
    grids = {s.grid for s in found if s.contest}
    return [s for s in found if s.grid in grids or not grids]
