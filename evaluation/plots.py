"""Two plots as SVG: no library, so that the same numbers give the same bytes everywhere.

Colours are the classes ``c0`` and so on of the page's style sheet, so the plots follow its light
and dark mode; points and lines carry their names, so they do not rest on colour.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from evaluation.statistics import Interval

WIDTH, HEIGHT = 660, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 530, 14, 312
LETTER = 6.6  # about the width of a character, in px


class Axis:
    """Maps values from ``low``..``high`` to pixels ``start``..``end``, logarithmically if they
    are positive and more than ``log_from`` apart as a ratio. It reaches a little beyond the values,
    but not beyond ``bounds``, between which all possible ones are."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        log_from: float = math.inf,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ):
        low, high = min(values), max(values)
        self.log = low > 0 and high / low > log_from
        self.start, self.end = start, end
        low, high = (math.log10(low), math.log10(high)) if self.log else (low, high)
        margin = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
        self.low, self.high = low - margin, high + margin
        if not self.log:
            self.low, self.high = max(self.low, bounds[0]), min(self.high, bounds[1])

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values in the range, about six."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            return [t for t in ticks if self.low <= math.log10(t) <= self.high]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    middle_x, middle_y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts = []
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{BOTTOM + 16}" class="mid">{tick:.6g}</text>')
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" class="end">{tick:.6g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text x="{middle_x}" y="{HEIGHT - 10}" class="mid">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {middle_y}) rotate(-90)" class="mid">{escape(y_label)}'
        "</text>"
    )
    return parts


def _svg(title: str, parts: list[str], right: float = WIDTH, bottom: float = HEIGHT) -> str:
    """``right`` and ``bottom``: where the outermost label ends."""
    inside = "\n".join(parts)
    width, height = max(WIDTH, math.ceil(right)), max(HEIGHT, math.ceil(bottom))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>\n'
        f"{inside}\n</svg>"
    )


def pareto(points: Mapping[str, tuple[float, float]], better: int) -> list[str]:
    """Names of the (cost, quality) points that no other point beats, from the cheapest on;
    ``better`` is 1 if more quality is better and -1 if less is."""
    front, best = [], -math.inf
    for name in sorted(points, key=lambda n: (points[n][0], -better * points[n][1], n)):
        if better * points[name][1] > best:
            best = better * points[name][1]
            front.append(name)
    return front


def _place(x: float, y: float, width: float, taken: list) -> tuple[float, float]:
    """The left end of a label's base line near the point, clear of the labels placed before."""
    for away in (0, 13, -13, 26, -26, 39, -39, 52, -52):
        for left in (x + 9, x - 9 - width):
            box = (left, y + away - 8, left + width, y + away + 5)
            clear = all(
                box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken
            )
            if clear and box[0] > LEFT and box[2] < WIDTH and 0 < box[1] < BOTTOM - 8:
                taken.append(box)
                return left, y + away + 4
    return x + 9, y + 4


def scatter(
    points: Mapping[str, tuple[float, Interval]],
    colors: Mapping[str, int],
    better: int,
    title: str,
    labels: tuple[str, str],
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """Cost against quality with its interval, and the Pareto front as a dashed line; ``bounds`` are
    the least and the most that quality can be."""
    x = Axis([p[0] for p in points.values()], LEFT, RIGHT, log_from=12)
    ends = [v for _, i in points.values() for v in (i.mean, i.low, i.high) if not math.isnan(v)]
    y = Axis(ends, BOTTOM, TOP, bounds=bounds)
    parts = _frame(x, y, *labels)
    right = 0.0
    front = pareto({name: (cost, i.mean) for name, (cost, i) in points.items()}, better)
    way = "L".join(f"{x(points[n][0]):.1f} {y(points[n][1].mean):.1f}" for n in front)
    parts.append(f'<path class="front" d="M{way}"/>')
    taken = [(x(c) - 5, y(i.mean) - 5, x(c) + 5, y(i.mean) + 5) for c, i in points.values()]
    for name, (cost, i) in points.items():
        px, py = x(cost), y(i.mean)
        parts.append(f'<g class="c{colors[name]}">')
        if not math.isnan(i.low):
            parts.append(f'<path class="line" d="M{px:.1f} {y(i.low):.1f}V{y(i.high):.1f}"/>')
        parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="4.5"/>')
        left, base = _place(px, py, LETTER * len(name), taken)
        parts.append(f'<text x="{left:.1f}" y="{base:.1f}">{escape(name)}</text></g>')
        right = max(right, left + LETTER * len(name))
    return _svg(title, parts, right)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    colors: Mapping[str, int],
    title: str,
    labels: tuple[str, str],
) -> str:
    """One line a name through its (x, y) points, named at its right end."""
    x = Axis([p[0] for s in series.values() for p in s], LEFT, RIGHT)
    y = Axis([p[1] for s in series.values() for p in s], BOTTOM, TOP, log_from=10)
    parts = _frame(x, y, *labels)
    # From the top down, each name at least a line below the one before.
    below = TOP
    for name in sorted(series, key=lambda n: (y(series[n][-1][1]), n)):
        way = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in series[name])
        below = max(y(series[name][-1][1]) + 4, below)
        parts.append(f'<g class="c{colors[name]}"><path class="line" d="M{way}"/>')
        parts.append(f'<text x="{RIGHT + 6}" y="{below:.1f}">{escape(name)}</text></g>')
        below += 13
    return _svg(title, parts, RIGHT + 6 + LETTER * max(map(len, series)), below)
