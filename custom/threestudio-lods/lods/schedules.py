"""Settings that change with the step: a number, or a list of knots, linear in between.

The notation is threestudio's: ``[v0, v1, s1]`` goes from v0 at step 0 to v1 at step s1,
``[s0, v0, v1, s1]`` from step s0 on, and ``[s0, v0, v1, s1, v2, s2, ...]`` on to further knots.
"""

import itertools
import numbers
from collections.abc import Iterable
from typing import Any


def is_list(value: Any) -> bool:
    """Whether ``value`` is a list, be it Python's or OmegaConf's."""
    return isinstance(value, (list, tuple)) or type(value).__name__ in ("ListConfig", "TupleConfig")


def plain(value: Any) -> Any:
    """A number of numpy's as Python's; anything else unchanged."""
    if isinstance(value, numbers.Number) and type(value).__module__ == "numpy":
        return value.item()  # type: ignore[attr-defined]
    return value


def knots(value: Iterable[Any]) -> list[tuple[float, float]]:
    """The ``(step, value)`` knots of a schedule that is written as a list. Raises ``ValueError``
    for a list of another form."""
    items = [plain(item) for item in value]
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in items):
        raise ValueError(f"the schedule {items} must hold numbers only")
    if len(items) == 3:
        items.insert(0, 0)
    if len(items) < 4 or len(items) % 2:
        raise ValueError(
            f"the schedule {items} has {len(items)} items: write [start_value, end_value, end_step]"
            " or [start_step, start_value, end_value, end_step], and on with more pairs of a value "
            "and its step"
        )
    first, *rest = items
    return [(first, rest[0]), *zip(rest[2::2], rest[1::2])]


def value_at(value: Any, step: int, epoch: int = 0) -> float:
    """The value at a step, v0 + r (v1 - v0) with r = (step - s0) / (s1 - s0) between two knots, and
    that of the first or the last knot outside of them; at a step that two knots share the value
    jumps. A list that ends in a float counts epochs instead of steps.

    Raises ``TypeError`` for what is neither a number nor a list, ``ValueError`` for a malformed
    list.
    """
    if isinstance(value, (int, float)):
        return value
    if not is_list(value):
        raise TypeError(f"a scheduled value must be a number or a list of numbers, not {value!r}")
    points = knots(value)
    now = step if isinstance(points[-1][0], int) else epoch
    if now >= points[-1][0]:
        return points[-1][1]
    for (s0, v0), (s1, v1) in itertools.pairwise(points):
        if now < s1:
            r = (now - s0) / (s1 - s0) if now > s0 else 0.0
            return v0 + r * (v1 - v0)
    return points[-1][1]


def steps_of(*values: Any) -> list[int]:
    """Step 0 and the steps of the knots of all these schedules, in order: since a schedule is
    linear between its knots, what holds there holds everywhere."""
    found = {0}
    for value in values:
        if is_list(value):
            found |= {int(step) for step, _ in knots(value)}
    return sorted(found)
