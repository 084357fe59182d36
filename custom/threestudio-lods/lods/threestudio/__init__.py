"""The adapters for a threestudio host: importing this registers guidances, geometries, systems.

They take from threestudio the names that upstream has, so that they work there unchanged.
"""

from lods import log

import threestudio

log.send_to(threestudio)

from lods.threestudio import (  # noqa: E402
    background,
    data,
    exporter,
    geometry,
    guidance,
    mesh,
    multiview,
    prompt,
    renderer,
    systems,
)

warn = threestudio.warn

__all__ = [
    "background",
    "data",
    "exporter",
    "geometry",
    "guidance",
    "mesh",
    "multiview",
    "prompt",
    "renderer",
    "systems",
    "warn",
]
