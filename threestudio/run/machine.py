"""The machine that a run is on."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return names[0] if names else platform.processor()
