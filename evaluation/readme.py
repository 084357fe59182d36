"""The README's section on the comparison: ``python -m evaluation.readme``.

What stands between the two marks in README.md is written from ``docs/evaluation/results.csv``, so
that its numbers are those of the table; ``make report`` does it together with the report.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from evaluation.document import Bold, Table, Text, markdown, plural
from evaluation.montage import montage
from evaluation.overview import progress
from evaluation.reasons import at_one_scale, learning_pays
from evaluation.report import (
    FOLDER,
    best_of,
    full_marks,
    show,
    standing,
    summary,
)
from evaluation.results import (
    CEILING,
    COSTS,
    HEADLINE,
    METRICS,
    Metric,
    Section,
    read,
    reported,
    sections,
    title_of,
    values,
)
from evaluation.statistics import interval, paired
from evaluation.table import sheet_path
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file

README = FOLDER.parent.parent / "README.md"
MARKS = "<!-- results: written by make report -->", "<!-- end of the results -->"
NOTHING = "**The full comparison has not been run yet.**"


class Picture(NamedTuple):
    """Of a section's first seed, with all of its prompts, which are not chosen for it."""

    file: str
    caption: str
    priors: tuple[str, ...]


STUDY = ("improve", "2d")  # at a high guidance scale
PICTURES = {
    ("pocket", "gaussians"): Picture(
        "gaussians.webp",
        "Gaussians of all prompts, front and side",
        ("sds", "csd", "vsd-fast", "lods-embedding", "lods-lora", "lods-lora-fast", CEILING),
    ),
    STUDY: Picture(
        "scale-100.webp",
        "Objects at a guidance scale of 100",
        ("sds", "csd", "lods-embedding", "lods-lora", "lods-lora-4", CEILING),
    ),
}
SHOWN = (METRICS[0], METRICS[2], METRICS[3], METRICS[4])


def compact(section: Section) -> Table:
    """A row a contestant: means with 95 % intervals, and the paired difference to SDS."""
    shown = [m for m in SHOWN if values(section.all_runs, m.column)]
    best = {m.column: best_of(section, m) for m in shown}
    base = values(section.runs.get("sds", ()), HEADLINE[1].column)
    rows = []
    for name, runs in section.runs.items():
        row = [name, str(len(runs))]
        for m in shown:
            cell = show(m, interval(values(runs, m.column)))
            row.append(Bold(cell) if best[m.column] == name else cell)
        row += [_to_sds(HEADLINE[1], values(runs, HEADLINE[1].column), base, name)]
        seconds = values(runs, COSTS[0].column)
        row.append(COSTS[0].show(interval(seconds, draws=1).mean) if seconds else "none")
        rows.append(row)
    if section.ceiling:
        cells = [show(m, interval(values(section.ceiling, m.column))) for m in shown]
        rows.append(["true renders", str(len(section.ceiling)), *cells, "", ""])
    titles = [m.title for m in shown]
    return Table(["prior", "runs", *titles, "Frechet distance − sds", "seconds"], rows)


def _to_sds(metric: Metric, runs, base, name: str) -> str:
    if name == "sds" or not base or not runs:
        return ""
    difference = paired(runs, base)
    cell = show(metric, difference, "+")
    return Bold(cell) if difference.sign == metric.better else cell


def results(folder: Path = FOLDER) -> str:
    """The section's text, from the tables in ``folder``."""
    rows = read(folder / "results.csv", ("grid", "canvas", "prior", "prompt", "seed", "status"))
    found = sections(rows or ())
    if not found:
        return NOTHING + "\n"
    alone = len({s.grid for s in found}) == 1
    unfinished, main = progress(rows), reported(found)
    text = markdown([*([Text(unfinished)] if unfinished else []), summary(found)[1]])
    for section in main:
        counts = (len(section.prompts()), "prompt"), (len(section.seeds()), "seed")
        title = ", ".join([title_of(section, alone), *(plural(*count) for count in counts)])
        said = [*standing(section), *full_marks(section)]
        text += "\n" + markdown([Text(f"{title}:"), compact(section), *map(Text, said)])
        text += _shown(section, folder)
    for section in found:
        if section not in main:
            for why in filter(None, (at_one_scale(section), learning_pays(section))):
                text += "\n" + markdown([Text(why)])
            text += _shown(section, folder)
    return text


def _shown(section: Section, folder: Path) -> str:
    picture = PICTURES.get((section.grid, section.canvas))
    if picture is None or not (folder / picture.file).exists():
        return ""
    return f"\n![{picture.caption}](docs/evaluation/{picture.file})\n"


def draw(folder: Path = FOLDER) -> None:
    """Draw those of PICTURES into ``folder`` whose sections the tables have."""
    rows = read(folder / "results.csv", ("grid", "canvas", "prior", "prompt", "seed", "status"))
    for section in sections(rows or ()):
        key = section.grid, section.canvas
        if key in PICTURES and section.seeds():
            file, _, priors = PICTURES[key]
            prompts, seed = section.prompts(), section.seeds()[0]
            sheets = [[sheet_path(folder, *key, c, p, seed) for p in prompts] for c in priors]
            montage(folder / file, sheets, priors, prompts)


def update(readme: Path = README, folder: Path = FOLDER) -> None:
    """Put the section where it belongs. Raises :class:`UserError` if the marks are not there."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise UserError(f"{readme} has no marks {' ... '.join(MARKS)}: put them where results go")
    section = f"{begin}\n\n{results(folder)}\n{end}"
    with whole_file(readme) as tmp:
        tmp.write_text(f"{before}{section}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        draw()
        update()
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote the results into {README}")
