"""Geometries: what the scene is made of."""

from . import base

__all__ = ["base"]
