"""The dense reference as a backend: slow, for any device and any float dtype."""

from lods.meshes.reference import antialias, interpolate, rasterize, sample

__all__ = ["antialias", "interpolate", "rasterize", "sample"]
