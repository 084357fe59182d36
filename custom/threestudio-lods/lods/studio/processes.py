"""Processes that outlive the one that has started them, and are found again."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity(pid: int) -> str | None:
    """A text that no other process has ever had: of this pid, when the process began. None where
    there is none, or only one that has ended and was not waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # state, and the clock ticks from the machine's start to the process's
        return None if fields[0] in "ZX" else f"{pid} {fields[19]} {_BOOT.read_text().strip()}"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError, UnicodeDecodeError):
        return None
    with suppress(psutil.Error):  # systems without /proc
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return f"{pid} {process.create_time():.2f}"
    return None


def is_alive(pid: int, who: str) -> bool:
    """Whether the process ``pid`` is still the one whose :func:`identity` was ``who``."""
    return pid > 1 and identity(pid) == who


def ask(pid: int, who: str, signum: int = signal.SIGTERM) -> None:
    """Send a signal to the group of a process which leads one, if it is still that process."""
    with suppress(ProcessLookupError, PermissionError):
        if is_alive(pid, who) and os.getpgid(pid) == pid:
            os.killpg(pid, signum)
