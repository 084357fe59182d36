"""A config against the classes that it names, before any of them is built."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig

import threestudio
from threestudio.utils.config import parse_structured
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.trainer_options import never_ends

# parts that every Lift3D system builds; a system names further ones in ``builds_too``
_BUILT = ("geometry", "material", "background", "renderer")


def check_parts(cfg: DictConfig, mode: str) -> None:
    """Raise :class:`UserError`, with the full key, for a value in the sections `data` and `system`
    that the class which will read it does not take. Every section ``system.X`` beside a
    ``system.X_type`` is that of the class registered under this name.

    `mode` is "train", "validate", "test", "export" or "view". Names not registered are left to
    the run, which may never look for them, except those of the parts that it builds at once.
    """
    data = threestudio.find(cfg.data_type)
    _parse(data, cfg.data)
    if mode == "train" and getattr(data, "endless", False) and never_ends(cfg.trainer):
        raise UserError("nothing ends this training: set trainer.max_steps, or trainer.max_time")
    system = threestudio.find(cfg.system_type)
    options = _parse(system, cfg.system)
    if options is None:
        return
    classes, built = {}, (*_BUILT, *getattr(system, "builds_too", ()))
    for key in options:
        part = str(key).removesuffix("_type")
        name = options[key]
        if part == key or not isinstance(name, str) or not name:
            continue
        section = options.get(part)
        if not isinstance(section, (Mapping, DictConfig)):
            continue
        try:
            classes[part] = threestudio.find(name)
        except KeyError:
            if part in built:
                raise
    for part in ("renderer", "exporter")[: 1 + (mode == "export")]:
        _check_fit(part, classes, options)
    for part, cls in classes.items():
        if part in cfg.system:
            _parse(cls, cfg.system[part])


def check_names(function: Callable, values: Iterable[str], where: str) -> None:
    """Raise :class:`UserError` for arguments that `function` does not have, or that a config does
    not give, with the nearest that it has."""
    names = set(inspect.signature(function).parameters) - {"self", "callbacks", "plugins"}
    for key in values:
        if key not in names:
            raise UserError(f"{where} has no option {key!r}{nearest(key, names)}")


def _parse(cls: type, section: Any) -> Any:
    fields = getattr(cls, "Config", None)
    return None if fields is None else parse_structured(fields, section)


def _check_fit(part: str, classes: dict[str, type], options: Any) -> None:
    """Renderers and exporters name the methods that they call of their geometry in
    ``geometry_needs``."""
    geometry = classes.get("geometry")
    for method in getattr(classes.get(part), "geometry_needs", ()):
        if geometry is not None and not hasattr(geometry, method):
            raise UserError(
                f"system.{part}_type={options[f'{part}_type']} does not go with "
                f"system.geometry_type={options.geometry_type}, which has no {method}(): set "
                "another of the two"
            )
