"""Settings with a type and a range, checked before anything loads.

A ``Config`` is a dataclass. Beside the type of a field stands what it may be,

    guidance_scale: Annotated[float, "(0, inf]"] = 7.5
    weighting_strategy: Annotated[str, ("sds", "uniform")] = "sds"
    min_step_percent: Annotated[Any, "scheduled [0, 1]"] = 0.02

a tuple of words, or a range: ``[`` and ``]`` hold their end, ``(`` and ``)`` do not; ``inf)`` means
every finite number, ``inf]`` infinity too; NaN is in no range. ``scheduled`` also allows a schedule
of such numbers (:mod:`lods.schedules`). ``texts`` instead of a range: a text, a list of texts or
null. What several fields must be together is said by a method
``contradictions()`` of the dataclass, which yields pairs of a field and what is wrong with it.

This is the notation that the threestudio of this repository reads from the classes in its registry.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from lods import schedules

T = TypeVar("T")
TEXTS = "texts"
_RANGE = re.compile(r"((?:\w+ )*)([\[(])([^,]+), ([^\])]+)([\])])((?: or \w+)*)")


def nearest(name: Any, known: Iterable[str]) -> str:
    """(did you mean 'x'?)``, or nothing if no known name is near."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def make(config: type[T], values: Mapping[str, Any] | None = None, where: str = "") -> T:
    """An instance of the dataclass ``config`` with these values, each checked.

    ``where`` stands before the names of fields in messages ("system.guidance."). Raises
    ``ValueError``, one line, for an unknown field, which names the nearest, for a value of another
    type or out of its range, and for contradictions.
    """
    values = dict(values or {})
    fields = {field.name: field for field in dataclasses.fields(config) if field.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ValueError(f"there is no setting {where}{name}{nearest(name, fields)}")
    hints = annotations(config)
    checked = {name: check(f"{where}{name}", value, hints[name]) for name, value in values.items()}
    made = config(**checked)
    refuse_contradictions(config, made, where)
    return made


def refuse_contradictions(config: type, values: Any, where: str = "") -> None:
    """Raise ``ValueError`` for what the ``contradictions`` of ``config`` and its bases say of
    ``values``, which has the fields as attributes."""
    for cls in reversed(config.__mro__):
        for name, text in vars(cls).get("contradictions", _none)(values):
            gap = "" if text.startswith("=") else " "
            raise ValueError(f"{where}{name}{gap}{text}")


def _none(values: Any) -> tuple[()]:
    return ()


@functools.cache
def annotations(config: type) -> dict[str, Any]:
    """The annotations of a dataclass with what stands beside the types. A field that a subclass
    only gives another default keeps the declaration of its base."""
    found: dict[str, Any] = {}
    for cls in reversed(config.__mro__):
        own = typing.get_type_hints(cls, include_extras=True) if cls is not object else {}
        for name in inspect.get_annotations(cls):
            before, now = found.get(name), own[name]
            plain = typing.get_origin(now) is not Annotated
            inherits = plain and before is not None and split(before)[0] == now
            found[name] = before if inherits else now
    return found


def split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """``(type, what stands beside it)`` of an annotation."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def shown(value: Any) -> str:
    """``value`` in a message, as YAML has it, and short."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(str(value), f"{value:.10g}")
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:80] + "..."


def check(name: str, value: Any, hint: Any) -> Any:
    """``value`` if the field ``name`` may have it (a float without a fraction as an int where an
    int is meant, a path as text). Raises ``ValueError``, one line."""
    kind, beside = split(hint)
    value = _text_of_path(schedules.plain(value))
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if value is None:
        if type(None) in options or (kind is Any and beside in ((), (TEXTS,))):
            return None
        raise ValueError(f"{name} is empty: give it a value, or leave it out")
    kinds = [option for option in options if option is not type(None)]
    for declared in beside:
        if declared == TEXTS:
            items = [_text_of_path(v) for v in value] if schedules.is_list(value) else [value]
            value = items if schedules.is_list(value) else value
            if not all(isinstance(item, str) for item in items):
                raise ValueError(f"{name} must be a text or a list of texts, not {shown(value)}")
        elif isinstance(declared, str):
            value = _check_range(name, value, kinds, declared)
        elif isinstance(declared, tuple) and value not in declared:
            words = ", ".join(str(word) for word in declared)
            hint_text = nearest(value, [w for w in declared if isinstance(w, str)])
            raise ValueError(f"{name} must be one of {words}, not {shown(value)}{hint_text}")
    if not beside and Any not in kinds:
        value = _check_type(name, value, kinds)
    return value


def _text_of_path(value: Any) -> Any:
    """A ``pathlib.Path`` as the text that settings have for it."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _check_type(name: str, value: Any, kinds: list[Any]) -> Any:
    plain = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if isinstance(value, bool) and bool not in plain:
        raise ValueError(f"{name} must be {_names(plain)}, not {shown(value)}")
    if float in plain and isinstance(value, int):
        return value
    if int in plain and isinstance(value, float) and value.is_integer():
        return int(value)
    if list in plain and schedules.is_list(value):
        return value
    if dict in plain and isinstance(value, Mapping):
        return value
    if not isinstance(value, tuple(kind for kind in plain if isinstance(kind, type))):
        raise ValueError(f"{name} must be {_names(plain)}, not {shown(value)}")
    return value


def _names(kinds: tuple[Any, ...]) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    words |= {dict: "a mapping", list: "a list"}
    return " or ".join(words.get(kind, str(kind)) for kind in kinds)


def _check_range(name: str, value: Any, kinds: list[Any], text: str) -> Any:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise TypeError(f"{text!r} of {name} is no range such as '[0, 1]' or 'scheduled (0, inf)'")
    flags, left, low, high, right, words = match.groups()
    if isinstance(value, str) and value in words.split(" or ")[1:]:
        return value
    whole = int in kinds or "whole" in flags

    def good(x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            return False
        try:
            number = float(x)
        except OverflowError:  # an int of more digits than a float has
            return False
        above = number >= float(low) if left == "[" else number > float(low)
        below = number <= float(high) if right == "]" else number < float(high)
        return above and below and (not whole or number.is_integer())

    what = f"a {'whole ' * whole}number in {left}{low}, {high}{right}"
    if "scheduled" in flags and schedules.is_list(value):
        points = schedules.knots(value)
        if not all(good(number) for _, number in points):
            raise ValueError(f"{name} must be a schedule of numbers in {text}, not {shown(value)}")
        steps = [step for step, _ in points]
        if steps != sorted(steps) or not 0 <= steps[0] <= steps[-1] < math.inf:
            raise ValueError(f"the steps of the schedule {name} must not decrease: {shown(value)}")
        return value
    if not good(value):
        more = ", or a schedule of such numbers" if "scheduled" in flags else ""
        raise ValueError(f"{name} must be {what}{more}{words}, not {shown(value)}")
    return int(value) if whole and isinstance(value, float) else value
