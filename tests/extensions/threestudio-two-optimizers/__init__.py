"""A system with manual optimisation, written as a stranger to this repository would write it."""

from .system import two_optimizers

__all__ = ["two_optimizers"]
