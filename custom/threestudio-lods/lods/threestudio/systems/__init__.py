"""Systems: a representation that is optimised with a guidance."""

from lods.threestudio.systems import gs, ngp

__all__ = ["gs", "ngp"]
