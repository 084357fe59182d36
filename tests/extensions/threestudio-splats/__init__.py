"""A geometry, its renderer and all that goes with them, written as a stranger would write them."""

from .background import splat_background
from .exporter import splat_exporter
from .geometry import splat_geometry
from .material import splat_material
from .renderer import splat_rasterizer
from .system import smooth

__all__ = [
    "smooth",
    "splat_background",
    "splat_exporter",
    "splat_geometry",
    "splat_material",
    "splat_rasterizer",
]
