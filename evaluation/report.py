"""The report: ``python -m evaluation.report [--folder docs/evaluation]``.

From ``results.csv`` and, where they are there, ``curves.csv``, ``judge.csv``, ``tuning.csv``,
``sheets/`` and ``summary.md``, a paragraph that somebody wrote, it makes ``report.md`` and
``report.html``, one page that needs no other file, and the montages. The same tables give the same
bytes.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.machine import TABLES
from evaluation.measures import COSTS, Metric, measures_of
from evaluation.montage import montage
from evaluation.page import Bold, Figure, Heading, Table, Text, html, markdown
from evaluation.plots import lines, scatter
from evaluation.results import (
    CEILING,
    KEYS,
    METHODS,
    MORE_RIVALS,
    RIVALS,
    Section,
    by_seed,
    number,
    rank,
    read,
    sections,
    values,
)
from evaluation.statistics import Interval, interval, paired, ratio
from evaluation.table import sheet_path
from evaluation.tool import write_files
from evaluation.tuning import tuning_blocks
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file

FOLDER = TABLES

GRADIENTS = {  # eps is the model's prediction of the noise, s the guidance scale
    "sds": "the guided eps minus the noise that was added (DreamFusion)",
    "csd": "eps with the prompt minus eps without (CSD)",
    "vsd": "the guided eps minus that of a LoRA that learns the renders (ProlificDreamer)",
    "nfsd": "s (eps with the prompt minus eps without) plus a term towards real pictures (NFSD)",
    "bridge": "SDS, then eps with the prompt minus eps with a text of the renders (SDS-Bridge)",
    "ism": "the guided eps minus that at an earlier step of a DDIM inversion (LucidDreamer)",
    "sdi": "the guided eps minus the noise that a DDIM inversion of the render finds (SDI)",
    "lods-embedding": "eps with the prompt minus noise / s and (s - 1) / s times eps with a text "
    "embedding that learns the renders (LODS)",
    "lods-lora": "the same with a LoRA that learns the renders (LODS)",
    "...-fast": "a LoRA that learns at a rate of 4e-3",
    "...-guided": "a target that is predicted with guidance (prompt_scale)",
    "...-4": "four updates of the learned part a step",
    "...-draws": "one update from four draws",
    "...-monotone": "timesteps that only fall",
    "...-after-sds": "a first half of SDS",
    "...-100": "a guidance scale of 100; so for other numbers",
}
SHARES = {
    "kind_accuracy": "object, %",
    "color_accuracy": "colour, %",
    "view_accuracy": "view, %",
    "front_seen_behind": "front seen from behind, %",
    "commonest_kind": "commonest object, %",
    "commonest_color": "commonest colour, %",
    "commonest_view": "commonest view, %",
}
MACHINE = ("device", "cpu", "threads", "python", "torch", "diffusers", "peft", "commit")
CONTESTANTS = ("sds", "vsd", "lods-embedding", "lods-lora", CEILING)  # of the grid objects
# montages of the first seed: (grid, representation) -> file and methods
MONTAGES = {
    ("shapes", "gaussians"): (
        "gaussians.webp",
        ("sds", "csd", "vsd-fast", "lods-embedding", "lods-lora", "lods-lora-fast", CEILING),
    ),
    ("objects", "gaussians-tokens"): ("tokens.webp", CONTESTANTS),
    ("objects", "gaussians-words"): ("words.webp", CONTESTANTS),
    ("objects", "radiance-tokens"): ("radiance.webp", ("sds", "lods-lora", CEILING)),
    ("improve", "2d"): (
        "scale-100.webp",
        ("sds", "csd", "lods-embedding", "lods-lora", "lods-lora-4", CEILING),
    ),
}


def show(metric: Metric, i: Interval, sign: str = "") -> str:
    """``mean [low, high]`` in the metric's unit."""
    if not i.runs:
        return "none"
    ends = f" [{metric.show(i.low, sign)}, {metric.show(i.high, sign)}]" if i.prompts > 1 else ""
    return metric.show(i.mean, sign) + ends


def measured(section: Section, metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics that some run of the section has."""
    return [m for m in metrics if values(section.all_runs, m.column)]


def best_of(section: Section, metric: Metric) -> str | None:
    """The contestant with the best mean, if the interval of its paired difference to the second
    excludes zero."""
    runs = {c: values(section.runs[c], metric.column) for c in section.runs}
    means = {c: -metric.better * interval(r, draws=1).mean for c, r in runs.items() if r}
    first = sorted(means, key=lambda c: (means[c], c))[:2]
    if len(first) < 2 or not metric.improves(paired(*(runs[c] for c in first)).sign):
        return None
    return first[0]


def difference(section: Section, name: str, base: str, metric: Metric) -> str:
    """The paired difference of two contestants, bold if it is measurably for the first."""
    i = paired(*(values(section.runs[c], metric.column) for c in (name, base)))
    cell = show(metric, i, "+")
    return Bold(cell) if metric.improves(i.sign) else cell


def means(section: Section) -> list:
    """All metrics, a row a contestant, and the true renders."""
    metrics = section.measures.metrics
    shown = measured(section, metrics + COSTS)
    bold = {m.column: best_of(section, m) for m in shown if m in metrics}
    rows = []
    for name, runs in [*section.runs.items(), ("true renders", section.ceiling)]:
        if runs is section.ceiling and not runs:
            continue
        row = [name, f"{len(runs)} ({len({r['prompt'] for r in runs})})"]
        for m in shown:
            cell = show(m, interval(values(runs, m.column)))
            row.append(Bold(cell) if bold.get(m.column) == name else cell)
        rows.append(row)
    return [Table(["method", "runs (prompts)", *(m.title for m in shown)], rows)]


def differences(section: Section) -> list:
    """Paired differences of all to SDS, and of LODS to its rivals where all were run."""
    metrics, whole = section.measures, section.measures.ratio
    shown, blocks = measured(section, metrics.metrics), []
    for base in section.of("sds"):
        rows = []
        for name in section.runs:
            if name == base:
                continue
            rows.append([name, *(difference(section, name, base, m) for m in shown)])
            if whole:
                i = ratio(*(values(section.runs[c], whole.column) for c in (name, base)))
                cell = show(whole, i)
                rows[-1].append(Bold(cell) if whole.improves(i.sign) else cell)
        if rows:
            header = ["method", *(m.title for m in shown)]
            header += [f"{whole.title} / {base}"] if whole else []
            blocks += [Heading(3, f"Paired differences to {base}"), Table(header, rows)]
    if section.contest and section.lods:
        rivals = section.of(*RIVALS, *MORE_RIVALS)
        rows = [
            [name, m.title, *(difference(section, name, rival, m) for rival in rivals)]
            for name in section.lods
            for m in measured(section, metrics.headline)
        ]
        header = ["method", "metric", *(f"− {rival}" for rival in rivals)]
        blocks += [Heading(3, "LODS minus its rivals"), Table(header, rows)]
    return blocks


def by_prompt(section: Section) -> list:
    """The headline metrics, a row a prompt, means over seeds."""
    blocks = []
    for metric in measured(section, section.measures.headline):
        columns = [values(runs, metric.column) for runs in section.runs.values()]
        rows = []
        for prompt in section.prompts():
            cells = [interval({k: v for k, v in c.items() if k[0] == prompt}) for c in columns]
            rows.append([prompt, *(show(metric, i) for i in cells)])
        blocks += [Heading(3, f"By prompt: {metric.title}"), Table(["prompt", *section.runs], rows)]
    return blocks


def looks(methods: Mapping[str, str]) -> dict[str, int]:
    """A number for each contestant, by which plots choose colours: for a known method always the
    same one."""
    others = [c for c, m in methods.items() if rank(m)[0] == len(METHODS) or c != m]
    return {c: len(METHODS) + others.index(c) if c in others else rank(c)[0] for c in methods}


def trade_offs(section: Section) -> list:
    """Plots of quality against seconds, for the two headline metrics."""
    blocks = []
    for m in section.measures.headline:
        points = {}
        for name, runs in section.runs.items():
            cost = interval(values(runs, "seconds"), draws=1)
            i = interval(values(runs, m.column))
            if cost.runs and i.runs:
                ends = (m.scale * v for v in (i.mean, i.low, i.high))
                points[name] = cost.mean, Interval(*ends, i.runs, i.prompts)
        if points:
            title = f"{section.title}: {m.title} against seconds of training"
            ranks = looks(section.methods)
            labels = "seconds a run", f"{m.title} ({'more' if m.better > 0 else 'less'} is better)"
            svg = scatter(points, ranks, m.better, title, labels)
            blocks.append(Figure(svg, "Dashed: the methods that no other beats in both."))
    return [Heading(3, "Quality against time"), *blocks] if blocks else []


def learning(section: Section, curves: Sequence[dict]) -> list:
    """The denoising loss of the learned part: its change over the run, and its curve."""
    metric = Metric("prior_loss_last", "loss", -1, 1, 4)
    rows = []
    for name, runs in section.runs.items():
        ends = [values(runs, column) for column in ("prior_loss_first", metric.column)]
        if all(ends):
            cells = [show(metric, interval(e)) for e in ends]
            rows.append([name, *cells, show(metric, paired(ends[1], ends[0]), "+")])
    if not rows:
        return []
    header = ["method", "loss, first tenth of the steps", "last tenth", "change"]
    caption = "Later steps draw smaller timesteps, at which the loss is larger."
    blocks = [Heading(3, "What the learned parts learn"), Table(header, rows, caption)]
    last = {}
    for row in curves:
        if (row["grid"], row["canvas"]) == (section.grid, section.representation):
            last[tuple(row[k] for k in KEYS) + (row["step"],)] = row
    points: dict[str, dict[float, list[float]]] = {}
    for key in sorted(last):
        step, loss = number(last[key], "step"), number(last[key], "prior_loss")
        if step is not None and loss is not None:
            points.setdefault(key[2], {}).setdefault(step, []).append(loss)
    if points:
        order = sorted(points, key=rank)
        series = {m: [(s, sum(v) / len(v)) for s, v in sorted(points[m].items())] for m in order}
        title = f"{section.title}: denoising loss of the learned part"
        ranks = looks({name: name for name in section.methods.values()})
        svg = lines(series, ranks, title, ("step", "loss"))
        blocks.append(Figure(svg, "Means over all runs."))
    return blocks


def sheets(section: Section, folder: Path) -> list:
    """Contact sheets of the first seed, prompts down and methods across."""
    shown, rows = [*dict.fromkeys(section.methods.values()), CEILING], []
    seed = next(iter(section.seeds()), "")
    for prompt in section.prompts():
        keys = ((section.grid, section.representation, m, prompt, seed) for m in shown)
        rows.append((prompt, [f if (f := sheet_path(folder, *k)).exists() else None for k in keys]))
    kept = [k for k in range(len(shown)) if any(files[k] for _, files in rows)]
    if not kept:
        return []
    gallery = [[prompt, *(files[k] for k in kept)] for prompt, files in rows]
    table = Table(["prompt", *(shown[k] for k in kept)], gallery, folder=folder)
    return [Heading(3, f"Contact sheets of seed {seed}"), table]


def measurements(found: Sequence[Section]) -> list:
    """What was measured, on what, and what failed: tables."""
    rows = []
    for s in found:
        steps = sorted({r.get("steps", "") for r in s.all_runs}, key=by_seed)
        counts = map(len, (s.methods, s.prompts(), s.seeds()))
        more = [len(s.all_runs), len(s.failed), s.missing]
        rows.append([s.title, *map(str, counts), ", ".join(steps), *map(str, more)])
    header = ["representation", "methods", "prompts", "seeds", "steps", "finished runs"]
    blocks = [Heading(2, "What was measured"), Table([*header, "failed", "missing"], rows)]
    runs = [r for s in found for r in s.all_runs]
    counts = [(name, Counter(r.get(name, "") for r in runs)) for name in MACHINE]
    rows = [[name, v or "not recorded", str(n)] for name, of in counts for v, n in of.items()]
    blocks.append(Table(["measured on", "", "runs"], sorted(rows)))
    failed = [[" / ".join(r[k] for k in KEYS), r["status"]] for s in found for r in s.failed]
    if failed:
        blocks.append(Table(["failed run (left out of the means)", "reason"], failed))
    return blocks


def explanations(found: Sequence[Section]) -> list:
    """What metrics and names mean: tables."""
    known = dict.fromkeys(m for s in found for m in s.measures.metrics + COSTS if m.about)
    shown = [m for m in known if any(measured(s, [m]) for s in found)]
    parts = {name for s in found for name in s.methods.values()}
    for words in [name.split("-") for name in parts]:
        tails = ["-".join(words[k:]) for k in range(1, len(words))]
        parts |= {f"...-{part}" for part in (*words, *tails)}
    known = [[name, what] for name, what in GRADIENTS.items() if name in parts]
    caption = (
        "Brackets are 95 % bootstrap intervals over prompts, widened for their being few. A "
        "difference is paired: over the prompts and seeds that both have. Bold is the best mean if "
        "the interval of its difference to the second excludes zero, and a difference that is "
        "measurably an improvement. Intervals are not corrected for being many."
    )
    return [
        Heading(2, "How to read it"),
        Table(["metric", "what it is"], [[m.title, m.about] for m in shown], caption),
        Table(["method", "the gradient (eps: predicted noise, s: guidance scale)"], known),
    ]


def judge_blocks(rows: Sequence[dict] | None) -> list:
    """What the judge says of true renders and of objects made wrong on purpose: a table."""
    if not rows:
        return []
    shares = [column for column in SHARES if any(r.get(column) for r in rows)]

    def percent(row, column):
        value = number(row, column)
        return "" if value is None else f"{100 * value:.1f}"

    table = [
        [
            f"{r['test']}: {r['level']}" if r["level"] else r["test"],
            *(r["n"], *(percent(r, column) for column in shares)),
            "" if (value := number(r, "frechet")) is None else f"{value:.1f}",
        ]
        for r in rows
    ]
    caption = (
        "Held-out renders of known kind, colour and view, as they are and changed in ways in which "
        "distilled objects go wrong. The Fréchet distance is to other true renders."
    )
    header = ["test", "pictures", *(SHARES[column] for column in shares), "Fréchet distance"]
    return [Heading(2, "The judge"), Table(header, table, caption)]


def told(found: Sequence[Section]) -> list:
    """What it brings that the model is told the camera: paired differences of the runs on
    ``...-tokens`` to those of the same method on ``...-words``, told the view in words."""
    blocks = []
    for section in found:
        name = section.representation.removesuffix("-tokens")
        other = [s for s in found if (s.grid, s.representation) == (section.grid, f"{name}-words")]
        if name == section.representation or not other:
            continue
        shown = [m for m in measured(section, section.measures.metrics) if measured(other[0], [m])]
        rows = []
        for method in [m for m in section.runs if m in other[0].runs]:
            cells = []
            for m in shown:
                i = paired(*(values(s.runs[method], m.column) for s in (section, other[0])))
                cell = show(m, i, "+")
                cells.append(Bold(cell) if m.improves(i.sign) else cell)
            rows.append([method, *cells])
        blocks.append(Heading(2, f"The camera as tokens, minus words for the view: {name}"))
        blocks.append(Table(["method", *(m.title for m in shown)], rows))
    return blocks


def title_of(found: Sequence[Section]) -> str:
    return measures_of([row for s in found for row in [*s.all_runs, *s.failed]]).title


def blocks_of(folder: Path) -> list:
    """The whole report as blocks of :mod:`evaluation.page`."""
    results = read(folder / "results.csv", (*KEYS, "status"))
    curves = read(folder / "curves.csv", (*KEYS, "step", "prior_loss"))
    tuning = read(folder / "tuning.csv", (*KEYS, "settings", "status"))
    judge = read(folder / "judge.csv", ("test", "level", "n"))
    found = sections(results or ())
    if not found:
        raise UserError(f"{folder / 'results.csv'} has no runs: evaluate.py --out makes them")
    blocks: list = [Heading(1, title_of(found))]
    if (folder / "summary.md").exists():
        blocks.append(Text((folder / "summary.md").read_text(encoding="utf-8")))
    for section in found:
        blocks.append(Heading(2, section.title))
        blocks += [*means(section), *trade_offs(section), *differences(section)]
        blocks += [*by_prompt(section), *learning(section, curves or ()), *sheets(section, folder)]
    blocks += [*told(found), *explanations(found), *measurements(found)]
    return [*blocks, *judge_blocks(judge), *tuning_blocks(tuning, found)]


def draw(folder: Path) -> None:
    """Draw the montages whose sections the tables have."""
    for section in sections(read(folder / "results.csv", KEYS) or ()):
        if (key := (section.grid, section.representation)) in MONTAGES and section.seeds():
            file, methods = MONTAGES[key]
            prompts, seed = section.prompts(), section.seeds()[0]
            paths = [[sheet_path(folder, *key, m, p, seed) for p in prompts] for m in methods]
            montage(folder / file, paths, methods, prompts)


def write(folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.html`` and the montages into ``folder``; returns the first
    two."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one of results.csv by --folder")
    blocks = blocks_of(folder)
    texts = {"report.md": markdown(blocks), "report.html": html(blocks, blocks[0].text, folder)}
    for name, text in texts.items():
        with whole_file(folder / name) as tmp:
            tmp.write_text(text, encoding="utf-8", errors="replace")
    draw(folder)
    return [folder / name for name in texts]


def main(arguments: list[str] | None = None, prog: str = "python -m evaluation.report") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of results.csv and the report")
    options = parser.parse_args(arguments)
    return write_files(lambda: write(options.folder))


if __name__ == "__main__":
    sys.exit(main())
