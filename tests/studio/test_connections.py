"""Strangers who hold connections without asking for anything."""

import asyncio
import contextlib

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web
from lods.studio.connections import Connections


async def answer(port, text=b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
    """The first bytes of an answer; b"" if the server hangs up."""
    with contextlib.suppress(ConnectionError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(text)
        found = await reader.read(15)
        writer.close()
        return found
    return b""


def test_too_many_are_turned_away_and_silent_ones_make_room():
    async def visit():
        connections = Connections(most=3, seconds=0.2)
        app = web.Application(middlewares=[connections.middleware()])
        app.router.add_get("/", lambda request: asyncio.sleep(0, web.Response()))
        runner = web.AppRunner(app)
        await runner.setup()
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(
            lambda: connections.protocol(runner.server), "127.0.0.1", 0
        )
        port = listening.sockets[0].getsockname()[1]
        assert await answer(port) == b"HTTP/1.1 200 OK"
        kept = await asyncio.open_connection("127.0.0.1", port)
        kept[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await kept[0].readuntil(b"\r\n\r\n")
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        silent[0][1].write(b"GET / HTTP/1.1\r\nHo")  # a request that never ends
        await asyncio.sleep(0.05)
        assert await answer(port) == b""
        sweeping = loop.create_task(connections.sweep_forever(runner.server))
        for reader, _ in silent:
            assert await asyncio.wait_for(reader.read(), 5) == b""
        assert await answer(port) == b"HTTP/1.1 200 OK"
        kept[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")  # whoever has asked may stay
        assert await kept[0].read(15) == b"HTTP/1.1 200 OK"
        sweeping.cancel()
        for _, writer in (kept, *silent):
            writer.close()
        listening.close()
        await runner.cleanup()

    asyncio.run(visit())
