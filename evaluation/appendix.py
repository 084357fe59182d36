"""The report's sections on the judge and on the tuning."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from evaluation.document import Bold, Bullets, Heading, Table, Text, listed, plural
from evaluation.results import HEADLINE, Metric, Section, latest, number, rank, reported, values
from evaluation.statistics import interval

SHARES = (
    ("kind_accuracy", "object, %"),
    ("color_accuracy", "colour, %"),
    ("view_accuracy", "view, %"),
    ("front_seen_behind", "front seen from behind, %"),
    ("commonest_kind", "commonest object, %"),
    ("commonest_color", "commonest colour, %"),
    ("commonest_view", "commonest view, %"),
)
# In growing strength, as judge.csv lists them.
DAMAGES = ("blurred", "noise", "half-transparent", "patches shuffled")
# How much more often than chance the commonest answer may come before it is called fixed.
FIXED = 4
# Settings whose effect is shown prior by prior.
VARIED = {
    "system.guidance.guidance_scale": "guidance scale",
    "system.optimizer.params.guidance.lr": "learning rate of the learnt prior",
    "scene_lr": "learning rate of what is optimised, as a multiple of the configuration's",
}


def percent(row: dict, column: str) -> str:
    value = number(row, column)
    return "" if value is None else f"{100 * value:.1f}"


def judge_blocks(rows: Sequence[dict] | None) -> list:
    """What the judge says of true renders and of objects made wrong on purpose."""
    blocks = [Heading(2, "The judge")]
    if not rows:
        return [*blocks, Text("judge.csv is absent: the judge was not checked.")]
    shares = [(column, title) for column, title in SHARES if any(r.get(column) for r in rows)]
    table = [
        [
            f"{r['test']}: {r['level']}" if r["level"] else r["test"],
            r["n"],
            *(percent(r, column) for column, _ in shares),
            "" if (value := number(r, "frechet")) is None else f"{value:.1f}",
        ]
        for r in rows
    ]
    header = ["test", "pictures", *(title for _, title in shares), "Frechet distance"]
    by_test: dict[str, list[dict]] = {}
    for r in rows:
        by_test.setdefault(r["test"], []).append(r)
    return [
        *blocks,
        Text(
            "Held-out renders of known kind, colour and view, as they are and changed in ways in "
            "which distilled objects go wrong. Chance is 5 % for the object, 12.5 % for the colour "
            "and 25 % for the view. The Frechet distance is to other true renders of the same "
            "labels; for true renders it is the floor that so many pictures have."
        ),
        Bullets([*_truths(by_test), *_fronts(by_test), *_ladders(by_test)]),
        Table(header, table),
    ]


def _truths(by_test: dict[str, list[dict]]) -> list[str]:
    told = [
        f"True renders on {r['level']}: object {percent(r, 'kind_accuracy')} %, colour "
        f"{percent(r, 'color_accuracy')} %, view {percent(r, 'view_accuracy')} %."
        for r in by_test.get("true renders", ())
    ]
    for r in by_test.get("another colour", ()):
        told.append(
            f"Objects in another colour than asked for: the judge says {r['level']} in "
            f"{percent(r, 'color_accuracy')} %."
        )
    return told


def _fronts(by_test: dict[str, list[dict]]) -> list[str]:
    """What a Janus rate of 0 and of 100 % look like to the judge, and what it takes for fronts."""
    told = []
    for test in ("seen from behind", "front mirrored to the back", "front on both sides"):
        rates = [(r["level"], number(r, "front_seen_behind")) for r in by_test.get(test, ())]
        rates = [(level, rate) for level, rate in rates if rate is not None]
        if rates:
            each = " and ".join(f"{100 * rate:.1f} % of views at {level}" for level, rate in rates)
            whole = 100 * sum(rate for _, rate in rates) / len(rates)
            told.append(f"{test.capitalize()}: a front is seen in {each}, a rate of {whole:.1f} %.")
    false = [
        (rate, test, r["level"])
        for test in DAMAGES
        for r in by_test.get(test, ())
        if (rate := number(r, "front_seen_behind")) is not None
    ]
    if false:
        rate, test, level = max(false)
        told.append(
            f"Damage makes fronts where there are none: in up to {100 * rate:.1f} % of the views "
            f"from behind ({test} {level})."
        )
    return told


def _ladders(by_test: dict[str, list[dict]]) -> list[str]:
    """How the worst level of each kind of damage does, and whether the distance rises on the
    way."""
    told = []
    for test in DAMAGES:
        steps = by_test.get(test, [])
        ladder = [*by_test.get("true renders", [])[:1], *steps]
        if len(steps) < 2 or not all(r.get("frechet") for r in ladder):
            continue
        falls = [
            r["level"]
            for before, r in pairwise(ladder)
            if number(r, "frechet") <= number(before, "frechet")
        ]
        last = steps[-1]
        text = (
            f"{test.capitalize()}, up to {last['level']}: object accuracy ends at "
            f"{percent(last, 'kind_accuracy')} %, and the Frechet distance "
        )
        text += f"does not rise at {', '.join(falls)}" if falls else "rises at every level"
        if (share := number(last, "commonest_kind")) is not None:
            text += f"; the commonest answer, {last['commonest']}, is given in {100 * share:.1f} %"
            text += " (near a fixed answer, not chance)" if share > FIXED / 20 else ""
        told.append(text + ".")
    return told


def tried_settings(rows: Iterable[dict]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """(canvas, prior) -> settings -> rows of a tuning."""
    groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in latest(rows):
        tried = groups.setdefault((row["canvas"], row["prior"]), {})
        tried.setdefault(row["settings"], []).append(row)
    return groups


def brief(settings: str) -> str:
    """Settings without what their names have in common."""
    return re.sub(r"system\.(guidance\.|loss\.|optimizer\.params\.)?", "", settings)


def tuning_blocks(rows: Sequence[dict] | None, every_section: Sequence[Section]) -> list:
    """Which settings were tried for every prior, how they did, and which the results use."""
    found = reported(every_section)
    blocks = [Heading(2, "Tuning")]
    if not rows:
        return [*blocks, Text("tuning.csv is absent: what was tried for each prior is not known.")]
    groups = tried_settings(rows)
    used = {r["prompt"] for s in found for r in s.all_runs}
    shared = sorted({r["prompt"] for r in rows} & used)
    items = [
        f"Prompts of the tuning that the results use too: {'; '.join(shared) or 'none'}.",
        "Names are brief: guidance_scale is system.guidance.guidance_scale, lambda_sds "
        "system.loss.lambda_sds, guidance.lr system.optimizer.params.guidance.lr; scene_lr is a "
        "factor on the configuration's rates of what is optimised.",
    ]
    asked = {r["prompt"] for r in rows}
    for grid in dict.fromkeys(s.grid for s in every_section if s not in found):
        own = {r["prompt"] for s in every_section if s.grid == grid for r in s.all_runs}
        if own & asked:
            items.append(
                f"The study {grid} has {len(own & asked)} of its {plural(len(own), 'prompt')} from "
                "the tuning: it explores, and tests nothing."
            )
    for canvas in sorted({canvas for canvas, _ in groups}):
        budgets = {
            prior: (len(tried), sum(map(len, tried.values())))
            for (where, prior), tried in sorted(groups.items())
            if where == canvas
        }
        if len(set(budgets.values())) == 1:
            settings, runs = next(iter(budgets.values()))
            items.append(
                f"{canvas}: the same budget, {plural(settings, 'setting')} in "
                f"{plural(runs, 'run')} a prior."
            )
        else:
            each = ", ".join(
                f"{p} {plural(n, 'setting')} in {plural(runs, 'run')}"
                for p, (n, runs) in budgets.items()
            )
            items.append(f"{canvas}: budgets differ: {each}.")
        if edges := _edges(groups, canvas, found):
            items.append(
                f"{canvas}: chosen at the edge of what was tried, so that more of it may be better "
                f"still: {'; '.join(edges)}."
            )
    blocks.append(Bullets(items))
    for canvas in sorted({canvas for canvas, _ in groups}):
        here = {prior: tried for (where, prior), tried in groups.items() if where == canvas}
        common = shared_prompts(here)
        every = sorted({r["prompt"] for of in here.values() for rs in of.values() for r in rs})
        blocks.append(Heading(3, f"Canvas {canvas}"))
        header = ["prior", "settings", "finished runs", *(m.title for m in HEADLINE)]
        if len(every) > len(common):
            blocks.append(
                Text(
                    f"All settings were run with {listed(sorted(common))}, and the means are over "
                    "these; the best two of each prior then with the others, and the last mean is "
                    "over all."
                )
            )
            header.append(f"{HEADLINE[1].title}, {len(every)} prompts")
        table = []
        for prior in sorted(here, key=rank):
            chosen = _chosen(prior, canvas, here[prior], found)
            for settings, rows in sorted(here[prior].items()):
                done = [r for r in rows if r["status"] == "ok"]
                cells = [_mean(m, (r for r in done if r["prompt"] in common)) for m in HEADLINE]
                if len(every) > len(common):
                    whole = {r["prompt"] for r in rows} == set(every)
                    cells.append(_mean(HEADLINE[1], done) if whole else "")
                row = [
                    prior,
                    brief(settings) or "as shipped",
                    f"{len(done)} of {len(rows)}",
                    *cells,
                ]
                row.append("chosen" if settings in chosen else "")
                table.append([Bold(c) for c in row] if settings in chosen else row)
            if not chosen:
                blank = [""] * (len(header) - 2 + 1)
                table.append([prior, "none of these is what the results use", *blank])
        blocks.append(Table([*header, "in the results"], table))
        first = {prior: only(tried, common) for prior, tried in here.items()}
        for key, what in VARIED.items():
            blocks += _by_value(first, key, what, common)
    return blocks


def _edges(groups, canvas: str, found: Sequence[Section]) -> list[str]:
    """Priors whose chosen value is the lowest or the highest of the several that were tried."""
    told = []
    for key, what in VARIED.items():
        ends: dict[str, list[str]] = {"lowest": [], "highest": []}
        for prior in sorted((p for c, p in groups if c == canvas), key=rank):
            tried = {s: _value(s, key) for s in groups[canvas, prior]}
            known = {value for value in tried.values() if value is not None}
            chosen = {tried[s] for s in _chosen(prior, canvas, tried, found)}
            if len(known) > 1:
                ends["lowest"] += [prior] * (chosen == {min(known)})
                ends["highest"] += [prior] * (chosen == {max(known)})
        told += [f"{end} {what}: {', '.join(of)}" for end, of in ends.items() if of]
    return told


def _mean(metric: Metric, rows: Iterable[dict]) -> str:
    i = interval(values(rows, metric.column), draws=1)
    return metric.show(i.mean) if i.runs else "none"


def shared_prompts(here: dict[str, dict[str, list[dict]]]) -> set[str]:
    """Of the settings of a canvas, by prior, the prompts that most were run with: those of the
    first round, which all have, where the best had a second."""
    counts = Counter(
        prompt
        for tried in here.values()
        for rows in tried.values()
        for prompt in {r["prompt"] for r in rows}
    )
    return {prompt for prompt, n in counts.items() if n == max(counts.values())}


def only(tried: dict[str, list[dict]], prompts: set[str]) -> dict[str, list[dict]]:
    """The rows of these prompts."""
    return {s: [r for r in rows if r["prompt"] in prompts] for s, rows in tried.items()}


def by_value(
    tried: dict[str, dict[str, list[dict]]], key: str, metric: Metric = HEADLINE[1]
) -> dict[str, dict[float, float]]:
    """Of each prior that ``key`` was varied for, the lowest mean distance at each of its values,
    the other settings being the best there, of settings of which no run failed. ``tried`` has the
    rows of prior and settings."""
    found: dict[str, dict[float, float]] = {}
    for prior, settings in tried.items():
        for text, rows in settings.items():
            value = _value(text, key)
            done = values((r for r in rows if r["status"] == "ok"), metric.column)
            # what failed on a hard prompt would look better for it
            if value is not None and done and len(done) == len(rows):
                of = found.setdefault(prior, {})
                mean = interval(done, draws=1).mean
                of[value] = min(mean, of.get(value, math.inf))
    return {prior: of for prior, of in found.items() if len(of) > 1}


def _value(settings: str, key: str) -> float | None:
    """A setting as YAML has numbers; None for what is none."""
    text = dict(t.split("=", 1) for t in shlex.split(settings)).get(key)
    try:
        return None if text is None else float(text.replace(".inf", "inf"))
    except ValueError:
        return None


def _by_value(tried: dict[str, dict[str, list[dict]]], key: str, what: str, prompts) -> list:
    metric, found = HEADLINE[1], by_value(tried, key)
    if not found:
        return []
    columns = sorted({value for of in found.values() for value in of})
    table = [
        [prior, *(metric.show(found[prior][v]) if v in found[prior] else "" for v in columns)]
        for prior in sorted(found, key=rank)
    ]
    text = f"{metric.title} by {what}, each with the best of the other settings, means over "
    text += f"{listed(sorted(prompts))}:"
    return [Text(text), Table(["prior", *(f"{v:g}" for v in columns)], table)]


def _chosen(prior: str, canvas: str, tried, found: Sequence[Section]) -> set[str]:
    """The tried settings that the runs in the results have: those whose overrides are theirs, or
    else among theirs, the most of them."""
    runs = [r for s in found if s.canvas == canvas for r in s.all_runs if r["prior"] == prior]
    chosen = set()
    for used in {r.get("settings", "") for r in runs}:
        overrides = set(used.split())
        fitting = [t for t in tried if t.split() and set(t.split()) <= overrides]
        if fitting or used in tried:
            chosen.add(max(fitting or [used], key=lambda t: (len(t.split()), t)))
    return chosen
