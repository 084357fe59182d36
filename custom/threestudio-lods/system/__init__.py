"""Systems: what is optimised with a LODS guidance."""

from . import lods_gs

__all__ = ["lods_gs"]
