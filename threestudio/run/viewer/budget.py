"""How much of the time the view may take from the training."""

import math

AT_REST = 0.1  # the share of the time, by default
MOVING = 0.5  # the share while a visitor turns the object
FRAME = 0.12  # seconds that a picture may take while it does
SHARP = 2.0  # seconds that a picture may take once the camera rests
FRESH_EVERY = 3.0  # seconds between pictures of an object that grows, at most


class Budget:
    """Accounts for seconds. What nobody has asked for and has taken c seconds is followed by
    (1 / share - 1) c of training before anything else of the kind. What was asked for, by a camera
    that moves or has come to rest, is followed by as much as makes the share :data:`MOVING`, and by
    no more than that: an object that was turned grows on before the visitor's eyes."""

    def __init__(self, share: float = AT_REST) -> None:
        self.share = share
        self.total = 0.0  # seconds spent
        self._rest_due = self._asked_due = 0.0

    def spend(self, seconds: float, now: float, asked: bool = False) -> None:
        """`seconds` were spent, until `now`."""
        self.total += seconds
        due = now + seconds * (1 / max(MOVING, self.share) - 1)
        self._asked_due = max(self._asked_due, due)
        if asked:
            self._rest_due = max(self._rest_due, self._asked_due)
            return
        self._rest_due = max(self._rest_due, now) + seconds * (1 / self.share - 1)
        # no more than a minute is owed, or one slow picture would stop all others
        self._rest_due = min(self._rest_due, now + 60)

    def allows(self, asked: bool, now: float) -> bool:
        """Whether something may be drawn now."""
        return now >= (self._asked_due if asked else self._rest_due)

    def seconds(self, kind: str) -> float:
        """How long a picture may take: a "moving" one, a "sharp" one of a camera at rest, or a
        "fresh" one of an object that has changed. The latter are as small as has to be for one in
        every :data:`FRESH_EVERY` seconds."""
        if kind == "fresh":
            return min(SHARP, max(FRAME, self.share * FRESH_EVERY))
        return FRAME if kind == "moving" else SHARP


class Cost:
    """What pictures cost: seconds are taken as fixed + rate * pixels, both learned from the last
    pictures of two kinds, small ones and large ones."""

    def __init__(self) -> None:
        self._seen: dict[bool, tuple[float, float]] = {}  # large? -> (pixels, seconds)

    def saw(self, pixels: float, seconds: float, large: bool) -> None:
        """A picture of so many pixels took so long."""
        before = self._seen.get(large)
        if before is not None and 0.5 < before[0] / pixels < 2:
            seconds = 0.5 * (seconds + before[1])  # one slow picture means little
        self._seen[large] = pixels, seconds

    def pixels(self, seconds: float) -> float:
        """How many pixels a picture of so many seconds can have."""
        if not self._seen:
            return 64.0 * 64.0
        (low, fast), (high, slow) = min(self._seen.values()), max(self._seen.values())
        rate = (slow - fast) / (high - low) if high > 1.2 * low and slow > fast else slow / high
        fixed = max(0.0, slow - rate * high)
        return max(32.0 * 32.0, (seconds - fixed) / rate) if rate > 0 else math.inf
