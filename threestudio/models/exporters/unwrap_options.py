"""Ranges of xatlas' options, which the mesh exporter passes on."""

from typing import Annotated, TypedDict


class ChartOptions(TypedDict, total=False):
    """``xatlas.ChartOptions``: how the surface is cut into charts."""

    max_chart_area: Annotated[float, "[0, inf)"]  # 0: no limit, as for the next
    max_boundary_length: Annotated[float, "[0, inf)"]
    normal_deviation_weight: Annotated[float, "[0, 1e6]"]
    roundness_weight: Annotated[float, "[0, 1e6]"]
    straightness_weight: Annotated[float, "[0, 1e6]"]
    normal_seam_weight: Annotated[float, "[0, 1e6]"]
    texture_seam_weight: Annotated[float, "[0, 1e6]"]
    max_cost: Annotated[float, "(0, inf)"]
    max_iterations: Annotated[int, "[1, 1000]"]


class PackOptions(TypedDict, total=False):
    """``xatlas.PackOptions``: how the charts are laid out in the texture."""

    max_chart_size: Annotated[int, "[0, 16384]"]  # texels; 0: no limit
    padding: Annotated[int, "[0, 1024]"]  # texels
    texels_per_unit: Annotated[float, "[0, 1e6]"]  # 0: whatever fits the resolution
    resolution: Annotated[int, "[0, 16384]"]  # texels; 0: whatever texels_per_unit needs
