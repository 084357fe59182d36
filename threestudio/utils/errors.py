"""Errors that are the user's to mend: one line that says what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a command or a file. ``launch.py`` prints its message as one line."""

    def __str__(self) -> str:
        return " ".join(str(arg) for arg in self.args)


class StoppedError(UserError):
    """What ends a run that was going well: a full disk, too little memory, values that are not
    finite. ``launch.py`` adds the checkpoint that the run can be resumed from."""


class UnknownNameError(UserError, KeyError):
    """A name that nothing is registered under (a ``KeyError`` for code written against one)."""


class WrongKindError(UserError, TypeError):
    """A part of another kind than can be used (a ``TypeError`` for code written against one)."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` for the closest of `choices`, or ``""`` if none is close."""
    word, choices = str(word), list(choices)
    found = [c for c in choices if word != c and word.lower() == str(c).lower()][:1]
    found = found or difflib.get_close_matches(word, choices, n=1, cutoff=0.55)
    if not found:  # 'embedding-guidance' for 'lods-embedding-guidance', which a ratio can miss
        found = [c for c in choices if len(word) >= 4 and (word in c or c in word)][:1]
    if not found:  # 'sds' or 'sdss' for 'lods-sds-guidance'
        parts = {part: c for c in reversed(choices) for part in c.split("-")}
        near = difflib.get_close_matches(word, parts, n=1, cutoff=0.7)
        found = [parts[part] for part in near]
    return f": did you mean {found[0]!r}?" if found else ""
