"""Materials: from the features of a point to its colour."""

from . import base, diffuse_with_point_light_material, no_material

__all__ = ["base", "diffuse_with_point_light_material", "no_material"]
