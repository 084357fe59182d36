"""Data modules. Importing this package registers the built-in ones."""

from . import uncond

__all__ = ["uncond"]
