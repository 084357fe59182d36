"""Who looks at a run, and what each of them is to be sent next."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from threestudio.run.viewer.frames import View

RESTS_AFTER = 0.25  # seconds without a new camera
NOTE_SECONDS = 8.0  # that a note is shown


@dataclass
class Drawn:
    """The last picture that a visitor was sent."""

    view: View
    step: int
    height: int  # pixels
    full: bool  # as large as it gets
    # drawn while the camera moved, or before it was known what a picture costs: another one follows
    rough: bool = False


@dataclass
class Visitor:
    """One connection. It wants at most one picture: that from where its camera is now."""

    client: Any  # viser's
    view: View | None = None
    moved_at: float = 0.0
    drawn: Drawn | None = None
    frames: int = 0
    came_at: float = field(default_factory=time.monotonic)

    def look(self, view: View) -> None:
        """The camera is there now; what was wanted before is forgotten."""
        if view != self.view:
            self.view, self.moved_at = view, time.monotonic()

    def is_moving(self, now: float) -> bool:
        """Whether the camera has moved a moment ago. The first view is none: it is drawn whole."""
        return self.drawn is not None and now - self.moved_at < RESTS_AFTER

    def is_ready(self) -> bool:
        """Whether everything that was sent before has left: a slow or vanished visitor is sent no
        more until it has."""
        return not self.client._websock_connection.get_message_buffer().message_from_id

    def has_seen(self, step: int) -> bool:
        """Whether it has the whole picture of a step, or has not said where its camera is."""
        if self.view is None or self.drawn is None:
            return self.view is None
        return self.drawn.full and (self.drawn.view, self.drawn.step) == (self.view, step)

    def wants(self, step: int, now: float) -> str:
        """ "moving", "sharp", "fresh" or "": the kind of picture that it would be sent now."""
        if self.view is None:
            return ""
        if self.drawn is None or (self.drawn.view != self.view and not self.is_moving(now)):
            return "sharp"
        if self.drawn.view != self.view:
            return "moving"
        if self.is_moving(now):
            return ""
        if not self.drawn.full and (self.drawn.rough or self.drawn.step == step):
            return "sharp"
        return "fresh" if self.drawn.step != step else ""


class Visitors:
    """All visitors, by the number of their connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: dict[int, Visitor] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, client: Any) -> Visitor:
        """A new one."""
        visitor = Visitor(client)
        with self._lock:
            self._all[client.client_id] = visitor
        return visitor

    def remove(self, client_id: int) -> None:
        """It has gone."""
        with self._lock:
            self._all.pop(client_id, None)

    def get(self, client_id: int | None) -> Visitor | None:
        """The visitor of that number, if it is still there."""
        return None if client_id is None else self._all.get(client_id)

    def tell(self, client_id: int | None, title: str, body: str) -> None:
        """Show the visitor of that number a note for some seconds, if it is still there."""
        visitor = self.get(client_id)
        if visitor is not None:
            visitor.client.add_notification(title, body, auto_close_seconds=NOTE_SECONDS)

    def all(self) -> list[Visitor]:
        """Those who are there, the one who has waited longest for a picture first."""
        with self._lock:
            return sorted(self._all.values(), key=lambda v: v.frames)
