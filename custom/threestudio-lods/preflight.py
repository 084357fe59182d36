"""What the launcher of this repository asks before torch is imported: see ``lods/preflight.py``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("lods") is None:
    sys.path.append(str(Path(__file__).resolve().parent))

import lods
from lods.declared import settings_of
from lods.preflight import preflight

SOURCES = (Path(lods.__file__).parent / "threestudio",)  # of an installed lods, too

__all__ = ["SOURCES", "preflight", "settings_of"]
