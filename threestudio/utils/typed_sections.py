"""Settings of one type only: ``guidance_for: {lods-bridge-guidance: {bridge_start: 150}}``.

An overlay that serves several types of a part holds what all of them know in the part's section,
and beside it, under the section's name and ``_for``, what only some of them know. What stands
there under the part's type goes into the section, over what the same file says there; the rest is
left out, so that no type meets a field of another. It is for every ``<name>_for`` with a
``<name>_type`` beside it, at the top (``system_for``, ``data_for``) and within ``system``.
"""

import difflib
import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import threestudio
from threestudio.utils.errors import UserError

_SUFFIX = "_for"


def merge_layers(layers: Sequence[DictConfig]) -> DictConfig:
    """The files and overrides of a run, merged from left to right, each with its settings for the
    types that the whole has. Nothing is resolved; `layers` stay as they are."""
    merged = OmegaConf.merge(*layers)
    for path in ("", "system"):
        merged_part = _part(merged, path)
        for key in [k for k in merged_part if _is_typed(k, merged_part)]:
            name = key.removesuffix(_SUFFIX)
            kind = _type_of(merged, f"{path}.{name}_type".lstrip("."))
            layers = [_settled(layer, path, name, kind) for layer in layers]
        merged = OmegaConf.merge(*layers)
    return merged


def _is_typed(key, part: DictConfig) -> bool:
    key = str(key)
    return key.endswith(_SUFFIX) and f"{key.removesuffix(_SUFFIX)}_type" in part


def _part(conf: DictConfig, path: str) -> DictConfig:
    """`conf` itself (path "") or its part, or an empty mapping if that is something else."""
    node = conf._get_node(path) if path else conf
    plain = isinstance(node, DictConfig) and not (
        node._is_none() or node._is_missing() or node._is_interpolation()
    )
    return node if plain else OmegaConf.create()


def _type_of(conf: DictConfig, key: str):
    try:
        return OmegaConf.select(conf, key)
    except OmegaConfBaseException:  # an interpolation that leads nowhere, of which others tell
        return None


def _settled(layer: DictConfig, path: str, name: str, kind) -> DictConfig:
    """`layer` with its settings for `kind` in the section `name`, and without those for others."""
    key = name + _SUFFIX
    part = _part(layer, path)
    if key not in part:
        return layer
    where = f"{path}.{key}".lstrip(".")
    kinds = part._get_node(key)
    if not isinstance(kinds, DictConfig) or kinds._is_none() or kinds._is_interpolation():
        raise UserError(f"{where} takes a mapping from types of {name} to settings")
    _refuse_misspelt(where, kinds)
    layer = layer.copy()
    part = _part(layer, path)
    part.pop(key)
    chosen = kinds._get_node(kind) if kind in kinds else None
    if chosen is None:
        return layer
    if not isinstance(chosen, DictConfig):
        raise UserError(f"{where}.{kind} takes a mapping: the settings of the section {name}")
    return OmegaConf.merge(layer, {path: {name: chosen}} if path else {name: chosen})


def _refuse_misspelt(where: str, kinds: DictConfig) -> None:
    """Of a type that nothing registers it cannot be told whether its extension is just not there;
    one that is nearly a registered name is a mistake. Before anything is loaded nothing is said."""
    if "threestudio.systems.base" not in sys.modules:
        return
    for kind in kinds:
        main = str(kind).partition(":")[0]
        if main in threestudio.__modules__:
            continue
        if near := difflib.get_close_matches(main, threestudio.__modules__, n=1, cutoff=0.88):
            raise UserError(
                f"{where} names the type {main!r}, which is not registered: did you mean "
                f"{near[0]!r}?"
            )
