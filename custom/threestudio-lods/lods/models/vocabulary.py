"""The words that a small model knows, where ``vocabulary.json`` in its folder lists them.

Its tokenizer takes any other word apart into letters, which mean nothing to the model, and the run
then distils some other object without a word. Large models have no such file, and every text is
fine with them.

It is read before torch is imported, and imports nothing heavy.
"""

import difflib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from lods.models.cards import has_renders

FILE = "vocabulary.json"
FORCE = "system.prompt_processor.allow_unknown_words=true"
OPTION = "--allow-unknown-words"  # of commands, which means the same
MAX_BYTES = 1_000_000
LISTED = 60  # entries of a group that a message lists
PAINTED = "colored objects"  # the group of those that the model has seen in the colors
NEAR = 0.76  # similarity of a suggestion: "hamburgr" and "cars" have one, "pink" is not "pine"
_ENDINGS = re.compile(r"['\u2019](s|t|re|ve|m|ll|d)\b")  # CLIP's tokenizer cuts them off


def words_of(text: str) -> list[str]:
    """The words of ``text`` as CLIP's tokenizer sees them, in lower case, and its symbols that are
    not punctuation (an emoji is a word that no small model knows)."""
    text = _ENDINGS.sub(" ", unicodedata.normalize("NFC", text).lower())
    kinds: list[str] = []
    for c in text:
        category = unicodedata.category(c)
        if category[0] in "LN":
            kinds.append("word")
        elif category[0] == "M" or c == "\u200d":  # accents and joiners belong to what they follow
            kinds.append(kinds[-1] if kinds else "")
        else:
            kinds.append("symbol" if category[0] == "S" and c > "\x7f" else "")
    pairs = itertools.groupby(zip(text, kinds), key=lambda pair: pair[1])
    return ["".join(c for c, _ in group) for kind, group in pairs if kind]


@dataclass(frozen=True)
class Vocabulary:
    """``groups``: names in lower case, of one word or more, by what they are for: "objects", and
    whatever else the file has ("colors", "views"). Those of "colored objects" are the objects that
    the model has seen in these colors; where there is no such group, it has seen all of them so.
    ``only_names``: other words are of no harm."""

    groups: dict[str, tuple[str, ...]]
    only_names: bool = False

    @classmethod
    def read(cls, folder) -> "Vocabulary | None":
        """Of the model in ``folder``; None where it has no such file. An ideal denoiser knows the
        objects that it has renders of, and reads no other words. Raises ``ValueError``, one line,
        for a file that is not an object of lists of names, "objects" among them."""
        path = os.path.join(folder, FILE)
        if has_renders(folder):
            return cls({"objects": _rendered(folder)}, only_names=True)
        if not os.path.isfile(path):
            return None
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            content = json.loads(data) if len(data) <= MAX_BYTES else None
        except (OSError, ValueError, RecursionError):
            content = None
        lists = list(content.values()) if isinstance(content, dict) else []
        names = [name for each in lists if isinstance(each, list) for name in each]
        right = all(isinstance(each, list) for each in lists) and "objects" in (content or ())
        if not right or not all(isinstance(name, str) and words_of(name) for name in names):
            raise ValueError(
                f"{path} is not an object of lists of words, with one called objects: mend it, or "
                "remove it, and no prompt is looked at"
            )
        groups = content or {}
        return cls({key: tuple(" ".join(words_of(n)) for n in v) for key, v in groups.items()})

    @property
    def objects(self) -> tuple[str, ...]:
        return self.groups["objects"]

    @property
    def words(self) -> list[str]:
        """Every single word that is known."""
        names = itertools.chain(*self.groups.values())
        return list(dict.fromkeys(word for name in names for word in name.split()))

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The words of these texts that the model does not know, each once."""
        known = set(self.words)
        return [w for w in dict.fromkeys(w for t in texts for w in words_of(t)) if w not in known]

    def objects_in(self, text: str) -> list[str]:
        """The objects that ``text`` names in full."""
        spaced = f" {' '.join(words_of(text))} "
        return [name for name in self.objects if f" {name} " in spaced]

    def parts_in(self, text: str) -> list[str]:
        """The words of ``text`` that are an object's name or a part of one ("bear")."""
        parts = {word for name in self.objects for word in name.split()}
        return [word for word in words_of(text) if word in parts]

    def nearest(self, word: str) -> str:
        """What ``word`` may be a slip for; "" if nothing is near."""
        names = dict.fromkeys([*self.objects, *self.words])
        spelt = {name.replace(" ", ""): name for name in reversed(names)}
        near = difflib.get_close_matches(word, spelt, n=1, cutoff=NEAR)
        return spelt[near[0]] if near else ""

    def uncolored(self, prompt: str) -> str:
        """What to say of a color in a prompt for an object that the model has seen in its own
        colors only; "" where there is no such color."""
        painted, objects = self.groups.get(PAINTED), self.objects_in(prompt)
        if painted is None or not objects or any(name in painted for name in objects):
            return ""
        words = words_of(prompt)
        colors = [c for c in self.groups.get("colors", ()) if c in words and c not in objects]
        if not colors:
            return ""
        return (
            f"the model has seen {objects[0]!r} in its own colours only: {_several(colors)} may "
            "change little"
        )

    def listing(self, *keys: str) -> str:
        """``objects hamburger, car; colors red, blue`` of these groups."""
        parts = []
        for key in keys:
            names = self.groups.get(key, ())
            more = f" and {len(names) - LISTED} more (see {FILE})" if len(names) > LISTED else ""
            parts += [f"{key} {', '.join(names[:LISTED])}{more}"] if names else []
        return "; ".join(parts)

    def refusal(self, prompt: str, force: str = FORCE, listed: bool = True) -> str:
        """One line for a prompt without any word of an object; "" for any other. ``force``: what
        the user sets to have it all the same. ``listed``: whether the objects are named, which is
        needless where they can be seen beside it."""
        if self.parts_in(prompt):
            return ""
        known = f": it knows the {self.listing('objects')}" if listed else ""
        return (
            f"the prompt {_short(prompt)} names no object that this model knows"
            f"{self._hints(self.unknown([prompt]))}{known}; to try it all the same, add {force}"
        )

    def unseen(self, words: str, force: str) -> str:
        """One line for ``words`` of which none is an object, a part of its name or a color, so that
        the model can see them nowhere; "" for any others. ``force``: what the user sets to have
        them looked for all the same."""
        colors = self.groups.get("colors", ())
        if self.parts_in(words) or any(word in colors for word in words_of(words)):
            return ""
        hints, known = self._hints(self.unknown([words])), self.listing("objects", "colors")
        return (
            f"this model can see no word of {_short(words)}{hints}: it knows the {known}; to look "
            f"for it all the same, add {force}"
        )

    def warning(self, texts: Iterable[str], prompt: str = "") -> str:
        """One line on the words of these texts that the model does not know, on a ``prompt`` that
        names a part of an object only, and on a color that its object has not; "" if there is
        nothing to say."""
        unknown = [] if self.only_names else self.unknown(texts)
        lines = []
        if unknown:
            lines.append(
                f"this model does not know {_several(unknown)} and reads them letter by letter"
                f"{self._hints(unknown)}"
            )
        part = self.parts_in(prompt)[:1]
        if part and not self.objects_in(prompt):
            whole = [name for name in self.objects if part[0] in name.split()]
            lines.append(f"{part[0]!r} alone is no object that it knows: write {_several(whole)}")
        uncolored = self.uncolored(prompt)
        if not lines:
            painted = ", ".join(self.groups.get(PAINTED, ())[:LISTED])
            return uncolored and f"{uncolored}. Those that it has seen in colours: {painted}"
        lines += [uncolored] if uncolored else []
        others = (key for key in self.groups if key not in ("objects", PAINTED))
        every = self.listing("objects", *others)
        return f"{'; '.join(lines)}. It knows the {every}"

    def _hints(self, unknown: list[str]) -> str:
        near = {word: self.nearest(word) for word in unknown}
        hints = [f"{_short(w)}: did you mean {n!r}?" for w, n in near.items() if n][:3]
        return f" ({' '.join(hints)})" if hints else ""


def _rendered(folder: str) -> tuple[str, ...]:
    from lods.models.renders import Renders

    names = (" ".join(words_of(each.name)) for each in Renders.read(folder).objects)
    return tuple(dict.fromkeys(names))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _several(words: list[str]) -> str:
    more = f" and {len(words) - 5} more words" if len(words) > 5 else ""
    return ", ".join(map(_short, words[:5])) + more
