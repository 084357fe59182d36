"""The plots of the report as SVG, in which the same numbers give the same bytes."""

import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from evaluation.statistics import Interval

MARKS = "osD^vP*Xph<>d"
STYLE = {"svg.hashsalt": "evaluation", "svg.fonttype": "none", "font.size": 9}


def pareto(points: Mapping[str, tuple[float, float]], better: int) -> list[str]:
    """Names of the (cost, quality) points that no other point beats, from the cheapest on;
    ``better`` is 1 if more quality is better and -1 if less is."""
    front, best = [], -math.inf
    for name in sorted(points, key=lambda n: (points[n][0], -better * points[n][1], n)):
        if better * points[name][1] > best:
            best = better * points[name][1]
            front.append(name)
    return front


def _look(rank: int) -> dict:
    return {"color": mpl.colormaps["tab20"](rank % 20), "marker": MARKS[rank % len(MARKS)]}


def _svg(figure: Figure, axes, title: str, labels: tuple[str, str]) -> str:
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_title(title, loc="left", parse_math=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # names are texts from a table: no formulas
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    file = io.StringIO()
    nothing = {"Date": None, "Creator": None}
    figure.savefig(file, format="svg", bbox_inches="tight", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].rstrip()
    # inside of a page: no addresses, and no size of its own
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", svg, count=5)
    return re.sub(r"xlink:href", "href", svg)


def scatter(
    points: Mapping[str, tuple[float, Interval]],
    ranks: Mapping[str, int],
    better: int,
    title: str,
    labels: tuple[str, str],
) -> str:
    """Cost against quality with its interval, and the Pareto front as a dashed line."""
    with mpl.rc_context(STYLE):
        figure = Figure((6.2, 3.6))
        axes = figure.subplots()
        at = {name: (cost, i.mean) for name, (cost, i) in points.items()}
        axes.plot(*zip(*(at[name] for name in pareto(at, better))), "--", color="0.5", lw=1)
        for name, (cost, i) in points.items():
            ends = [[i.mean - i.low], [i.high - i.mean]] if i.prompts > 1 else None
            look = {"ls": "", "lw": 1, "label": name} | _look(ranks[name])
            axes.errorbar([cost], [i.mean], ends, **look)
        return _svg(figure, axes, title, labels)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    ranks: Mapping[str, int],
    title: str,
    labels: tuple[str, str],
) -> str:
    """One line a name through its (x, y) points."""
    with mpl.rc_context(STYLE):
        figure = Figure((6.2, 3.6))
        axes = figure.subplots()
        for name, at in series.items():
            axes.plot(*zip(*at), lw=1.4, ms=3, label=name, **_look(ranks[name]))
        return _svg(figure, axes, title, labels)
