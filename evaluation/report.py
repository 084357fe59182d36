"""The report: ``python -m evaluation.report [--folder docs/evaluation]``.

From ``results.csv`` and, where they are there, ``curves.csv``, ``judge.csv``, ``tuning.csv`` and
``sheets/`` of the folder it writes ``report.md`` and ``report.html``, one page that needs no other
file. The same tables give the same bytes. What is absent is said to be absent.
"""

import argparse
import sys
from pathlib import Path

from evaluation.appendix import judge_blocks, tuning_blocks
from evaluation.document import (
    Bold,
    Bullets,
    Figure,
    Gallery,
    Heading,
    Table,
    Text,
    html,
    listed,
    markdown,
    plural,
)
from evaluation.overview import method, overview, progress
from evaluation.plots import lines, pareto, scatter
from evaluation.reasons import reasons
from evaluation.results import (
    CEILING,
    COSTS,
    HEADLINE,
    KEYS,
    METRICS,
    MORE_RIVALS,
    PRIORS,
    RIVALS,
    Metric,
    Section,
    latest,
    number,
    rank,
    read,
    sections,
    title_of,
    values,
)
from evaluation.statistics import ENOUGH_PROMPTS, Interval, interval, paired, ratio
from evaluation.table import sheet_path
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "evaluation"
TITLE = "Which prior distils best on the pocket world"
VERDICTS = {1: "leads", 0: "does not differ measurably from", -1: "is behind"}
RATIO = Metric("frechet", "Frechet distance", -1, 1, 2)


def show(metric: Metric, i: Interval, sign: str = "") -> str:
    """``mean [low, high]`` in the metric's unit."""
    if not i.runs:
        return "none"
    ends = f" [{metric.show(i.low, sign)}, {metric.show(i.high, sign)}]" if i.prompts > 1 else ""
    return metric.show(i.mean, sign) + ends


def named(metric: Metric) -> str:
    return metric.title.removesuffix(", %")


def measured(section: Section, metrics) -> list[Metric]:
    """The metrics that some run of the section has."""
    return [m for m in metrics if values(section.all_runs, m.column)]


def best_of(section: Section, metric: Metric) -> str | None:
    """The contestant with the best mean, if the interval of its paired difference to the second
    excludes zero."""
    runs = {c: values(section.runs[c], metric.column) for c in section.runs}
    means = {c: -metric.better * interval(r, draws=1).mean for c, r in runs.items() if r}
    first = sorted(means, key=lambda c: (means[c], c))[:2]
    if len(first) < 2 or paired(*(runs[c] for c in first)).sign != metric.better:
        return None
    return first[0]


def table(section: Section) -> list:
    """All metrics, a row a contestant, and the ceiling."""
    shown = measured(section, METRICS + COSTS)
    bold = {m.column: best_of(section, m) for m in shown if m in METRICS}
    rows = []
    for name, runs in [*section.runs.items(), ("true renders (ceiling)", section.ceiling)]:
        if runs is section.ceiling and not runs:
            continue
        row = [name, f"{len(runs)} ({len({r['prompt'] for r in runs})})"]
        for m in shown:
            cell = show(m, interval(values(runs, m.column)))
            row.append(Bold(cell) if bold.get(m.column) == name else cell)
        rows.append(row)
    blocks = [Table(["prior", "runs (prompts)", *(m.title for m in shown)], rows)]
    lacking = [named(m) for m in METRICS + COSTS if m not in shown]
    if lacking:
        blocks.append(Text(f"Not measured here: {listed(lacking)}."))
    top = interval(values(section.ceiling, HEADLINE[0].column))
    near = [
        name
        for name, runs in section.runs.items()
        if interval(values(runs, HEADLINE[0].column), draws=1).mean >= top.mean - 0.01
    ]
    if near:
        blocks.append(
            Text(
                f"Within a point of the true renders in {named(HEADLINE[0])}, which can no longer "
                f"tell them apart: {listed(near)}."
            )
        )
    if not section.ceiling:
        blocks.append(Text(f"The ceiling, rows of the prior {CEILING}, is absent."))
    return blocks


def comparison(section: Section, name: str, rival: str, metric: Metric) -> tuple[str, Interval]:
    """What the paired difference of two contestants says, in words, and the difference."""
    runs = [values(section.runs[c], metric.column) for c in (name, rival)]
    i = paired(*runs)
    if not i.runs:
        return "cannot be compared with", i
    if i.prompts < ENOUGH_PROMPTS:
        return "has too few prompts to be told apart from", i
    return VERDICTS[i.sign * metric.better], i


def differences(section: Section) -> list:
    """Paired differences of all to SDS, and of LODS to SDS, CSD and VSD where all were run."""
    shown = measured(section, METRICS)
    blocks = []
    for base in section.of("sds"):
        rows = []
        for name in section.runs:
            if name == base:
                continue
            row = [name]
            for m in shown:
                words, i = comparison(section, name, base, m)
                cell = show(m, i, "+")
                row.append(Bold(cell) if words == VERDICTS[1] else cell)
            distances = [values(section.runs[c], RATIO.column) for c in (name, base)]
            i = ratio(*distances)
            cell = show(RATIO, i)
            row.append(Bold(cell) if i.sign == RATIO.better else cell)
            rows.append(row)
        if rows:
            header = ["prior", *(m.title for m in shown), f"{RATIO.title} / {base}"]
            blocks += [
                Heading(3, f"Paired differences to {base}"),
                Table(header, rows),
                Text("Bold: better, and the interval excludes zero (of the ratio: one)."),
            ]
    if not blocks:
        blocks.append(Text("There are no differences to sds: it, or all others, were not run."))
    if not (section.contest and section.lods):
        return blocks
    rivals = section.of(*RIVALS, *MORE_RIVALS)
    rows = []
    for name in section.lods:
        for metric in measured(section, HEADLINE):
            row = [name, metric.title]
            for rival in rivals:
                words, i = comparison(section, name, rival, metric)
                cell = f"{show(metric, i, '+')}, {plural(i.runs, 'pair')}" if i.runs else "none"
                row.append(Bold(cell) if words == VERDICTS[1] else cell)
            rows.append(row)
    header = ["prior", "metric", *(f"− {rival}" for rival in rivals)]
    return [*blocks, Heading(3, f"LODS against {listed(RIVALS)}"), Table(header, rows)]


def by_prompt(section: Section) -> list:
    """Where which prior is strong: the headline metrics, a row a prompt, means over seeds."""
    blocks = []
    for metric in measured(section, HEADLINE):
        columns = [values(runs, metric.column) for runs in section.runs.values()]
        rows = []
        for prompt in section.prompts():
            means = [interval({k: v for k, v in c.items() if k[0] == prompt}) for c in columns]
            rows.append([prompt, *(show(metric, i) for i in means)])
        blocks += [Heading(3, f"By prompt: {metric.title}"), Table(["prompt", *section.runs], rows)]
    return blocks


def summary(found: list[Section]) -> list:
    """Whether a LODS prior leads SDS, CSD and VSD, canvas by canvas, and who is best; studies that
    lack one of these say nothing of it."""
    alone, rows, items = len({s.grid for s in found}) == 1, [], []
    won: dict[str, list[str]] = {"both": [], "distance": []}
    contests = [s for s in found if s.contest]
    for s in contests:
        where, rivals = title_of(s, alone), s.of(*RIVALS, *MORE_RIVALS)
        leading: dict[str, list[str]] = {"both": [], "distance": []}
        for name in s.lods:
            said = {m: [comparison(s, name, r, m)[0] for r in rivals] for m in HEADLINE}
            leads = [all(words == VERDICTS[1] for words in group) for group in said.values()]
            leading["both"] += [name] * all(leads)
            leading["distance"] += [name] * leads[1]
            cells = []
            for group in said.values():
                parts = [
                    f"{words} {listed(r for r, w in zip(rivals, group) if w == words)}"
                    for words in dict.fromkeys(group)
                ]
                cells.append("; ".join(parts))
            rows.append([where, name, *cells])
        if not s.lods:
            items.append(f"{where}: no LODS prior was run.")
        for what, names in leading.items():
            if names:
                won[what].append(f"{where} ({listed(names)}, against {listed(rivals)})")
        items += [f"{where}: {text}" for text in (*standing(s), *full_marks(s)) if text]
    head = (
        "The claim under test: learning the second score, as LODS does, leads to better object "
        f"accuracy and Frechet distance than {listed(RIVALS)} (and {listed(MORE_RIVALS)}, where it "
        "was run). A LODS prior is measurably better than all of them in both on "
        f"{_canvases(won['both'], contests)}; in the distance alone, on "
        f"{_canvases(won['distance'], contests)}."
    )
    if not contests:
        head = f"No canvas has all of {listed(RIVALS)}: the claim of LODS is not tested here."
        items += [f"{title_of(s, alone)}: {text}" for s in found for text in standing(s)]
    others = [title_of(s, alone) for s in found if s not in contests]
    if others and contests:
        items.append(
            f"Without all of {listed(RIVALS)}, and no test of the claim: {listed(others)}."
        )
    blocks = [Heading(2, "In short"), Text(head)]
    if rows:
        blocks.append(Table(["canvas", "prior", *(named(m) for m in HEADLINE)], rows))
    return [*blocks, Bullets(items)] if items else blocks


def _canvases(won: list[str], contests: list[Section]) -> str:
    return f"{len(won)} of {len(contests)} canvases: {listed(won)}" if won else "no canvas"


def standing(section: Section) -> list[str]:
    """Who has the lowest mean distance over the runs that all have, on how many prompts it is
    better than SDS, who cannot be told apart from it, and the fastest of them; of those with enough
    prompts."""
    metric, cost = HEADLINE[1], COSTS[0]
    every = {c: values(section.runs[c], metric.column) for c in section.runs}
    runs = {c: r for c, r in every.items() if interval(r, draws=1).prompts >= ENOUGH_PROMPTS}
    common = set.intersection(*map(set, runs.values())) if runs else set()
    runs = {c: {k: r[k] for k in common} for c, r in runs.items()}
    means = {c: interval(r, draws=1) for c, r in runs.items()}
    if len(means) < 2 or min(i.prompts for i in means.values()) < ENOUGH_PROMPTS:
        return []
    best = min(means, key=lambda c: (means[c].mean, c))
    prompts = [[k for k in common if k[0] == p] for p in sorted({p for p, _ in common})]
    near = [c for c in means if c != best and paired(runs[c], runs[best]).sign == 0]
    text = f"{best} has the lowest mean {metric.title}, {metric.show(means[best].mean)}"
    if len(common) < max(len(r) for r in section.runs.values()):
        text += f" over the {plural(len(common), 'run')} that all have"
    for sds in [c for c in section.of("sds") if c in means and c != best]:
        gains = [paired({k: runs[best][k] for k in at}, runs[sds], draws=1).mean for at in prompts]
        text += f", less than {sds} on {sum(g < 0 for g in gains)} of {len(gains)} prompts"
    all_others = ", and all others are measurably worse"
    text += f"; not told apart from it: {listed(near)}" if near else all_others
    if few := [c for c, r in every.items() if r and c not in means]:
        text += f" (left out, with fewer than {ENOUGH_PROMPTS} prompts: {listed(few)})"
    spent = {c: values(section.runs[c], cost.column) for c in (best, *near)}
    spent = {c: interval(r, draws=1).mean for c, r in spent.items() if r}
    if near and len(spent) > 1:
        fastest = min(spent, key=lambda c: (spent[c], c))
        text += f". Of these {fastest} is the fastest ({cost.show(spent[fastest])} s a run)"
    return [text + "."]


def full_marks(section: Section) -> list[str]:
    """Rivals that are right in every view: nobody can be better there."""
    metric, full = HEADLINE[0], []
    for rival in section.of(*RIVALS, *MORE_RIVALS):
        runs = values(section.runs[rival], metric.column)
        if interval(runs, draws=1).prompts >= ENOUGH_PROMPTS and min(runs.values()) == 1:
            full.append(rival)
    if not full:
        return []
    has = "has" if len(full) == 1 else "have"
    return [
        f"{listed(full)} {has} an {named(metric)} of 100 % in every run: in that, no prior can be "
        f"better, and the {HEADLINE[1].title} decides."
    ]


def color_of(prior: str) -> int:
    return PRIORS.index(prior) if prior in PRIORS else len(PRIORS)


def trade_offs(section: Section) -> list:
    """Quality against seconds, for the two headline metrics."""
    blocks = []
    for metric in HEADLINE:
        points = {}
        for name, runs in section.runs.items():
            cost = interval(values(runs, "seconds"), draws=1)
            quality = interval(values(runs, metric.column))
            if cost.runs and quality.runs:
                points[name] = (cost.mean, quality)
        if not points:
            blocks.append(
                Text(f"No plot of {named(metric)} against seconds: one of them is absent.")
            )
            continue
        front = pareto({n: (c, i.mean) for n, (c, i) in points.items()}, metric.better)
        scaled = {
            n: (
                c,
                Interval(*(metric.scale * v for v in (i.mean, i.low, i.high)), i.runs, i.prompts),
            )
            for n, (c, i) in points.items()
        }
        label = f"{metric.title} ({'more' if metric.better > 0 else 'less'} is better)"
        title = f"{section.canvas}: {named(metric)} against seconds of training"
        palette = {name: color_of(prior) for name, prior in section.priors.items()}
        bounds = 0.0, metric.scale * metric.most
        svg = scatter(scaled, palette, metric.better, title, ("seconds a run", label), bounds)
        caption = f"{title}. No other is better and faster (dashed): {', '.join(front)}."
        blocks.append(Figure(svg, caption))
    return [Heading(3, "Quality against time"), *blocks]


def learning(section: Section, curves) -> list:
    """The learnt prior's own denoising loss: its change over the run, and its curve."""
    first, last = "prior_loss_first", "prior_loss_last"
    metric = Metric(last, "loss", -1, 1, 4)
    blocks, rows = [Heading(3, "What the priors learn")], []
    for name, runs in section.runs.items():
        ends = [values(runs, column) for column in (first, last)]
        if all(ends):
            change = paired(ends[1], ends[0])
            verdict = {1: "rises", 0: "does not change measurably", -1: "falls"}[change.sign]
            if change.prompts < ENOUGH_PROMPTS:
                verdict = "too few prompts to say"
            cells = [show(metric, interval(e)) for e in ends]
            rows.append([name, *cells, show(metric, change, "+"), verdict])
    if rows:
        header = ["prior", "loss, first tenth of the steps", "last tenth", "change", "verdict"]
        blocks.append(Table(header, rows))
        # noise is harder to tell from a picture the less of it there is
        annealed = (
            "Later steps draw smaller timesteps, at which the loss is larger: one that rises does "
            "not mean that nothing was learnt."
        )
        blocks.append(Text(annealed))
    else:
        blocks.append(Text("No prior here has a denoising loss of its own in results.csv."))
    if curves is None:
        return [*blocks, Text("curves.csv is absent: no learning curves.")]
    last_rows = {}
    for row in curves:
        if (row["grid"], row["canvas"]) == (section.grid, section.canvas):
            last_rows[tuple(row[k] for k in KEYS) + (row["step"],)] = row
    points: dict[str, dict[float, list[float]]] = {}
    runs: dict[str, set] = {}
    for key in sorted(last_rows):
        row, prior = last_rows[key], key[2]
        step, loss = number(row, "step"), number(row, "prior_loss")
        if step is not None and loss is not None:
            points.setdefault(prior, {}).setdefault(step, []).append(loss)
            runs.setdefault(prior, set()).add(key[3:5])
    if not points:
        return [*blocks, Text("curves.csv has no loss of a prior on this canvas.")]
    order = sorted(points, key=rank)
    series = {p: [(step, sum(v) / len(v)) for step, v in sorted(points[p].items())] for p in order}
    palette = {p: color_of(p) for p in order}
    title = f"{section.canvas}: denoising loss of the learnt prior"
    caption = f"{title}, mean over runs ({', '.join(f'{p} {len(runs[p])}' for p in order)})."
    return [*blocks, Figure(lines(series, palette, title, ("step", "loss")), caption)]


def sheets(section: Section, folder: Path) -> list:
    """Contact sheets of the first seed, prompts down and priors across."""
    shown = list(dict.fromkeys(section.priors.values())) + [CEILING]
    seeds, rows, seen = section.seeds(), [], set()
    for prompt in section.prompts():
        keys = ((section.grid, section.canvas, prior, prompt, seeds[0]) for prior in shown)
        files = [f if (f := sheet_path(folder, *key)).exists() else None for key in keys]
        seen |= {prior for prior, file in zip(shown, files) if file}
        rows.append((prompt, files))
    blocks = [Heading(3, "Contact sheets")]
    if not seen:
        return [*blocks, Text("There are no contact sheets of this canvas.")]
    kept = [k for k, prior in enumerate(shown) if prior in seen or prior != CEILING]
    text = f"The pictures of seed {seeds[0]}."
    if section.canvas != "2d":
        text = f"Seed {seeds[0]} at azimuths of 0, 90, 180 and 270 degrees."
    gallery = Gallery(
        [shown[k] for k in kept], [(p, [files[k] for k in kept]) for p, files in rows], folder
    )
    return [*blocks, Text(text), gallery]


def blocks_of(folder: Path) -> list:
    """The whole report as blocks of ``evaluation.document``."""
    results = read(folder / "results.csv", (*KEYS, "status"))
    curves = read(folder / "curves.csv", (*KEYS, "step", "prior_loss"))
    tuning = read(folder / "tuning.csv", (*KEYS, "settings", "status"))
    found = sections(results or ())
    replaced = len(results or ()) - len(latest(results or ()))
    judge = read(folder / "judge.csv", ("test", "level", "n"))
    tables = {"results": results, "curves": curves, "judge": judge, "tuning": tuning}
    there = [f"{name}.csv" for name, rows in tables.items() if rows is not None]
    absent = [f"{name}.csv" for name, rows in tables.items() if rows is None]
    source = "Made by make report from the tables beside it"
    if there:
        source += f": every number is computed from {listed(there)}"
    if absent:
        source += f". Absent: {listed(absent)}"
    blocks = [Heading(1, TITLE), Text(f"{source}.")]
    if found:
        unfinished = progress(results)
        blocks += [Text(unfinished)] if unfinished else []
        blocks += [*summary(found), *method(found, judge), *reasons(found, tuning)]
    else:
        blocks.append(Text("results.csv is absent or empty: no prior was measured."))
    alone = len({s.grid for s in found}) == 1
    for section in found:
        blocks.append(Heading(2, f"Canvas {title_of(section, alone)}"))
        blocks += [*table(section), *differences(section), *by_prompt(section)]
        blocks += [*trade_offs(section), *learning(section, curves), *sheets(section, folder)]
    blocks += overview(found, replaced) if found else []
    return [*blocks, *judge_blocks(judge), *tuning_blocks(tuning, found)]


def write(folder: Path):
    """Write ``report.md`` and ``report.html`` into ``folder``."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one of results.csv by --folder")
    blocks = blocks_of(folder)
    for name, text in {"report.md": markdown(blocks), "report.html": html(blocks, TITLE)}.items():
        with whole_file(folder / name) as tmp:
            tmp.write_text(text, encoding="utf-8", errors="replace")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.report", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of results.csv and the report")
    options = parser.parse_args(arguments)
    try:
        write(options.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"wrote {options.folder / 'report.md'} and {options.folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
