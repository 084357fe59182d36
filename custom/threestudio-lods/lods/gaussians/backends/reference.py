"""The dense reference as a backend: slow, for any device and any float dtype."""

from typing import Any

from lods.gaussians.backends.base import Drawn, project_and_blend, unsupported
from lods.gaussians.reference import composite, project


def refuses(**arguments: Any) -> str:
    """Why the reference cannot draw this; empty if it can."""
    if arguments["absgrad"]:
        return "it has no absgrad; use backend='cpu'"
    return unsupported(arguments)


def rasterization(**arguments: Any) -> Drawn:
    """See :func:`lods.gaussians.rasterization`."""
    return project_and_blend(project, composite, arguments, chunk=arguments["channel_chunk"])
