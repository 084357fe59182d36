"""What a command line or a config may have meant, for the one line that refuses it."""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from threestudio.utils.errors import UserError
from threestudio.utils.safe_yaml import check_yaml, read_limited

# last parts of keys whose values are texts, whatever YAML would read in them
_TEXTS = re.compile(r"(\w+_)?prompt|prompt_(front|side|back|overhead)")
_NAMES = ("name", "tag", "description")  # of the run, for which the same holds
REQUIRED = ("data_type", "system_type")  # a full config has them, an overlay has not
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


def split_config_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """``(files, overrides)`` of what follows ``--config``: files come first, and after the first
    ``key=value`` only a word that ends like one is a file (it may be a word of a prompt)."""
    files, overrides = [], []
    for word in words:
        named = word.endswith((".yaml", ".yml")) and ("=" not in word or os.path.exists(word))
        early = not overrides and ("=" not in word or os.path.isfile(word))
        (files if named or early else overrides).append(word)
    return files, overrides


# --- full configs and overlays ------------------------------------------------------------------


def _read(path: Any) -> dict:
    try:
        text = read_limited(path)
        check_yaml(text, str(path))
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_full(content: dict) -> bool:
    return all(content.get(key) for key in REQUIRED)


def full_configs_for(files: Iterable[str]) -> list[str]:
    """The full configs beside the overlays `files` which share most of their keys, best first."""
    overlay = {key for file in files for key, _ in walk(_read(file))}
    found = {}
    for folder in dict.fromkeys(Path(file).parent for file in files):
        for path in sorted(folder.glob("*.yaml"))[:200]:
            content = _read(path)
            if _is_full(content):
                found[str(path)] = len(overlay & {key for key, _ in walk(content)})
    most = max(found.values(), default=0)
    return [path for path, shared in found.items() if shared == most]


def refuse_overlay(files: Sequence[str], missing: str) -> None:
    """Raise :class:`UserError` for configs that lack the key `missing`, with the full configs that
    they are meant to follow, if there are any beside them."""
    problem = f"the config has no {missing}: there is nothing to run"
    full = full_configs_for(files) if not any(_is_full(_read(file)) for file in files) else []
    if full:
        what = "is an overlay, which comes" if len(files) == 1 else "are overlays, which come"
        problem = (
            f"{', '.join(files)} {what} after a full config: --config {full[0]} "
            f"{' '.join(files)}" + f" (or {', '.join(full[1:])})" * (len(full) > 1)
        )
    raise UserError(problem)


def refuse_order(files: Sequence[str]) -> None:
    """Raise :class:`UserError` if the first file is an overlay of which a full config after it
    replaces most values: nothing would be left of what it is for."""
    contents = [_read(file) for file in files]
    later = next((i for i, content in enumerate(contents) if _is_full(content)), 0)
    if not later:
        return
    values = {key for key, value in walk(contents[0]) if not isinstance(value, dict)}
    replaced = values & {key for key, _ in walk(contents[later])}
    if len(replaced) > len(values) / 2:
        order = " ".join([files[later], *(file for file in files if file != files[later])])
        raise UserError(
            f"{files[later]} replaces most of what {files[0]} says, because later files win: write "
            f"--config {order}"
        )
