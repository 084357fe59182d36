"""Full configs, and the overlays that come after them: whether a command names them so."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from threestudio.utils.errors import UserError
from threestudio.utils.hints import walk
from threestudio.utils.safe_yaml import check_yaml, read_limited

REQUIRED = ("data_type", "system_type")  # a full config has them, an overlay has not


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
