"""What a run has logged, as small plots."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import islice

from threestudio.run.page.files import Folder
from threestudio.run.page.markup import Html, tag

MAX_LOG = 1 << 26  # bytes of the logs that are read
MAX_COLUMNS = 1000  # of a log
MAX_VALUES = 4_000_000  # of a log
MAX_POINTS = 300  # of a curve
MAX_CURVES = 200
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 170, 60, 8, 10, 22

Curve = list[tuple[float, float]]  # steps and values


def read_curves(folder: Folder) -> dict[str, Curve]:
    """The columns of the logs of a run, by name. Each training that went on has a log of its own;
    a step that was logged twice has its later value. Values that are not finite are left out, and
    of a log with more than MAX_VALUES all but every second line, or third, and so on. Raises
    ``ValueError`` for one with more than MAX_COLUMNS."""
    found: dict[str, dict[float, float]] = {}
    logs = [n for n in folder.folders("csv_logs") if re.fullmatch(r"version_\d{1,6}", n)]
    left = MAX_LOG
    for log in sorted(logs, key=lambda name: int(name[8:])):
        text = folder.text(f"csv_logs/{log}/metrics.csv", left).replace("\0", "")
        left -= len(text)
        lines = io.StringIO(text)
        header = next(csv.reader(lines), [])
        if len(header) > MAX_COLUMNS:
            raise ValueError(f"the log {log} has {len(header):,} columns")
        every = 1 + text.count("\n") * len(header) // MAX_VALUES
        for values in csv.reader(islice(lines, 0, None, every)):
            row = dict(zip(header, values))
            step = _number(row.pop("step", None))
            for name, value in row.items():
                number = _number(value)
                if step is None or number is None or name == "epoch":
                    continue
                if name in found or len(found) < MAX_CURVES:
                    found.setdefault(name, {})[step] = number
    return {name: sorted(values.items()) for name, values in found.items()}


def _number(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def is_constant(curve: Curve) -> bool:
    return len({value for _, value in curve}) <= 1


def title(name: str) -> str:
    """What is written over the curve of a column."""
    for start in ("train/", "train_params/"):
        if name.startswith(start):
            name = name[len(start) :]
    if name.startswith("lr-"):
        return f"learning rate of {name.rpartition('/')[2]}"
    return name.replace("_", " ")


def order(name: str) -> tuple[int, str]:
    """Losses first, the total before its parts, then what the run noted, schedules, and rates."""
    ranks = ("train/loss", "train/loss_", "train/", "", "train_params/", "lr-")
    for rank, start in enumerate(ranks):
        if name == start or (start and start != "train/loss" and name.startswith(start)):
            return rank, name
    return 3, name


def chosen(curves: Mapping[str, Curve]) -> list[str]:
    """The columns that are drawn: those that change, in the order of :func:`order`."""
    names = [name for name, curve in curves.items() if not is_constant(curve)]
    return sorted(names, key=order)


def plot(name: str, lines: Sequence[tuple[str, Curve]]) -> Html:
    """A figure with a line for each of the labelled curves, at most MAX_POINTS of each. A column of
    positive values over more than a hundredfold has a logarithmic axis."""
    lines = [(label, thinned(curve)) for label, curve in lines if curve]
    values = [value for _, curve in lines for _, value in curve]
    steps = [step for _, curve in lines for step, _ in curve]
    logarithmic = min(values) > 0 and max(values) > 100 * min(values)
    scaled = math.log10 if logarithmic else float
    low, high = scaled(min(values)), scaled(max(values))
    if high - low < 1e-12 * max(abs(high), 1e-12):
        low, high = low - 1, high + 1
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (scaled(value) - low) / (high - low)
        return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for level in (low, (low + high) / 2, high):
        value = 10**level if logarithmic else level
        at = round(TOP + (1 - (level - low) / (high - low)) * (HEIGHT - TOP - BOTTOM), 1)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", short(value), x=LEFT - 6, y=at + 4, text_anchor="end"))
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(tag("text", short(step), x=x(step), y=HEIGHT - 5, text_anchor=anchor))
    for i, (_, curve) in enumerate(lines):
        points = " ".join(f"{x(step)},{y(value)}" for step, value in curve)
        parts.append(tag("polyline", points=points, class_=f"line{i % 6}"))
        if len(curve) == 1:
            ((step, value),) = curve
            parts.append(tag("circle", cx=x(step), cy=y(value), r=3, class_=f"dot{i % 6}"))
    label = f"{title(name)}: from {short(lines[0][1][0][1])} to {short(lines[0][1][-1][1])}"
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    end = [tag("span", short(lines[0][1][-1][1]), class_="last")] if len(lines) == 1 else []
    note = [tag("small", " logarithmic")] if logarithmic else []
    return tag("figure", tag("figcaption", tag("b", title(name)), *note, *end), svg)


def thinned(curve: Curve) -> Curve:
    """At most MAX_POINTS points: of each stretch the mean step and value, so that noise is smaller
    and no trend is lost."""
    if len(curve) <= MAX_POINTS:
        return curve
    size = len(curve) / MAX_POINTS
    stretches = [curve[int(i * size) : int((i + 1) * size)] for i in range(MAX_POINTS)]
    return [
        (sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part))
        for part in stretches
    ]


def short(value: float) -> str:
    """A number in few characters."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
