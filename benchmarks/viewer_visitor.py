"""The visitor of ``benchmarks/viewer.py``, a process of its own.

It obeys lines from standard input, "resting", "moving", "flood", "gone" and "end", and answers each
with a line: the pictures it was sent since the last one, and the seconds that it has waited for
those of a moving camera.
"""

import queue
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.view_client import Client

MESSAGES = 2000  # of a flood
CANVAS = {"image_width": 1280, "image_height": 720}
AWAY = ("gone", "end")
KEPT = 50  # pictures, before what was received is forgotten


class Visit:
    def __init__(self, port: int) -> None:
        self.port, self.client, self.doing = port, None, "gone"
        self.frames = self.seen = 0
        self.latencies: list[float] = []
        self.sent: float | None = None
        self.angle = 0.0

    def look(self) -> None:
        self.client.look(**CANVAS, position=[3.0, self.angle, 0.5])

    def obey(self, order: str) -> None:
        print(self.frames, *(f"{value:.4f}" for value in self.latencies), flush=True)
        self.doing, self.frames, self.latencies, self.sent = order, 0, [], None
        if order in AWAY and self.client is not None:
            self.client.close()
            self.client = None
        elif order not in AWAY and self.client is None:
            self.client, self.seen = Client(self.port), 0
            self.look()
        if order == "flood":
            for _ in range(MESSAGES):
                self.angle += 1e-4
                self.look()
                time.sleep(0.004)

    def watch(self) -> None:
        if self.client is None:
            return
        now = len(self.client.of("BackgroundImageMessage"))
        if now > self.seen:
            self.frames += now - self.seen
            self.seen = now
            if self.sent is not None:
                self.latencies.append(time.perf_counter() - self.sent)
                self.sent = None
        if now > KEPT:
            self.client.messages.clear()
            self.seen = 0
        if self.doing == "moving":
            self.angle += 0.01
            self.look()
            self.sent = time.perf_counter() if self.sent is None else self.sent


def main() -> None:
    orders: queue.Queue = queue.Queue()
    read = threading.Thread(target=lambda: [orders.put(line.strip()) for line in sys.stdin])
    read.daemon = True
    read.start()
    visit = Visit(int(sys.argv[1]))
    while visit.doing != "end":
        while not orders.empty():
            visit.obey(orders.get())
        visit.watch()
        time.sleep(1 / 30)


if __name__ == "__main__":
    main()
