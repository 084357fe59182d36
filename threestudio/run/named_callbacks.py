"""Callbacks that a config names in ``trainer.callbacks``.

Each entry of the list is a name, or a mapping of ``name`` and arguments::

    trainer:
      callbacks: [my-viewer, {name: pytorch_lightning.callbacks.EarlyStopping, monitor: loss}]

A name is one that an extension has registered (``threestudio.register("my-viewer")``) or the import
path of a class, ``package.module.Class``. An import path is code that a config names, so it leads
only to what Python finds without it, and what a run's saved config names is imported only when the
command line says it again: see ``docs/reliability.md``.
"""

import importlib
import inspect
import json
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import threestudio
from threestudio.run.folder import is_saved_config
from threestudio.utils import extensions
from threestudio.utils.config import config_to_primitive
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.ranges import shown

KEY = "trainer.callbacks"
_LIGHTNING = "pytorch_lightning"
_THEIRS = f"{_LIGHTNING}.callbacks."
_PLAIN = {bool, int, float, str, NoneType}


@dataclass(frozen=True)
class NamedCallback:
    """An entry of the list, checked: the class that it names and the arguments it gives."""

    where: str  # the full key, "trainer.callbacks[0]"
    name: str
    cls: type[Callback]
    arguments: dict[str, Any]

    def make(self) -> Callback:
        """The callback. Raises :class:`UserError` where its class refuses the arguments."""
        try:
            return self.cls(**self.arguments)
        except UserError:
            raise
        except (
            *(TypeError, ValueError, KeyError, ImportError, RuntimeError),
            MisconfigurationException,
        ) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.where} ({self.name}): {text}") from error


def find_callbacks(
    cfg: DictConfig, files: Sequence[str] = (), overrides: Sequence[str] = ()
) -> list[NamedCallback]:
    """The callbacks that ``cfg.trainer`` names, none of them made yet. `files` and `overrides`:
    what the config was read from.

    Raises :class:`UserError`, one line with the full key, for a name that nothing has (and the
    nearest that is there), a class that is no callback, and arguments that it does not take.
    """
    repeated = any(word.partition("=")[0] == KEY for word in overrides)
    saved = "" if repeated else next((file for file in files if is_saved_config(file)), "")
    found = []
    for where, name, arguments in _entries(cfg):
        if saved and is_foreign(name):
            raise UserError(
                f"{where}: {name} is code that the saved config {saved} names: say on the command "
                f"line which to run, {KEY}=[{name}] or none, {KEY}=[]"
            )
        cls = _find(where, name)
        _check_arguments(where, name, cls, arguments)
        found.append(NamedCallback(where, name, cls, arguments))
    return found


def said_again(cfg: DictConfig) -> list[str]:
    """What a command that reads this run's saved config must say for its callbacks to run: an
    override, or nothing."""
    if not any(is_foreign(name) for _, name, _ in _entries(cfg)):
        return []
    return [f"{KEY}={json.dumps(config_to_primitive(cfg.trainer.callbacks))}"]


def is_foreign(name: str) -> bool:
    """Whether `name` is an import path to code that neither an extension nor Lightning has
    brought."""
    return "." in name and name not in threestudio.__modules__ and not name.startswith(_THEIRS)


def _entries(cfg: DictConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for i, entry in enumerate(config_to_primitive(cfg.trainer).get("callbacks") or []):
        arguments = {} if isinstance(entry, str) else dict(entry)
        name = entry if isinstance(entry, str) else arguments.pop("name")
        yield f"{KEY}[{i}]", name, arguments


# --- names --------------------------------------------------------------------------------------


def _find(where: str, name: str) -> type[Callback]:
    cls = threestudio.__modules__.get(name)
    if cls is None:
        cls = _import(where, name)
    if not (isinstance(cls, type) and issubclass(cls, Callback)):
        raise UserError(f"{where}: {name} is no callback: it takes a subclass of {_LIGHTNING}'s")
    if cls.__module__.startswith(f"{_LIGHTNING}.") and any(
        parameter.endswith("path") for parameter in inspect.signature(cls).parameters
    ):  # the run's own stay in the folder that the user has named
        raise UserError(
            f"{where}: {name} writes files wherever its arguments say: leave it out (checkpoints "
            "are set in the section checkpoint)"
        )
    return cls


def _import(where: str, name: str) -> Any:
    module_name, _, cls_name = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")) or not module_name:
        raise _unknown(where, name)
    if module_name.split(".")[0] in sys.stdlib_module_names:  # where an import may do anything
        raise UserError(f"{where}: {name} is in Python's own library, which has no callbacks")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise _unknown(where, name) from None
        raise UserError(f"{where}: {module_name} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # code of others, which may raise anything
        line = extensions.last_line(error)
        raise UserError(f"{where}: {module_name} cannot be imported: {line}") from error
    cls = getattr(module, cls_name, None)
    if cls is None:
        there = [key for key, value in vars(module).items() if _is_callback(value)]
        hint = nearest(cls_name, there)
        raise UserError(f"{where}: the module {module_name} has no {cls_name!r}{hint}")
    return cls


def _is_callback(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Callback)


def _unknown(where: str, name: str) -> UserError:
    known = [key for key, cls in threestudio.__modules__.items() if _is_callback(cls)]
    known += [f"{_THEIRS}{each}" for each in pl.callbacks.__all__]
    return UserError(
        f"{where}: {name!r} is neither a registered callback nor the path of one that Python can "
        f"import{nearest(name, known)}{extensions.what_failed()}"
    )


# --- arguments ----------------------------------------------------------------------------------


def _check_arguments(where: str, name: str, cls: type, arguments: dict[str, Any]) -> None:
    try:
        parameters = inspect.signature(cls).parameters
    except (TypeError, ValueError):  # a class in C, which finds out by itself
        return
    takes = {
        key: each
        for key, each in parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key, value in arguments.items():
        if key in takes:
            _check_kind(f"{where}.{key}", value, takes[key].annotation)
        elif not anything:
            hint = nearest(key, takes) or (f"; it has {', '.join(takes)}" if takes else "")
            raise UserError(f"{where}.{key}: {name} has no argument {key!r}{hint}")
    for key, each in takes.items():
        if each.default is each.empty and key not in arguments:
            raise UserError(f"{where}.{key} is missing: {{name: {name}, {key}: ...}}")


def _check_kind(key: str, value: Any, annotation: Any) -> None:
    """Of numbers, switches and texts alone: of other types the class knows more."""
    kinds = set(typing.get_args(annotation)) or {annotation}
    if not kinds <= _PLAIN:
        return
    if float in kinds:
        kinds.add(int)
    if type(value) not in kinds:
        wanted = " or ".join(sorted("null" if k is NoneType else k.__name__ for k in kinds))
        raise UserError(f"{key} takes {wanted}, not {shown(value)}")
