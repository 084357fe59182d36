"""What the launcher of this repository asks before torch is imported: see ``lods/preflight.py``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("lods") is None:
    sys.path.append(str(Path(__file__).resolve().parent))

from lods.preflight import preflight

__all__ = ["preflight"]
