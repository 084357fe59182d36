"""Gaussians: parameters, where they start, how they grow, how they are drawn and written."""

from . import exporter, model, renderer

__all__ = ["exporter", "model", "renderer"]
