"""Numbers of a run over its steps, of which a visitor who comes late sees all."""

import threading

import numpy as np

MOST = 600  # points that are kept


class Curves:
    """Series that share their steps. When there are :data:`MOST` points, every second one goes, and
    from then on half as many are taken."""

    def __init__(self) -> None:
        self._points: list[tuple[int, dict[str, float]]] = []
        self._every = 1
        self._calls = 0
        self._lock = threading.Lock()

    def add(self, step: int, values: dict[str, float]) -> None:
        """The values at a step, which is above the last."""
        with self._lock:
            self._calls += 1
            if (self._points and step <= self._points[-1][0]) or self._calls % self._every:
                return
            self._points.append((step, values))
            if len(self._points) > MOST:
                del self._points[1::2]
                self._every *= 2

    def __len__(self) -> int:
        return len(self._points)

    def known(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each name with at least two values: the steps that it has one at, and the values."""
        with self._lock:
            names = list(dict.fromkeys(name for _, values in self._points for name in values))
        found = {}
        for name in names:
            steps, values = self.series(name)
            finite = np.isfinite(values)
            if finite.sum() > 1:
                found[name] = steps[finite], values[finite]
        return found

    def series(self, *names: str) -> tuple[np.ndarray, ...]:
        """The steps, and of each name the values (NaN where there is none); at least one point."""
        with self._lock:
            points = list(self._points) or [(0, {})]
        steps = np.array([step for step, _ in points], np.float64)
        values = [[v.get(name, float("nan")) for _, v in points] for name in names]
        return steps, *(np.array(v, np.float64) for v in values)
