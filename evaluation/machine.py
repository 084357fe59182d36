"""What a number was measured on: machine, memory, versions, commit."""

import platform
import re
import resource
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what a result depends on; tables and grids may change while a grid runs
CODE = (
    *("benchmarks/*.py", "configs", "custom", "evaluate.py", "evaluation/*.py", "launch.py"),
    *(":(glob)evaluation/*.yaml", "pocket/*.py", "pocket/*.safetensors", "threestudio"),
)


def peak_mib() -> int:
    """The most memory that this process has held so far; it only rises."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return names[0] if names else platform.processor()


def _git(*args: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout


def commit() -> str:
    """The commit of the code that runs, with ``-dirty`` if a file of it was changed since; empty
    without git."""
    changed = _git("status", "--porcelain", "--", *CODE).strip()
    return _git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")


def code() -> tuple[str, str, str]:
    """What the code is, whatever else was committed: its files as git has them, what differs from
    these, and which are new."""
    return (
        _git("ls-files", "-s", "--", *CODE),
        _git("diff", "HEAD", "--", *CODE),
        _git("ls-files", "-o", "--exclude-standard", "--", *CODE),
    )


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package; empty for one that is not there."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
