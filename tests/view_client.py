"""A visitor of the live view without a browser: a websocket that speaks viser's language."""

import contextlib
import threading
import time

import msgspec
import viser
import zstandard
from websockets.sync.client import connect

VIEW = {
    "type": "ViewerCameraMessage",
    "wxyz": [0.5, -0.5, -0.5, 0.5],
    "position": [3.0, 0.0, 0.5],
    "fov": 0.8,
    "near": 0.01,
    "far": 1000.0,
    "image_height": 48,
    "image_width": 64,
    "look_at": [0.0, 0.0, 0.0],
    "up_direction": [0.0, 0.0, 1.0],
}


def decode(frame):
    """The messages of a frame of viser's server: two sizes of 8 bytes, then zstd, then arrays."""
    size = int.from_bytes(frame[8:16], "little")
    inner = zstandard.ZstdDecompressor().decompress(frame[16 : 16 + size])
    return list(msgspec.msgpack.decode(inner)["messages"])


class Client:
    """A connection that collects what it is sent in ``messages``, in a thread of its own."""

    def __init__(self, port, path="/", host="127.0.0.1", **options):
        protocols = [f"viser-v{viser.__version__}"]
        self.socket = connect(
            f"ws://{host}:{port}{path}",
            subprotocols=protocols,
            compression=None,
            max_size=None,
            **options,
        )
        self.messages = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        with contextlib.suppress(Exception):  # closed
            for frame in self.socket:
                self.messages += decode(frame)

    def send(self, message):
        self.socket.send(message if isinstance(message, bytes) else msgspec.msgpack.encode(message))

    def look(self, **changes):
        self.send({**VIEW, **changes})

    def of(self, kind):
        """The messages of a kind. viser begins with a background that is none: it is left out."""
        found = [message for message in list(self.messages) if message["type"] == kind]
        return [message for message in found if message.get("rgb_data", b"") is not None]

    def wait(self, kind, count=1, seconds=20.0):
        """The messages of a kind, once there are so many."""
        end = time.monotonic() + seconds
        while len(self.of(kind)) < count:
            if time.monotonic() > end:
                raise AssertionError(f"{len(self.of(kind))} of {count} {kind} in {seconds} s")
            time.sleep(0.01)
        return self.of(kind)

    def control(self, label):
        """The identity of the control with this label."""
        for message in self.messages:
            props = message.get("props")
            if isinstance(props, dict) and props.get("label") == label:
                return message["uuid"]
        raise AssertionError(f"there is no control {label!r}")

    def set(self, label, value):
        update = {"uuid": self.control(label), "updates": {"value": value}}
        self.send({"type": "GuiUpdateMessage", **update})

    def close(self):
        self.socket.close()
        self._thread.join(5)
