"""Who may connect to the view, and which of their messages are heard.

A page of another origin must neither see a run nor command it. Browsers let any page open a
websocket to any address, and a name that first leads to the page's own server and then to this
machine (DNS rebinding) makes such a page look like ours. So every request, of files and of
websockets, is looked at before anything else is:

- ``Origin``, if there is one, has to be the address that the request itself names in ``Host``;
- ``Host`` has to be this machine by one of its local names, unless there is a token;
- with a token, it has to be in the URL (``?token=``), or in the cookie that a page which was opened
  with that URL has got.

A visitor is sent whatever viser's client needs, but of what comes from it only two kinds of
messages are heard, with the values that a control can have: where the camera is, and the new value
of a control. All others, one that opens a public tunnel to the run among them, are dropped, and so
is whatever cannot be read.
"""

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "X-Frame-Options": "SAMEORIGIN",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MAX_MESSAGE = 1 << 16  # bytes
MAX_TEXT = 2000  # characters of a text field
MAX_VISITORS = 16
MAX_CONNECTIONS = 64
RATE, BURST = 200.0, 400.0  # messages a second of one visitor, and as many at once
FAR = 1e6  # world units
_CAMERA = {  # numbers of each field of viser's message
    **{"wxyz": 4, "position": 3, "look_at": 3, "up_direction": 3},
    **{name: 1 for name in ("fov", "near", "far", "image_height", "image_width")},
}


class Door:
    """The checks of a server. ``token``: None where only this machine can connect."""

    def __init__(self, token: str | None) -> None:
        self.token = token
        self.port = 0
        self.visitors = 0
        self.connections = 0  # of visitors, and of whoever else has opened one
        self.dropped = 0  # messages

    @property
    def cookie(self) -> str:
        """The name of the cookie with the token. Cookies are of a host, whatever the port."""
        return f"viewer-{self.port}"

    def refusal(self, path: str, headers: Any) -> str | None:
        """Why a request is refused; None for one that is not."""
        hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
        if len(hosts) != 1 or len(origins) > 1:
            return "the request does not name one host"
        host = hosts[0].strip().lower()
        if self.token is None and _name(host) not in LOCAL_NAMES:
            return "this view is for this machine only: open it at http://127.0.0.1"
        if origins and origins[0].strip().lower() not in (f"http://{host}", f"https://{host}"):
            return "a page of another origin may not connect to this view"
        if self.token is not None and not self._knows_token(path, headers):
            return "open the URL that the run has printed, with its token"
        return None

    def _knows_token(self, path: str, headers: Any) -> bool:
        assert self.token is not None
        given = self._in_url(path)
        for header in headers.get_all("Cookie"):
            for part in header.split(";"):
                name, _, value = part.strip().partition("=")
                given += [value] * (name == self.cookie)
        right = self.token.encode()
        return any([hmac.compare_digest(word.encode(errors="replace"), right) for word in given])

    @staticmethod
    def _in_url(path: str) -> list[str]:
        try:
            return parse_qs(urlsplit(path).query, max_num_fields=20).get("token", [])
        except ValueError:
            return []

    # --- websockets -------------------------------------------------------------------------------

    def counted(self, kind: Any) -> Any:
        """`kind`, the class of a server's connections, of which MAX_CONNECTIONS are there at a
        time: anyone can open them without a token, and each is a file that the run cannot open."""
        door = self

        class Counted(kind):
            def connection_made(self, transport: Any) -> None:
                door.connections += 1
                super().connection_made(transport)
                if door.connections > MAX_CONNECTIONS:
                    transport.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                door.connections -= 1
                super().connection_lost(exc)

        return Counted

    def process_request(self, original: Callable | None) -> Callable:
        """`original`, which answers requests of files, behind this door."""
        from websockets import Headers
        from websockets.http11 import Response

        def process(connection: Any, request: Any) -> Any:
            why = self.refusal(request.path, request.headers)
            if why is not None:
                headers = {**HEADERS, "Content-Type": "text/plain; charset=utf-8"}
                body = f"{why}\n".encode()
                headers["Content-Length"] = str(len(body))
                status = HTTPStatus.FORBIDDEN
                return Response(status.value, status.phrase, Headers(**headers), body)
            response = None if original is None else original(connection, request)
            if response is not None:
                for name, value in HEADERS.items():
                    response.headers[name] = value
                if self.token is not None and self._in_url(request.path):
                    rest = "; Path=/; HttpOnly; SameSite=Strict"
                    response.headers["Set-Cookie"] = f"{self.cookie}={self.token}{rest}"
            return response

        return process

    def handler(self, original: Callable[[Any], Awaitable[None]]) -> Callable:
        """`original`, which serves a websocket, hearing only what :meth:`hears` lets through."""

        async def handle(connection: Any) -> None:
            if self.visitors >= MAX_VISITORS:
                await connection.close(1013, f"this view has {MAX_VISITORS} visitors already")
                return
            self.visitors += 1
            connection.recv = self._receive_of(connection.recv)
            try:
                # one that has gone, or whose client is of another version, is no error of the run
                with contextlib.suppress(Exception):
                    await original(connection)
            finally:
                self.visitors -= 1

        return handle

    def _receive_of(self, receive: Callable[[], Awaitable[Any]]) -> Callable:
        left, last = BURST, time.monotonic()

        async def heard(*args: Any, **kwargs: Any) -> bytes:
            nonlocal left, last
            while True:
                raw = await receive(*args, **kwargs)
                now = time.monotonic()
                left, last = min(BURST, left + RATE * (now - last)) - 1, now
                if left < 0:  # one who sends too much is read more slowly
                    await asyncio.sleep(-left / RATE)
                if self.hears(raw):
                    return raw
                self.dropped += 1

        return heard

    @staticmethod
    def hears(raw: Any) -> bool:
        """Whether a message from a visitor is one of the two kinds that are heard, and whole."""
        import msgspec

        if not isinstance(raw, bytes) or len(raw) > MAX_MESSAGE:
            return False
        try:
            message = msgspec.msgpack.decode(raw)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return False
        if not isinstance(message, dict):
            return False
        kind = message.pop("type", None)
        if kind == "ViewerCameraMessage":
            return _is_camera(message)
        return kind == "GuiUpdateMessage" and _is_new_value(message)


def _name(host: str) -> str:
    """The name in a ``Host`` header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= FAR  # which neither NaN nor an infinity is


def _is_camera(message: dict[Any, Any]) -> bool:
    if set(message) != set(_CAMERA):
        return False
    for name, count in _CAMERA.items():
        value = message[name]
        values = value if isinstance(value, list) and count > 1 else [value]
        if len(values) != count or not all(_is_number(number) for number in values):
            return False
    pixels = message["image_height"], message["image_width"]
    turned = sum(float(number) ** 2 for number in message["wxyz"])
    return all(1 <= n <= 16384 for n in pixels) and 0 < message["fov"] < math.pi and turned > 1e-6


def _is_new_value(message: dict[Any, Any]) -> bool:
    if set(message) != {"uuid", "updates"} or not isinstance(message["uuid"], str):
        return False
    updates = message["updates"]
    if not isinstance(updates, dict) or set(updates) != {"value"}:
        return False
    value = updates["value"]
    return (
        isinstance(value, bool)
        or _is_number(value)
        or (isinstance(value, str) and len(value) <= MAX_TEXT)
    )
