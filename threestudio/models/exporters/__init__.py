"""Exporters: from a trained scene to files that other programs open."""

from . import base

__all__ = ["base"]
