"""The live view of a run, which is a server of its own on this machine, under the studio's address.

A run with a view has ``viewer.json`` in its folder: {"port", "token", "pid", "paused"}. It is asked
at 127.0.0.1 only, whatever the file says, and only while the process of the run is alive.
"""

import asyncio
import contextlib
import json
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web
from lods.studio.guard import LIVE_POLICY
from lods.studio.records import MAX_JSON
from lods.studio.shelf import Entry
from yarl import URL

VIEWER = "viewer.json"
MAX_MESSAGE = 1 << 16  # bytes from a visitor
SECONDS = 10.0  # to wait for an answer
KEPT = ("Content-Type", "Content-Encoding", "Content-Length")  # headers of an answer


def view_of(entry: Entry) -> tuple[int, str] | None:
    """``(port, token)`` of the live view of a run that is under way; the token may be empty."""
    note = _note(entry)
    port, token = note.get("port"), note.get("token") or ""
    if type(port) is int and 1024 <= port < 65536 and isinstance(token, str):
        return port, token
    return None


def is_paused(entry: Entry) -> bool:
    """Whether a visitor of its live view has paused the run."""
    return _note(entry).get("paused") is True


def _note(entry: Entry) -> dict[str, Any]:
    """What ``viewer.json`` of a run that is under way says; {} where nothing can be read."""
    run = entry.run
    if entry.state != "running" or run is None:
        return {}
    path = run / VIEWER
    with contextlib.suppress(OSError, ValueError, KeyError, RecursionError):
        if path.is_symlink() or not path.is_file():
            return {}
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_JSON))
        began = path.stat().st_mtime >= entry.process["began"] - 5  # of this attempt
        if began and isinstance(found, dict):
            return found
    return {}


async def forward(
    request: web.Request, session: aiohttp.ClientSession, view: tuple[int, str], tail: str
) -> web.StreamResponse:
    """The answer of the view to a request for ``tail`` below its root."""
    port, token = view
    here = f"127.0.0.1:{port}"
    query = {"token": token} if token else {}
    target = URL.build(scheme="http", host="127.0.0.1", port=port, path=f"/{tail}", query=query)
    if request.headers.get("Upgrade", "").lower() == "websocket":
        return await _forward_socket(request, session, target, here)
    headers = {"Accept-Encoding": request.headers.get("Accept-Encoding", "identity")}
    try:
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        async with session.get(
            target, headers=headers, allow_redirects=False, timeout=timeout
        ) as answer:
            body = await answer.read()
            kept = {name: answer.headers[name] for name in KEPT if name in answer.headers}
            kept["Content-Security-Policy"] = LIVE_POLICY
            status = answer.status if answer.status < 300 or answer.status >= 400 else 502
            return web.Response(status=status, body=body, headers=kept)
    except (aiohttp.ClientError, TimeoutError):
        return web.Response(status=502, text="the live view of this run does not answer\n")


async def _forward_socket(
    request: web.Request, session: aiohttp.ClientSession, target: Any, here: str
) -> web.StreamResponse:
    offered = request.headers.get("Sec-WebSocket-Protocol", "")
    protocols = [word.strip() for word in offered.split(",") if word.strip()]
    try:
        theirs = await session.ws_connect(
            target, protocols=protocols, origin=f"http://{here}", max_msg_size=0, compress=0
        )
    except (aiohttp.ClientError, TimeoutError, OSError):
        return web.Response(status=502, text="the live view of this run does not answer\n")
    async with theirs:
        chosen = [theirs.protocol] if theirs.protocol else []
        ours = web.WebSocketResponse(protocols=chosen, max_msg_size=MAX_MESSAGE, compress=False)
        await ours.prepare(request)
        ways = [
            asyncio.create_task(_copy(ours, theirs)),
            asyncio.create_task(_copy(theirs, ours)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            with contextlib.suppress(ConnectionError):
                await ours.close()
    return ours


async def _copy(source: Any, target: Any) -> None:
    with contextlib.suppress(ConnectionError):
        async for message in source:
            if message.type == WSMsgType.BINARY:
                await target.send_bytes(message.data)
            elif message.type == WSMsgType.TEXT:
                await target.send_str(message.data)
            else:
                return
