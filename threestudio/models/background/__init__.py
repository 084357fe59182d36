"""Backgrounds: the colour of a ray that hits nothing."""

from . import base, solid_color_background

__all__ = ["base", "solid_color_background"]
