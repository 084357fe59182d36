"""Bounds on what a config may make of this machine: bytes, nesting, aliases, interpolations.

YAML is always read by OmegaConf's safe loader, which makes numbers, texts, lists and mappings and
never calls code. What a small hostile file can still do is grow: aliases of aliases, interpolations
of interpolations, brackets in brackets (which end the process inside of libyaml).
"""

import contextlib
import re
from typing import Any

import yaml
from omegaconf import Container, OmegaConf

from threestudio.utils.errors import UserError

MAX_BYTES = 200_000  # of one file; those that are shipped have less than 10,000
MAX_DEPTH = 40  # lists and mappings in each other
MAX_NODES = 10_000  # values and keys, aliases written out (omegaconf 2.4 has the same bound)
MAX_DIGITS = 400  # characters of a number
MAX_INTERPOLATIONS = 2_000
MAX_RESOLVED = 50_000  # characters that all interpolations give together; a value counts as 10
MAX_BITS = 1_024  # of a whole number that a resolver gives

_NUMBER = re.compile(r"[-+.]?[0-9][0-9a-fA-Fxo_:.+-]*$")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_limited(path) -> str:
    """The text of a YAML file. Raises :class:`UserError` if it has more than MAX_BYTES, of which
    no more are read."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES} bytes: it is not a config")
    return data.decode("utf-8")


def check_yaml(text: str, where: str = "the config") -> None:
    """Raise :class:`UserError` if `text` nests deeper than MAX_DEPTH or has more than MAX_NODES
    nodes once its aliases are written out; ``yaml.YAMLError`` if it is not YAML.

    Only the parser's events are looked at: nothing is built, and no function calls itself.
    """
    sizes: dict[str, int] = {}  # anchor -> nodes; an open anchor is absent
    stack: list[tuple[str | None, int]] = []  # (anchor, nodes before it) of what is open
    total = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                if event.anchor not in {anchor for anchor, _ in stack}:
                    raise yaml.YAMLError(f"there is no anchor for the alias *{event.anchor}")
                raise UserError(f"{where}: the alias *{event.anchor} is inside of its own anchor")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
            if len(event.value) > MAX_DIGITS and _NUMBER.match(event.value) and event.implicit[0]:
                raise UserError(f"{where} has a number of more than {MAX_DIGITS} characters")
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, total))
            sizes.pop(event.anchor, None)
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = stack.pop()
            if anchor:
                sizes[anchor] = total - before
        if len(stack) > MAX_DEPTH:
            raise UserError(f"{where} nests deeper than {MAX_DEPTH} levels: flatten it")
        if total > MAX_NODES:
            raise UserError(
                f"{where} has more than {MAX_NODES} values, aliases written out: shorten it"
            )


def _weight(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        return 10 + sum(_weight(v) for pair in value.items() for v in pair)
    return 10 + sum(map(_weight, value)) if isinstance(value, (list, tuple)) else 10


@contextlib.contextmanager
def bounded_interpolation():
    """Within this, OmegaConf evaluates at most MAX_INTERPOLATIONS interpolations, which give at
    most MAX_RESOLVED characters; beyond that it raises ``InterpolationResolutionError`` or
    :class:`UserError`.

    25 lines of the form ``k2: ${k1}${k1}`` would otherwise take hours, and 40 all memory.
    """
    evaluate = Container.resolve_parse_tree
    count = resolved = 0

    def bounded(self, *args, **kwargs):
        nonlocal count, resolved
        count += 1
        if count > MAX_INTERPOLATIONS:
            raise UserError(f"more than {MAX_INTERPOLATIONS} interpolations")
        result = evaluate(self, *args, **kwargs)
        value = result._value() if hasattr(result, "_value") else result
        resolved += _weight(result if OmegaConf.is_config(result) else value)
        if resolved > MAX_RESOLVED or (isinstance(value, int) and value.bit_length() > MAX_BITS):
            raise UserError("what the interpolations give is too long")
        return result

    Container.resolve_parse_tree = bounded
    try:
        yield
    finally:
        Container.resolve_parse_tree = evaluate
