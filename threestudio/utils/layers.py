"""What the layers of a config (its files and overrides) must have in common before they are merged:
lists in the place of lists, mappings in that of mappings. Imports no torch."""

from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from threestudio.utils.errors import UserError
from threestudio.utils.hints import walk
from threestudio.utils.ranges import is_list, shown


def refuse_other_kinds(layers: Iterable[DictConfig]) -> None:
    """Raise :class:`UserError` where a list stands in the place of a mapping, or the reverse."""
    kinds: dict[str, type] = {}
    for key, value in (pair for layer in layers for pair in walk(layer)):
        if not isinstance(value, (dict, list)):
            kinds.pop(key, None)
            continue
        if kinds.setdefault(key, type(value)) is not type(value):
            example = "a mapping: key.name=value" if kinds[key] is dict else "a list: key=[1,2]"
            example = example.replace("key", key)
            raise UserError(f"{key} takes {example}, not {shown(value)}")


def refuse_empty_sections(conf: DictConfig) -> None:
    """Raise :class:`UserError` for a section that is no mapping, before references into it fail."""
    for key in ("data", "system", "trainer", "checkpoint"):
        node = conf._get_node(key)
        if node is None or (isinstance(node, DictConfig) and not node._is_none()):
            continue
        if node._is_none():
            raise UserError(f"the config: {key} is empty: give it a value, or leave the key out")
        if not (node._is_interpolation() or node._is_missing()):
            value = shown(
                OmegaConf.to_container(node, resolve=False) if is_list(node) else node._value()
            )
            raise UserError(f"the config: {key} takes a mapping, not {value}")
