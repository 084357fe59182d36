"""HTML that is put together such that text is always text."""

from html import escape
from typing import Any

_EMPTY = {"img", "meta", "br"}


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def tag(name: str, /, *inside: Any, **attributes: Any) -> Html:
    """An element. What is inside is escaped unless it is :class:`Html`; lists are written out, None
    is nothing. An attribute of None or False is left out, of True has no value; ``class_`` and
    ``for_`` lose their underscore, other underscores become hyphens."""
    given = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        given += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    if name in _EMPTY:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(inside)}</{name}>")


def joined(parts: Any) -> Html:
    """Parts after one another, as inside of :func:`tag`."""
    if parts is None:
        return Html("")
    if isinstance(parts, Html):
        return parts
    if isinstance(parts, (list, tuple)):
        return Html("".join(map(joined, parts)))
    return Html(escape(str(parts)))
