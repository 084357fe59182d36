"""What a command line or a config may have meant, for the one line that refuses it."""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

# last parts of keys whose values are texts, whatever YAML would read in them
_TEXTS = re.compile(r"(\w+_)?prompt|prompt_(front|side|back|overhead)")
_NAMES = ("name", "tag", "description")  # of the run, for which the same holds
INTERPOLATION = "'${' begins a reference to another key of the config: write a text without it"


def is_text(key: str) -> bool:
    """Whether the value of `key` is taken as it was typed: that of a prompt or of a run's name."""
    return key in _NAMES or bool(_TEXTS.fullmatch(key.rpartition(".")[2]))


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(key, value)`` of all mappings in each other, references as they are written."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=False)
    for key, value in config.items() if isinstance(config, dict) else ():
        full = f"{prefix}.{key}" if prefix else str(key)
        yield full, value
        yield from walk(value, full)


def full_key(name: str, base: Any, fields: Collection[str] = ()) -> str:
    """The key that someone meant who wrote `name`, or nearly: one of the `fields` of every config,
    or the key of the config `base` that ends with it, preferably one whose value is missing, then
    the least deep. "" if there is none."""
    name = name.replace("-", "_")
    if name in fields:
        return name
    keys = dict(walk(base))
    last = {key: key.rpartition(".")[2] for key in keys}
    for wanted in (name, *difflib.get_close_matches(name, {*last.values(), *fields}, 1, 0.75)):
        if wanted in fields:
            return wanted
        found = [key for key in keys if key == wanted or last[key] == wanted]
        if found:
            return min(found, key=lambda k: (keys[k] != "???", "${" in str(keys[k]), k.count(".")))
    return ""


def misspelt(missing: str, config: Any) -> str:
    """The key of a value in `config` that was meant for the key `missing`: as deep, and the same
    but for a few letters of one of its names. "" if there is none."""
    want = missing.split(".")
    keys = dict(walk(config))
    for key, value in keys.items():
        names = key.split(".")
        pairs = [(a, b) for a, b in zip(names, want) if a != b]
        alone = isinstance(value, (str, int, float)) and value != "???" and len(names) == len(want)
        if alone and len(pairs) == 1 and difflib.SequenceMatcher(None, *pairs[0]).ratio() > 0.85:
            return key
    return ""


def quoted(value: str) -> str:
    """A value as a shell takes it."""
    return '"' + re.sub(r'([\\"$`])', r"\\\1", value) + '"'


def unquoted(before: Sequence[str], rest: Sequence[str]) -> str:
    """What to write where the words `rest` follow the words `before` of a command line, and the
    first of `rest` is no option: the value in front of it, of several words, was not quoted. ""
    if there is none."""
    key, equals, value = (before[-1] if before else "").partition("=")
    if not equals or key.startswith("-"):
        return ""
    words = [value, *rest[:1]]
    for word in rest[1:]:
        if "=" in word or word.startswith("-"):
            break
        words.append(word)
    return f"{key}={quoted(' '.join(words))}"
