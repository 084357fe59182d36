"""LODS for threestudio: importing this package registers its guidances, Gaussians and systems."""

from . import gaussian, guidance, system

__all__ = ["gaussian", "guidance", "system"]
