"""Systems: what is optimised with a LODS guidance."""

from . import lods_gs, lods_ngp

__all__ = ["lods_gs", "lods_ngp"]
