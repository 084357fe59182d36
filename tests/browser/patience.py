"""Waiting for what a busy machine does late: as long as something still happens."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SILENCE = 300.0  # seconds in which nothing has happened, before a test gives up
PAGE = 1000 * SILENCE  # the same in Playwright's milliseconds


def until(
    condition: Callable[[], Any],
    sign: Callable[[], Any] = lambda: None,
    silence: float = SILENCE,
    every: float = 0.1,
) -> Any:
    """Wait for `condition`; what it gives then. Raises ``TimeoutError`` when `sign`, which changes
    while something is done, has been the same for `silence` seconds."""
    last, since = sign(), time.monotonic()
    while not (found := condition()):
        if (now := sign()) != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > silence:
            raise TimeoutError(f"nothing has happened for {silence:.0f} s")
        time.sleep(every)
    return found


def processor_seconds(pid: int) -> float:
    """What a process has had of the processors, 0 once it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def written(folder: Path) -> int:
    """The bytes of all files below a folder: a sign of whoever works there."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size
        except OSError:  # gone, or renamed
            continue
    return found


def frames(page: Any, count: int = 2) -> None:
    """Let a page draw: what was done to it before is in the next of its frames."""
    page.evaluate(
        """count => new Promise(done => {
            const next = () => count-- ? requestAnimationFrame(next) : done();
            next();
        })""",
        count,
    )
