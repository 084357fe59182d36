"""Names for annotations, star-imported by convention (``from threestudio.utils.typing import *``).

Shapes are documented with jaxtyping (``Float[Tensor, "B H W 3"]``); nothing checks them when the
program runs.
"""

from typing import (  # noqa: UP035 (upstream's names)
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Literal,
    NamedTuple,
    NewType,
    Optional,
    Sized,
    Tuple,
    Type,
    TypeVar,
    Union,
)

from jaxtyping import Bool, Complex, Float, Inexact, Int, Integer, Num, Shaped, UInt
from omegaconf import DictConfig
from torch import Tensor

_F = TypeVar("_F")


def typechecker(function: _F) -> _F:
    """Kept for modules that decorate with it. It checks nothing: typeguard 4, the only one that
    today's Python installs, cannot parse jaxtyping's shape strings."""
    return function


__all__ = [
    "Any",
    "Bool",
    "Callable",
    "Complex",
    "Dict",
    "DictConfig",
    "Float",
    "Inexact",
    "Int",
    "Integer",
    "Iterable",
    "List",
    "Literal",
    "NamedTuple",
    "NewType",
    "Num",
    "Optional",
    "Shaped",
    "Sized",
    "Tensor",
    "Tuple",
    "Type",
    "TypeVar",
    "UInt",
    "Union",
    "typechecker",
]
