"""Which settings were tried for every method, how they did, and which the results use: tables."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence

from evaluation.measures import SHAPES, Measures, Metric, measures_of
from evaluation.page import Bold, Heading, Table
from evaluation.results import Section, latest, rank, reported, values
from evaluation.statistics import interval

# settings whose effect is shown method by method
VARIED = {
    "system.guidance.guidance_scale": "guidance scale",
    "system.optimizer.params.guidance.lr": "learning rate of the learned part",
    "scene_lr": "learning rates of the representation, as multiples of the configuration's",
}
Tried = dict[str, dict[str, list[dict]]]  # method -> settings -> rows


def tried_settings(rows: Iterable[dict]) -> dict[str, Tried]:
    """The rows of a tuning by representation, method and settings."""
    groups: dict[str, Tried] = {}
    for row in latest(rows):
        settings = groups.setdefault(row["canvas"], {}).setdefault(row["prior"], {})
        settings.setdefault(row["settings"], []).append(row)
    return groups


def brief(settings: str) -> str:
    """Settings without what their names have in common."""
    return re.sub(r"system\.(guidance\.|loss\.|optimizer\.params\.)?", "", settings)


def tuning_blocks(rows: Sequence[dict] | None, sections: Sequence[Section]) -> list:
    """The tables; none where there is no tuning."""
    blocks = [Heading(2, "Tuning")] if rows else []
    measures = measures_of(rows or ())
    for representation, tried in sorted(tried_settings(rows or ()).items()):
        blocks.append(Heading(3, f"Tuning on {representation}"))
        blocks += [_settings(representation, tried, reported(sections), measures)]
        first = {method: only(of, shared_prompts(tried)) for method, of in tried.items()}
        blocks += [
            table for key in VARIED if (table := _by_value(first, key, measures.headline[1]))
        ]
    return blocks


def _settings(
    representation: str, tried: Tried, found: Sequence[Section], measures: Measures
) -> Table:
    common = shared_prompts(tried)
    every = {r["prompt"] for of in tried.values() for rows in of.values() for r in rows}
    headline, metric = measures.headline, measures.headline[1]
    header = ["method", "settings", "finished runs"]
    header += [f"{m.title}, {len(common)} prompts" for m in headline]
    header += [f"{metric.title}, {len(every)} prompts", "in the results"]
    table = []
    for method in sorted(tried, key=rank):
        chosen = chosen_settings(method, representation, tried[method], found)
        for settings, rows in sorted(tried[method].items()):
            done = [r for r in rows if r["status"] == "ok"]
            cells = [_mean(m, (r for r in done if r["prompt"] in common)) for m in headline]
            cells.append(_mean(metric, done) if {r["prompt"] for r in rows} == every else "")
            cells.append("chosen" if settings in chosen else "")
            row = [method, brief(settings) or "as shipped", f"{len(done)} of {len(rows)}", *cells]
            table.append([Bold(c) for c in row] if settings in chosen else row)
    caption = (
        "Every setting was run with the same few prompts, the best two of each method then with "
        "more. Names are brief: guidance_scale is system.guidance.guidance_scale, guidance.lr "
        "system.optimizer.params.guidance.lr; scene_lr is a factor on all other learning rates."
    )
    return Table(header, table, caption)


def _mean(metric: Metric, rows: Iterable[dict]) -> str:
    i = interval(values(rows, metric.column), draws=1)
    return metric.show(i.mean) if i.runs else "none"


def shared_prompts(tried: Tried) -> set[str]:
    """The prompts that most settings were run with: those of the first round, which all have, where
    the best had a second."""
    counts = Counter(
        prompt
        for settings in tried.values()
        for rows in settings.values()
        for prompt in {r["prompt"] for r in rows}
    )
    return {prompt for prompt, n in counts.items() if n == max(counts.values())}


def only(settings: dict[str, list[dict]], prompts: set[str]) -> dict[str, list[dict]]:
    """The rows of these prompts."""
    return {s: [r for r in rows if r["prompt"] in prompts] for s, rows in settings.items()}


def by_value(
    tried: Tried, key: str, metric: Metric = SHAPES.headline[1]
) -> dict[str, dict[float, float]]:
    """Of each method that ``key`` was varied for, the best mean of the metric at each value, the
    other settings being the best there, of settings of which no run failed."""
    found: dict[str, dict[float, float]] = {}
    for method, settings in tried.items():
        for text, rows in settings.items():
            value = value_of(text, key)
            done = values((r for r in rows if r["status"] == "ok"), metric.column)
            # what failed on a hard prompt would look better for it
            if value is not None and done and len(done) == len(rows):
                of = found.setdefault(method, {})
                means = interval(done, draws=1).mean, of.get(value, -metric.better * math.inf)
                of[value] = max(means) if metric.better > 0 else min(means)
    return {method: of for method, of in found.items() if len(of) > 1}


def value_of(settings: str, key: str) -> float | None:
    """A setting as YAML has numbers; None for what is none."""
    text = dict(t.split("=", 1) for t in shlex.split(settings)).get(key)
    try:
        return None if text is None else float(text.replace(".inf", "inf"))
    except ValueError:
        return None


def _by_value(tried: Tried, key: str, metric: Metric) -> Table | None:
    found = by_value(tried, key, metric)
    if not found:
        return None
    columns = sorted({value for of in found.values() for value in of})
    table = [
        [method, *(metric.show(found[method][v]) if v in found[method] else "" for v in columns)]
        for method in sorted(found, key=rank)
    ]
    caption = f"{metric.title} by {VARIED[key]}, each with the best of the other settings."
    return Table(["method", *(f"{v:g}" for v in columns)], table, caption)


def chosen_settings(method: str, representation: str, tried, found: Sequence[Section]) -> set[str]:
    """The tried settings that the runs in the results have: those whose overrides are theirs, or
    else among theirs, the most of them."""
    here = [s for s in found if s.representation == representation]
    runs = [r for s in here for r in s.all_runs if r["prior"] == method]
    chosen = set()
    for used in {r.get("settings", "") for r in runs}:
        overrides = set(used.split())
        fitting = [t for t in tried if t.split() and set(t.split()) <= overrides]
        if fitting or used in tried:
            chosen.add(max(fitting or [used], key=lambda t: (len(t.split()), t)))
    return chosen
