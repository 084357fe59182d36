"""Exporters: from a trained scene to files that other programs open."""

from . import base, mesh_exporter

__all__ = ["base", "mesh_exporter"]
