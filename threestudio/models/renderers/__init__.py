"""Renderers: from a scene and cameras to images."""

from . import base

__all__ = ["base"]
