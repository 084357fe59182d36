"""A guidance and its system, written as a stranger to this repository would write them."""

from packaging.version import Version

import threestudio

if hasattr(threestudio, "__version__") and Version(threestudio.__version__) >= Version("0.2.0"):
    pass
else:
    raise ValueError("threestudio 0.2.0 or newer is needed")

from .guidance import score_guidance
from .system import score_system

__all__ = ["score_guidance", "score_system"]
