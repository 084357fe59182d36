"""Renderers: from a scene and cameras to images."""

from . import base, nerf_volume_renderer

__all__ = ["base", "nerf_volume_renderer"]
