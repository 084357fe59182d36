"""How fast a training is, and how long it still takes."""

from collections import deque
from statistics import median
from typing import Any

RECENT = 50  # steps of which the median is the pace
SLOW = 3.0  # so many medians: a step that did something else too


class Pace:
    """Estimates from the durations of steps, in seconds.

    The first step of a process also sets up what later steps use, and is left out. The pace is
    the median of the last RECENT steps. Densifying, saving and the like make some steps far slower:
    what they took beyond SLOW medians is shared out over all steps, those to come included.
    Validations are counted on their own, with the median of those seen.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._count = 0
        self._extra = 0.0
        self._validations: deque[float] = deque(maxlen=RECENT)

    def step(self, seconds: float) -> None:
        """A step has taken so long, without the validations before it."""
        if self.first is None:
            self.first = seconds
            return
        self._recent.append(seconds)
        self._count += 1
        self._extra += max(0.0, seconds - SLOW * median(self._recent))

    def validation(self, seconds: float) -> None:
        """A validation between two steps has taken so long."""
        self._validations.append(seconds)

    @property
    def typical(self) -> float | None:
        """Seconds of a step; None before the second one."""
        return median(self._recent) if self._recent else None

    def left(self, steps: int, validations: int = 0) -> float | None:
        """Seconds that so many steps and validations will take; None before the second step."""
        if self.typical is None:
            return None
        each = self.typical + self._extra / self._count
        check = median(self._validations) if self._validations else 0.0
        return steps * each + validations * check


def paused_seconds(trainer: Any) -> float:
    """How long callbacks have kept the training waiting so far, because somebody has paused it."""
    return sum(getattr(each, "paused_seconds", 0.0) for each in getattr(trainer, "callbacks", ()))


def clock(seconds: float) -> str:
    """``m:ss``, ``h:mm:ss``, or from two days on days and hours."""
    whole = max(0, round(seconds))
    if whole >= 48 * 3600:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(seconds: float) -> str:
    """Steps of this duration as ``3.9 step/s`` or ``2.1 s/step``."""
    if seconds <= 0:
        return "fast"
    return f"{1 / seconds:.3g} step/s" if seconds < 1 else f"{seconds:.3g} s/step"
