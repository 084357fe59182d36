"""Messages of the library, each once even where several processes train.

They go to Python's logger ``lods``, whose warnings appear on stderr unless the program sets it up
otherwise; in a threestudio run they go to threestudio's own logger (see :func:`send_to`).
"""

import logging
import os
from typing import Any

logger = logging.getLogger("lods")
_host: Any = None


def send_to(host: Any) -> None:
    """Let the functions ``warn``, ``info`` and ``debug`` of ``host`` take all messages from now
    on; None: the logger ``lods`` does again."""
    global _host
    _host = host


def _is_first_process() -> bool:
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return all(rank in (None, "", "0") for rank in ranks)


def _tell(level: str, host_level: str, message: str) -> None:
    if _host is not None:
        getattr(_host, host_level)(message)
    elif _is_first_process():
        getattr(logger, level)(message)


def warn(message: str) -> None:
    """Say that something is probably not as the user wants it."""
    _tell("warning", "warn", message)


def info(message: str) -> None:
    """Say what was chosen or read."""
    _tell("info", "info", message)


def debug(message: str) -> None:
    """Say what only a search for an error needs."""
    _tell("debug", "debug", message)
