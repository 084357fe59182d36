"""A data module, written as a stranger to this repository would write it."""

from .data import ring

__all__ = ["ring"]
