"""Backgrounds: the colour of a ray that hits nothing."""

from . import (
    base,
    neural_environment_map_background,
    solid_color_background,
    textured_background,
)

__all__ = [
    "base",
    "neural_environment_map_background",
    "solid_color_background",
    "textured_background",
]
