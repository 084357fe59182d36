"""The HTTP server of the studio: pages, data, files and commands. See :mod:`lods.studio`."""

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware
from lods import __version__, host
from lods.commands.job import OF_FILE
from lods.studio import choices, live, meshes
from lods.studio.connections import Connections
from lods.studio.guard import MAX_BODY, Guard
from lods.studio.progress import log_end, progress, steered_to, trained_for
from lods.studio.queue import OVER, Queue, Refused
from lods.studio.records import changed
from lods.studio.shelf import KINDS, WAITING, Entry, created

ASSETS = Path(__file__).resolve().parent / "assets"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECONDS = 1.0  # between two looks after the processes
UPLOAD_SECONDS = 300.0  # in which a mesh has to come
LEAST_SECONDS = 5.0  # of training before a time left is told
DRAWN = ("ply", "glb")  # the files whose objects the page draws


class Studio:
    """The handlers, for one queue."""

    def __init__(self, queue: Queue):
        self.queue, self.shelf = queue, queue.shelf
        self._told: dict[str, tuple[tuple[Entry, int], dict[str, Any]]] = {}  # of finished runs
        self._seen: dict[str, tuple[int, str, float, int]] = {}  # for the time left
        self._session: aiohttp.ClientSession | None = None
        self._receiving = asyncio.Semaphore(2)  # meshes at a time, for the same reason as:
        self._drawing = asyncio.Lock()  # one at a time: a large object takes much memory

    def app(self, guard: Guard, *first: Middleware) -> web.Application:
        """The application, with these middlewares before all others."""
        middlewares = [*first, guard.middleware()]
        app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY)
        add = app.router.add_route
        add("GET", "/", self.page)
        add("GET", "/assets/{name}", self.asset)
        add("GET", "/api/choices", self.choices)
        add("GET", "/api/runs", self.runs)
        add("POST", "/api/runs", self.make)
        add("POST", "/api/meshes", self.mesh)
        add("GET", "/api/runs/{run}", self.run)
        add("POST", "/api/runs/{run}/{verb:cancel|resume|remove|export}", self.command)
        add("GET", "/files/{run}/{kind}", self.file)
        add("GET", "/drawn/{run}/{kind}", self.drawn)
        add("GET", "/live/{run}", self.live)
        add("GET", "/live/{run}/{tail:.*}", self.live)
        app.cleanup_ctx.append(self._looking_after)
        return app

    async def _looking_after(self, app: web.Application) -> AsyncIterator[None]:
        await asyncio.to_thread(self.queue.recover)
        task = asyncio.create_task(self._tick_forever())
        jar = aiohttp.DummyCookieJar()
        # what a live view has packed is passed on as it is
        async with aiohttp.ClientSession(cookie_jar=jar, auto_decompress=False) as self._session:
            yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _tick_forever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.queue.tick)
            except Exception as error:  # such as a full disk: it must not end the queue
                print(f"the queue waits: {type(error).__name__}: {error}", flush=True)
            await asyncio.sleep(SECONDS)

    # --- the page ---------------------------------------------------------------------------------

    async def page(self, request: web.Request) -> web.StreamResponse:
        return _asset("index.html")

    async def asset(self, request: web.Request) -> web.StreamResponse:
        return _asset(request.match_info["name"])

    # --- data -------------------------------------------------------------------------------------

    async def choices(self, request: web.Request) -> web.StreamResponse:
        offered = await asyncio.to_thread(choices.as_data)
        return web.json_response(offered | {"version": __version__, "folder": str(self.shelf.root)})

    async def runs(self, request: web.Request) -> web.StreamResponse:
        def look() -> dict[str, Any]:
            entries = self.shelf.entries()
            return {"runs": [self._short(e) for e in entries], "queue": self.queue.waiting()}

        return web.json_response(await asyncio.to_thread(look))

    async def run(self, request: web.Request) -> web.StreamResponse:
        def look() -> dict[str, Any]:
            entry = self._entry(request)
            files = self.shelf.files(entry)
            about = self._short(entry) | {"formats": self.queue.formats(entry)}
            about["folder"] = str(entry.folder)
            about["log"] = ""
            with contextlib.suppress(OSError, KeyError):
                about["log"] = log_end(files["log"])
            if entry.request is not None:
                about["settings"] = list(entry.request.overrides)
            return about

        return web.json_response(await asyncio.to_thread(look))

    def _entry(self, request: web.Request) -> Entry:
        entry = self.shelf.find(request.match_info["run"])
        if entry is None:
            raise web.HTTPNotFound(reason="there is no such run")
        return entry

    def _short(self, entry: Entry) -> dict[str, Any]:
        """What the gallery shows of a run. Of a finished one it is found out once."""
        finished = entry.state == "done" and entry.kind != "train"
        key = entry, changed(entry.folder)
        known = self._told.get(entry.name)
        if finished and known is not None and known[0][0] is entry and known[0][1] == key[1]:
            return known[1]
        try:
            about = self._about(entry)
        except Exception as error:  # one damaged folder must not hide the others
            about = {"name": entry.name, "kind": entry.kind, "state": "damaged", "live": False}
            about |= {"error": f"its files cannot be read: {error}"[:300], "seconds": 0}
            about |= {"created": 0, "quality": "", "files": {}}
            about["can"] = ["remove"] * (entry.kind == "studio")
        self._told.pop(entry.name, None)
        if finished:
            self._told[entry.name] = key, about
        return about

    def _about(self, entry: Entry) -> dict[str, Any]:
        state = entry.state
        if state == "queued" and self.queue.is_starting(entry.name):
            state = "running"
        about: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "state": state}
        about |= {"error": entry.error, "seconds": round(entry.seconds), "live": False}
        about["created"] = created(entry)
        about["quality"] = entry.wish.quality if entry.wish else ""
        about["attempt"] = entry.wish.attempt if entry.wish else 1
        if entry.request is not None:
            for name in ("prompt", "on", "method", "model", "seed"):
                about[name] = getattr(entry.request, name)
        # the time of a file makes a new address of it when it changes
        files = self.shelf.files(entry)
        about["files"] = {kind: changed(path) // 1000 for kind, path in files.items()}
        about["steered"] = steered_to(entry)
        about["trained"] = trained_for(entry) if state == "done" else 0
        if state in ("running", "stopping"):
            about["progress"] = self._progress(entry)
            about["live"] = live.view_of(entry) is not None
        mesh = "" if entry.request is None else self.queue.meshes.name_of(entry.request)
        about |= {"mesh": mesh, "mesh_title": meshes.title(mesh)}
        about["can"] = self._can(entry, state, mesh)
        return about

    @staticmethod
    def _can(entry: Entry, state: str, mesh: str) -> list[str]:
        """The commands that make sense now."""
        can = []
        if entry.kind == "studio":
            can += ["cancel"] * (state in ("queued", "running"))
            can += ["resume"] * (state in OVER)
            can += ["remove"] * (state not in WAITING)
            unfinished = state in OVER and entry.trained is not None
            can += ["finish"] * unfinished
        offered = entry.request is not None and (
            entry.request.on in choices.REPRESENTATIONS and (entry.request.on != OF_FILE or mesh)
        )
        if offered and state != "damaged":
            can.append("again")
        return can

    def _progress(self, entry: Entry) -> dict[str, Any]:
        """How far it is, with the seconds that are left of this stage, once they are known."""
        found = progress(entry)
        found["elapsed"] = max(0, round(time.time() - entry.process.get("began", time.time())))
        found["left"], found["paused"] = None, live.is_paused(entry)
        attempt, stage, now = entry.process.get("attempt", 0), found["stage"], time.monotonic()
        first = self._seen.get(entry.name)
        if found["paused"] or first is None or first[:2] != (attempt, stage):
            self._seen[entry.name] = attempt, stage, now, found["step"]
        elif found["step"] > first[3] and now - first[2] > LEAST_SECONDS:
            each = (now - first[2]) / (found["step"] - first[3])
            found["left"] = round(each * (found["of"] - found["step"]))
        return found

    # --- files ------------------------------------------------------------------------------------

    async def file(self, request: web.Request) -> web.StreamResponse:
        def look() -> tuple[Entry, Path | None]:
            entry = self._entry(request)
            return entry, self.shelf.files(entry).get(request.match_info["kind"])

        entry, path = await asyncio.to_thread(look)
        if path is None:
            raise web.HTTPNotFound(reason="there is no such file")
        ending, kind = KINDS[request.match_info["kind"]]
        headers = {"Content-Type": kind, "Content-Security-Policy": "default-src 'none'; sandbox"}
        headers |= _kept(request)
        # a page of a run is opened from where it was saved: here none of its scripts may run
        if "download" in request.query or request.match_info["kind"] == "report":
            safe = "".join(
                c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in entry.name
            )
            headers["Content-Disposition"] = f'attachment; filename="{safe}{ending}"'
        return web.FileResponse(path, headers=headers)

    async def drawn(self, request: web.Request) -> web.StreamResponse:
        """The object of a file, small enough for the viewer: {"about", "data", "left_out"}."""

        def look() -> dict[str, Any] | None:
            kind = request.match_info["kind"]
            path = self.shelf.files(self._entry(request)).get(kind) if kind in DRAWN else None
            return None if path is None else _packed(path)

        async with self._drawing:
            try:
                found = await asyncio.to_thread(look)
            except ValueError as error:
                return _error(str(error), 422)
            except MemoryError:
                return _error("the object is too large to be drawn", 422)
        if found is None:
            raise web.HTTPNotFound(reason="there is no such object")
        return web.json_response(found, headers=_kept(request))

    async def live(self, request: web.Request) -> web.StreamResponse:
        def look() -> tuple[int, str] | None:
            return live.view_of(self._entry(request))

        view = await asyncio.to_thread(look)
        if view is None:
            raise web.HTTPNotFound(reason="this run has no live view now")
        tail = request.match_info.get("tail", "")
        socket = "Upgrade" in request.headers
        if not socket and not request.path.endswith("/") and not tail:
            return web.Response(status=308, headers={"Location": f"{request.rel_url.raw_path}/"})
        assert self._session is not None
        return await live.forward(request, self._session, view, tail)

    # --- commands ---------------------------------------------------------------------------------

    async def make(self, request: web.Request) -> web.StreamResponse:
        form = await _body(request)

        def add() -> dict[str, Any]:
            wanted, quality = choices.read_form(form, self.queue.meshes)
            return {"name": self.queue.add(wanted, quality)}

        return await _done(add)

    async def mesh(self, request: web.Request) -> web.StreamResponse:
        """A mesh that is sent as it is, its name in the query: {"mesh", "title"}, of which a form
        names the first."""
        if request.content_type != "application/octet-stream":
            raise web.HTTPUnsupportedMediaType(reason="a mesh is application/octet-stream")
        title, content, limit = request.query.get("name", ""), bytearray(), meshes.MAX_BYTES
        try:
            async with self._receiving, asyncio.timeout(UPLOAD_SECONDS):
                async for part in request.content.iter_any():
                    content += part
                    if len(content) > limit:
                        return _error(f"a mesh has at most {limit >> 20} MB", 413)
        except TimeoutError:
            return _error("the mesh has not come in time", 408)

        def keep() -> dict[str, Any]:
            name = self.queue.keep_mesh(title, bytes(content))
            return {"mesh": name, "title": meshes.title(name)}

        async with self._drawing:  # as what is drawn, it may take much memory
            return await _done(keep)

    async def command(self, request: web.Request) -> web.StreamResponse:
        form = await _body(request)
        name, verb = request.match_info["run"], request.match_info["verb"]
        if verb == "export":
            fmt = form.get("format") if isinstance(form, dict) else None
            if not isinstance(fmt, str):
                return _error("an export needs a format")
            return await _done(lambda: self.queue.export(name, fmt))
        return await _done(lambda: getattr(self.queue, verb)(name))


async def _done(action: Callable[[], Any]) -> web.Response:
    """What a command gives, or the one line that says why it was not carried out."""
    try:
        return web.json_response(await asyncio.to_thread(action) or {})
    except Refused as error:
        return _error(str(error), 409)
    except ValueError as error:
        return _error(str(error))
    except OSError as error:
        return _error(f"the disk refuses it: {error.strerror or error}", 507)


def _error(text: str, status: int = 400) -> web.Response:
    return web.json_response({"error": " ".join(text.split())[:1000]}, status=status)


async def _body(request: web.Request) -> Any:
    """The JSON of a request. Its type is what no form of another page can send without asking."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(reason="a command is application/json")
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError):
        raise web.HTTPBadRequest(reason="the request holds no JSON") from None


def _kept(request: web.Request) -> dict[str, str]:
    """Headers by which a browser keeps what has the time of its file in its address: that is
    another one when the file changes."""
    timed = request.query_string.isdecimal()
    return {"Cache-Control": "private, max-age=31536000"} if timed else {}


def _packed(path: Path) -> dict[str, Any]:
    drawing = host.module("threestudio.run.drawing")
    found = drawing.read_object(path)
    small = drawing.fewer(found, drawing.BUDGET)
    about, data = drawing.packed(small, drawing.Camera())
    return {"about": about, "data": data, "left_out": drawing.left_out(small, found)}


def _asset(name: str) -> web.Response:
    found = {path.name: path for path in ASSETS.iterdir() if path.suffix in TYPES}
    viewer = host.module("threestudio.run.drawing").VIEWER  # that of the pages of runs
    found[viewer.name] = viewer
    if name not in found:
        raise web.HTTPNotFound(reason="there is no such page")
    path = found[name]
    headers = {"Content-Type": TYPES[path.suffix], "Cache-Control": "no-cache"}
    return web.Response(body=path.read_bytes(), headers=headers)


def _logger() -> logging.Logger:
    """Of errors here. That somebody has sent what is no HTTP is none of them."""
    logger = logging.getLogger("lods.studio.server")
    logger.addFilter(_is_ours)
    return logger


def _is_ours(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


def serve(
    queue: Queue, host: str, port: int, token: str | None, tell: Callable[[int], None]
) -> None:
    """Serve until a signal ends it; ``tell`` hears the port once the server listens. Raises
    ``OSError`` where it cannot."""
    asyncio.run(_serve(queue, host, port, token, tell))


async def _serve(
    queue: Queue, host: str, port: int, token: str | None, tell: Callable[[int], None]
) -> None:
    connections = Connections()
    app = Studio(queue).app(Guard(host, token, port), connections.middleware())
    runner = web.AppRunner(
        app, access_log=None, logger=_logger(), shutdown_timeout=2.0, keepalive_timeout=75.0
    )
    await runner.setup()
    server = runner.server
    assert server is not None
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    listening = sweeping = None
    try:
        listening = await loop.create_server(lambda: connections.protocol(server), host, port)
        sweeping = loop.create_task(connections.sweep_forever(server))
        tell(listening.sockets[0].getsockname()[1])
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stopped.set)
        await stopped.wait()
    finally:
        if listening is not None:
            listening.close()
        if sweeping is not None:
            sweeping.cancel()
        await runner.cleanup()
