"""Built-in scene modules. Importing this package registers all of them."""

from . import (
    background,
    exporters,
    geometry,
    guidance,
    materials,
    perceptual_loss,
    prompt_processors,
    renderers,
)
from .holder import SceneHolder

__all__ = [
    "SceneHolder",
    "background",
    "exporters",
    "geometry",
    "guidance",
    "materials",
    "perceptual_loss",
    "prompt_processors",
    "renderers",
]
