"""Materials: from the features of a point to its colour."""

from . import base, no_material

__all__ = ["base", "no_material"]
