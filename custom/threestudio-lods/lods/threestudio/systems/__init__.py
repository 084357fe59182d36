"""Systems: a representation that is optimised with a guidance."""

from lods.threestudio.systems import gs, mesh, ngp

__all__ = ["gs", "mesh", "ngp"]
