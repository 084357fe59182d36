"""Systems: what is optimised, and how (``BaseSystem``, ``BaseLift3DSystem``)."""

from threestudio.systems import base, utils

__all__ = ["base", "utils"]
