"""Geometries: what the scene is made of."""

from . import base, density, implicit_volume, volume_grid

__all__ = ["base", "density", "implicit_volume", "volume_grid"]
