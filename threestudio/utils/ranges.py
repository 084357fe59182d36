"""What values a config field may have: declared in its annotation, checked before anything loads.

    near_plane: Annotated[float, "(0, 1e6]"] = 0.01

``Annotated`` changes nothing for OmegaConf, for threestudio itself or for a type checker, and the
declaration is plain text, so that an extension can write it without importing anything; one that
declares nothing is checked for its types only, as before. A subclass that gives a field another
default under the same type inherits the declaration. Beside the type may stand

- a text, the range of a number: ``[1, 64]`` holds its ends and ``(0, 180)`` does not; with ``inf)``
  as its end every finite number is meant, with ``inf]`` infinity too. NaN is in no range. Before it
  may stand:

  ``whole``      no fractions (understood with int, List[int] and the like);
  ``scheduled``  a number, or a schedule of such numbers (see :mod:`.schedules`);
  ``each``       a number, or a list of them; with a type of lists the list alone, as with
  ``list``       a list of numbers (for fields whose type does not say so);
  ``ordered``    a list of which no item is smaller than the one before, as in [low, high];

  and after it ``or auto`` or other words (``or auto or none``) that may stand in the place of the
  number;
- ``texts``: a text, a list of texts, or null;
- a tuple of texts: the words that a text may be;
- a ``TypedDict``, a dataclass, or ``Dict[str, <annotation>]``: what the entries of a mapping may
  be. Entries that a ``TypedDict`` does not name are left to whoever reads them.

What several fields must be together says a method of the dataclass,

    def contradictions(self):  # self has the fields as attributes
        if self.near_plane >= self.far_plane:
            yield "far_plane", f"must be above near_plane={self.near_plane:g}"

of every class in the method resolution order that has one; the text follows the key, as its
``=value`` may. This module imports no torch.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union

from omegaconf import DictConfig, ListConfig, OmegaConf

from threestudio.utils.errors import UserError, nearest
from threestudio.utils.schedules import schedule_knots

_TEXT = re.compile(
    r"(?P<words>(?:(?:whole|scheduled|each|list|ordered) )*)"
    r"(?P<left>[\[(])(?P<low>[^,\]]+), (?P<high>[^,\])]+)(?P<right>[\])])(?P<other>(?: or \w+)*)"
)
TEXTS = "texts"
_MAX_SHOWN = 80  # characters of a refused value in a message


def shown(value: Any) -> str:
    """`value` in a message: as it would be written in YAML, and short."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(str(value), f"{value:.10g}")
    if is_list(value):
        text = f"[{', '.join(shown(item) for item in list(value)[:20])}]"
    else:
        try:
            text = repr(value)
        except ValueError:  # an int of more digits than Python prints
            text = "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def is_list(value: Any) -> bool:
    # omegaconf >= 2.4 wraps tuples in a class of their own, which 2.3 does not have
    return isinstance(value, (list, tuple, ListConfig)) or type(value).__name__ == "TupleConfig"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Range:
    """One declared range. ``Range.parse`` reads the text of the module's docstring."""

    low: float
    high: float
    low_included: bool
    high_included: bool
    kinds: frozenset = frozenset()  # of whole, scheduled, each, list, ordered
    words: tuple[str, ...] = ()

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> "Range":
        """Raises ``ValueError`` for a text that is none: a mistake in the code."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no range such as '[0, 1]' or 'scheduled (0, inf)'")
        low, high = float(match["low"]), float(match["high"])
        if not low <= high:
            raise ValueError(f"the range {text!r} is empty")
        words = tuple(match["other"].split(" or ")[1:])
        kinds = frozenset(match["words"].split())
        return cls(low, high, match["left"] == "[", match["right"] == "]", kinds, words)

    def __contains__(self, value: Any) -> bool:
        above = self.low <= value if self.low_included else self.low < value
        return above and (value <= self.high if self.high_included else value < self.high)

    def bounds(self) -> str:
        """The ends in words: ``from 0 to 1``, ``above 0 and below 180``, ``at least 1``."""
        low, high = (f"{end:.10g}" for end in (self.low, self.high))
        parts = []
        if math.isfinite(self.low):
            parts.append(f"{'at least' if self.low_included else 'above'} {low}")
        if math.isfinite(self.high):
            parts.append(f"{'at most' if self.high_included else 'below'} {high}")
        if len(parts) == 2 and self.low_included and self.high_included:
            return f"from {low} to {high}"
        allowed = " (.inf is allowed)" if self.high == math.inf and self.high_included else ""
        return " and ".join(parts) + allowed

    def describe(self, whole: bool, count: int | None, lists_only: bool) -> str:
        """What is allowed, in words. `count`: of a list's items, where it is fixed."""
        noun = "whole number" if whole else "number"
        if self.high == math.inf and not self.high_included and not whole:
            noun = "finite number"
        bounds = f" {self.bounds()}".rstrip()
        if self.low == self.high:
            return f"{self.low:.10g}"
        if lists_only:
            text = f"{count} {noun}s" if count else f"a list of {noun}s"
            if "ordered" in self.kinds:
                text += " [low, high] with low <= high" if count == 2 else " that do not decrease"
            text += f", each{bounds}" if bounds else ""
        else:
            text = f"a {noun}{bounds}"
            if "scheduled" in self.kinds:
                text += ", or a schedule of such numbers"
            elif "each" in self.kinds:
                text += ", or a list of such numbers"
        return text + "".join(f" or {word}" for word in self.words)

    def checked(self, key: str, value: Any, base: Any) -> Any:
        """`value`, which the field `key` of the type `base` has; a float without a fraction as an
        int where a whole number is meant. Raises :class:`UserError`."""
        kind = _plain(base)
        whole = "whole" in self.kinds or _element(kind) is int
        sequence = typing.get_origin(kind) in (list, tuple)
        arguments = typing.get_args(kind)
        fixed = typing.get_origin(kind) is tuple and Ellipsis not in arguments
        count = len(arguments) if fixed else None
        lists_only = sequence or bool(self.kinds & {"list", "ordered"})
        allowed = self.describe(whole, count, lists_only)
        hint = nearest(value, self.words) if isinstance(value, str) else ""
        error = UserError(f"{key} must be {allowed}, not {shown(value)}{hint}")

        def good(x: Any) -> bool:
            return is_number(x) and x in self and (not whole or isinstance(x, int))

        if is_list(value):
            items = list(value)
            if not (lists_only or self.kinds & {"each", "scheduled"}):
                raise error
            if "scheduled" in self.kinds:
                self._check_schedule(key, items, error)
                return value
            empty = not items and not sequence
            if empty or not all(good(x) for x in items) or (count and len(items) != count):
                raise error
            if "ordered" in self.kinds and sorted(items) != items:
                raise error
            return value
        if isinstance(value, str) and value in self.words:
            return value
        if whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        if lists_only or not good(value):
            raise error
        return value

    def _check_schedule(self, key: str, items: list, error: UserError) -> None:
        try:
            knots = schedule_knots(items)
        except ValueError as reason:
            raise UserError(f"{key}: {reason}") from None
        steps = [step for step, _ in knots]
        if not all(0 <= step < math.inf for step in steps) or sorted(steps) != steps:
            raise UserError(
                f"{key}: the steps of a schedule must be 0 or more and must not decrease, not "
                f"{', '.join(shown(step) for step in steps)} as in {shown(items)}"
            )
        if not all(value in self for _, value in knots):
            raise error


# --- annotations --------------------------------------------------------------------------------


def split(hint: Any) -> tuple[Any, tuple]:
    """``(type, what stands beside it)`` of an annotation."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _plain(base: Any) -> Any:
    """``X`` of ``Optional[X]``; anything else as it is."""
    if typing.get_origin(base) in (Union, types.UnionType):
        options = [option for option in typing.get_args(base) if option is not type(None)]
        if len(options) == 1:
            return options[0]
    return base


def _element(base: Any) -> Any:
    """The type of a list's items, else the type itself."""
    if typing.get_origin(base) in (list, tuple):
        return typing.get_args(base)[0]
    return base


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass or ``TypedDict``, with what stands beside the types: a field
    that is only given another default has the declaration of the class it comes from."""
    found = typing.get_type_hints(cls, include_extras=True)
    for name, hint in found.items():
        if split(hint)[1]:
            continue
        for base in cls.__mro__[1:]:
            if name in inspect.get_annotations(base):
                inherited = typing.get_type_hints(base, include_extras=True)[name]
                if split(inherited)[1] and split(inherited)[0] == hint:
                    found[name] = inherited
                    break
    return found


def takes_mapping(base: Any) -> bool:
    """Whether a field of this type is an open mapping."""
    return _plain(base) is dict


def takes_texts(base: Any) -> bool:
    """Whether a field of this type is a list of texts."""
    kind = _plain(base)
    return typing.get_origin(kind) in (list, tuple) and _element(kind) is str


def are_texts(value: Any) -> bool:
    return value is None or (is_list(value) and all(isinstance(item, str) for item in value))


def may_be_null(base: Any) -> bool:
    """Whether a field of this type may be null."""
    return base in (Any, type(None)) or type(None) in typing.get_args(base)


# --- checks -------------------------------------------------------------------------------------


def checked(key: str, value: Any, hint: Any) -> Any:
    """`value` of the field `key` with the annotation `hint`, as :meth:`Range.checked` gives it.

    Mappings are changed in place. Raises :class:`UserError`, one line with the full key.
    """
    base, beside = split(hint)
    if value is None:
        # a range says more than Any, of which Optional[Any] is null's way out
        ranged = base is Any and any(isinstance(d, str) and d != TEXTS for d in beside)
        if may_be_null(base) and not ranged:
            return None
        raise UserError(f"{key} is empty: give it a value, or leave the key out")
    for declared in beside:
        if declared == TEXTS:
            if not isinstance(value, str) and not (is_list(value) and are_texts(value)):
                raise UserError(f"{key} must be a text or a list of texts, not {shown(value)}")
        elif isinstance(declared, str):
            value = Range.parse(declared).checked(key, value, base)
        elif isinstance(declared, tuple):
            _check_word(key, value, declared, base is not Any and may_be_null(base))
        elif isinstance(value, (Mapping, DictConfig)):
            _check_entries(key, value, declared)
    if not beside:
        kind = _plain(base)
        if kind is bool and not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, not {shown(value)}")
        if typing.is_typeddict(kind) or typing.get_origin(kind) is dict:
            if not isinstance(value, (Mapping, DictConfig)):
                raise UserError(f"{key} takes a mapping, not {shown(value)}")
            _check_entries(key, value, kind)
        elif typing.get_origin(kind) is list and is_list(value):
            for i, item in enumerate(value):
                checked(f"{key}[{i}]", item, typing.get_args(kind)[0])
    return value


def _check_word(key: str, value: Any, words: tuple, or_null: bool) -> None:
    if value not in words or isinstance(value, bool):
        hint = nearest(value, [w for w in words if isinstance(w, str)])
        listed = ", ".join(dict.fromkeys([str(w) for w in words] + ["null"] * or_null))
        raise UserError(f"{key} must be one of {listed}, not {shown(value)}{hint}")


def _check_entries(key: str, mapping: Any, declared: Any) -> None:
    if dataclasses.is_dataclass(declared):
        from threestudio.utils.config import parse_structured

        parse_structured(declared, mapping, prefix=key)
        return
    every = typing.get_args(declared)[1] if typing.get_origin(declared) is dict else None
    hints = {} if every is not None else annotations(declared)
    for name in list(mapping):
        hint = hints.get(name) if every is None else every
        if hint is not None and not _is_open(mapping, name):
            before = mapping[name]
            after = checked(f"{key}.{name}", before, hint)
            if after is not before:
                mapping[name] = after


def _is_open(mapping: Any, name: Any) -> bool:
    """Whether the entry is an interpolation or missing, which is for whoever resolves it."""
    if not isinstance(mapping, DictConfig):
        return False
    return OmegaConf.is_interpolation(mapping, name) or OmegaConf.is_missing(mapping, name)


def refuse_contradictions(fields: type, config: Any, full_key) -> None:
    """Raise :class:`UserError` for what ``contradictions`` of the dataclass `fields` and its bases
    say of `config`; ``full_key(field)`` names a field."""
    for cls in reversed(fields.__mro__):
        if "contradictions" not in cls.__dict__:
            continue
        try:
            found = list(cls.__dict__["contradictions"](config))
        except (TypeError, AttributeError):
            continue  # a subclass has given the fields other types: it knows what they mean
        for name, text in found:
            gap = "" if text.startswith("=") else " "
            raise UserError(f"{full_key(name)}{gap}{text}")


def not_a_number(config: Any, prefix: str = "") -> Iterator[str]:
    """The full keys of all values of a config that are NaN, which no setting can mean."""
    if isinstance(config, (Mapping, DictConfig)):
        entries = ((f"{prefix}.{key}" if prefix else str(key), config[key]) for key in config)
    else:
        entries = ((f"{prefix}[{i}]", item) for i, item in enumerate(config))
    for key, value in entries:
        if isinstance(value, float) and math.isnan(value):
            yield key
        elif is_list(value) or isinstance(value, (Mapping, DictConfig)):
            yield from not_a_number(value, key)
