"""Values that change over a run: lists of knots, and their value at a moment. Imports no torch."""

import itertools

from omegaconf import ListConfig

from threestudio.utils.errors import UserError


class NotScheduledError(UserError, TypeError):
    """A value that is neither number nor list (a ``TypeError`` for code written against one)."""


def schedule_knots(value) -> list[tuple[float, float]]:
    """The ``(step, value)`` knots of a scheduled value given as a list.

    Forms: ``[v0, v1, s1]`` (from step 0), ``[s0, v0, v1, s1]`` and, piecewise,
    ``[s0, v0, v1, s1, v2, s2, ...]``. Raises ``ValueError`` for any other length.
    """
    items = list(value)
    if len(items) == 3:
        items = [0, *items]
    if len(items) < 4 or len(items) % 2:
        raise ValueError(
            f"the schedule {items} has {len(items)} items: write [start_value, end_value, "
            "end_step], [start_step, start_value, end_value, end_step] or longer, "
            "[step0, value0, value1, step1, value2, step2, ...]"
        )
    if any(isinstance(i, bool) or not isinstance(i, (int, float)) for i in items):
        raise ValueError(f"the schedule {items} must hold numbers only")
    return [(items[0], items[1])] + [(items[i + 1], items[i]) for i in range(2, len(items), 2)]


def C(value, epoch: int, global_step: int, interpolation: str = "linear") -> float:
    """A scheduled value at a moment of the run.

    A number is itself. A list (see :func:`schedule_knots`) is constant before its first step and
    after its last, and in between interpolates with ``r = (now - s0) / (s1 - s0)``:
    ``v0 + r (v1 - v0)`` if `interpolation` is "linear", ``v0 (v1 / v0)^r`` if "exp". The type of
    the LAST item chooses the clock: an int counts global steps, a float epochs (the random-camera
    dataset never ends, so epochs do not advance there). Where two knots share a step, the value
    jumps at it.

    Raises :class:`NotScheduledError` for anything else, ``ValueError`` for a malformed list.
    """
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, (list, tuple, ListConfig)) and not _is_tuple_config(value):
        raise NotScheduledError(
            f"a scheduled value must be a number or a list of numbers, not {value!r}"
        )
    knots = schedule_knots(value)
    now = global_step if isinstance(knots[-1][0], int) else epoch
    if now >= knots[-1][0]:
        return knots[-1][1]
    for (s0, v0), (s1, v1) in itertools.pairwise(knots):
        if now < s1:
            r = (now - s0) / (s1 - s0) if now > s0 else 0.0
            return _interpolate(v0, v1, r, interpolation)
    return knots[-1][1]


def crossing(low, high) -> tuple[int, float, float] | None:
    """``(step, value of low, value of high)`` at the first knot of two scheduled values at which
    `low` is above `high`; None if there is none, so that it is never (between the knots both are
    linear). Schedules in epochs are taken at their start."""
    lists = [list(value) for value in (low, high) if not isinstance(value, (int, float))]
    for step in sorted({0, *(int(x) for items in lists for x, _ in schedule_knots(items))}):
        values = C(low, 0, step), C(high, 0, step)
        if values[0] > values[1]:
            return step, *values
    return None


def _interpolate(v0: float, v1: float, r: float, kind: str) -> float:
    if kind == "linear":
        return v0 + r * (v1 - v0)
    if kind == "exp":
        if v0 * v1 <= 0:
            raise ValueError(f"an exponential schedule needs values of one sign, not {v0} and {v1}")
        return v0 * (v1 / v0) ** r
    raise ValueError(f"unknown interpolation {kind!r}: 'linear' or 'exp'")


def _is_tuple_config(value) -> bool:
    # omegaconf >= 2.4 wraps tuples in a class of their own, which 2.3 does not have
    return type(value).__name__ == "TupleConfig"
