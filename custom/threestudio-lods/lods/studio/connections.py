"""How many connections there are, and for how long one may say nothing.

Anyone who reaches the port can open connections, without a token too, and each is a file that the
studio then cannot open: with too many, runs could not be started. aiohttp bounds neither their
number nor the time until the first request.
"""

import asyncio
import time
import weakref
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

MOST = 256
SECONDS = 20.0  # until the first request of a connection has come


class Connections:
    """Those of one server. :meth:`middleware` has to be the first of its application."""

    def __init__(self, most: int = MOST, seconds: float = SECONDS):
        self.most, self.seconds = most, seconds
        self._heard: weakref.WeakSet[Any] = weakref.WeakSet()  # transports with a request
        self._silent: dict[int, float] = {}  # ids of the others -> since when

    def middleware(self) -> Middleware:
        @web.middleware
        async def hear(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.transport is not None:
                self._heard.add(request.transport)
            return await handler(request)

        return hear

    def protocol(self, server: web.Server) -> Any:
        """That of a new connection; asyncio closes one for which this raises."""
        if len(server.connections) >= self.most:
            raise ConnectionRefusedError
        return server()

    def sweep(self, server: web.Server) -> None:
        """Close those that have been silent for too long."""
        now, before = time.monotonic(), self._silent
        self._silent = {}
        for connection in server.connections:
            transport = connection.transport
            if transport is None or transport in self._heard:
                continue
            since = self._silent[id(transport)] = before.get(id(transport), now)
            if now - since > self.seconds:
                transport.abort()

    async def sweep_forever(self, server: web.Server) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.seconds / 4))
            self.sweep(server)
