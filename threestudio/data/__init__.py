"""Data modules. Importing this package registers the built-in ones."""

from . import image, uncond

__all__ = ["image", "uncond"]
