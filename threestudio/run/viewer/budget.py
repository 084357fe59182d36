"""How much of the time the view may take from the training."""

import math

# The share of the time, by default. Measured, the training takes a tenth longer at most: a visitor
# costs some more in the other threads of the run and in the visitor's process on the same cores.
AT_REST = 0.06
MOVING = 0.5  # the share while a visitor turns the object
FRAME = 0.12  # seconds that a picture may take while it does
SHARP = 2.0  # seconds that a picture may take once the camera rests
FRESH_EVERY = 3.0  # seconds between pictures of an object that grows, at most


class Budget:
    """Accounts for seconds. What nobody has asked for and has taken c seconds is followed by
    (1 / share - 1) c of training before anything else of the kind. What was asked for, by a camera
    that moves or has come to rest, is followed by as much as makes the share :data:`MOVING`, and by
    no more than that: an object that was turned grows on before the visitor's eyes.

    The picture of a camera that has come to rest is part of the rest, whose share it has to keep:
    what it took is owed, and each of the pictures after it, which are half as long meanwhile, pays
    back as much as it takes itself. At most twice :data:`SHARP` seconds are owed."""

    def __init__(self, share: float = AT_REST) -> None:
        self.share = share
        self.total = 0.0  # seconds spent
        self._rest_due = self._asked_due = 0.0
        self._owed = 0.0

    def spend(self, seconds: float, now: float, asked: bool = False, owed: bool = False) -> None:
        """`seconds` were spent, until `now`, on what was `asked` for or not; `owed`: on a camera
        that has come to rest."""
        self.total += seconds
        due = now + seconds * (1 / max(MOVING, self.share) - 1)
        self._asked_due = max(self._asked_due, due)
        if owed:
            self._owed = min(self._owed + seconds, 2 * SHARP)
        if asked:
            self._rest_due = max(self._rest_due, self._asked_due)
            return
        back = min(self._owed, seconds)
        self._owed -= back
        wait = (seconds + back) / self.share - seconds
        self._rest_due = max(self._rest_due, now) + wait
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
            seconds = self.share * FRESH_EVERY
            return min(SHARP, max(FRAME, seconds / 2 if self._owed else seconds))
        return FRAME if kind == "moving" else SHARP


class Cost:
    """What pictures cost: seconds are taken as fixed + rate * pixels, both learned from the last
    pictures of two kinds, small ones and large ones."""

    def __init__(self) -> None:
        self._seen: dict[bool, tuple[float, float]] = {}  # large? -> (pixels, seconds)

    @property
    def is_known(self) -> bool:
        """Whether there has been a picture."""
        return bool(self._seen)

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
