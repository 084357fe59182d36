"""Tests; the library is found where the checkout has it."""

import sys
from pathlib import Path

_LIBRARY = str(Path(__file__).resolve().parent.parent / "custom" / "threestudio-lods")
if _LIBRARY not in sys.path:
    sys.path.append(_LIBRARY)
