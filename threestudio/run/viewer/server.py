"""viser's server behind :class:`.door.Door`, and the file that says where it is."""

import contextlib
import io
import json
import os
import re
import secrets
import socket
import threading
import types
from pathlib import Path
from typing import Any

from threestudio.run.snapshot import PlainFiles
from threestudio.run.viewer.door import MAX_MESSAGE, Door
from threestudio.run.viewer.options import FIRST_PORT, TRIED_PORTS, ViewerOptions
from threestudio.run.viewer.phone import leaving_room
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file

FILE = "viewer.json"
MAX_FILE = 1 << 16  # bytes of one that are read
_starting = threading.Lock()


def listen(options: ViewerOptions) -> socket.socket:
    """A socket that listens where the options say. Raises :class:`UserError` for an address that is
    not this machine's and for a port that is taken."""
    if options.port is not None:
        ports = [options.port]
    else:
        ports = [*range(FIRST_PORT, FIRST_PORT + TRIED_PORTS), 0]
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    problem = ""
    for port in ports:
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((options.host, port))
            found.listen(64)
            found.setblocking(False)
            return found
        except (OSError, OverflowError, UnicodeError) as error:
            found.close()
            problem = getattr(error, "strerror", None) or str(error)
            if isinstance(error, socket.gaierror) or not isinstance(error, OSError):
                raise UserError(
                    f"--viewer-host {options.host} is no address of this machine: {problem}"
                ) from None
    where = f"{options.host}:{options.port if options.port is not None else FIRST_PORT}"
    hint = "choose another port, or 0 for any" if options.port else "see --viewer-host"
    raise UserError(f"--viewer cannot listen at {where} ({problem}): {hint}") from None


class Server:
    """A running server at a socket of :func:`listen`. ``viser`` is viser's own object; ``url`` has
    the token where there is one.

    Raises :class:`UserError` where this viser cannot be put behind a door: nothing is served then.
    """

    def __init__(self, options: ViewerOptions, listening: socket.socket, label: str) -> None:
        import viser

        self.door = Door(None if options.is_local else secrets.token_urlsafe(24))
        self.port = self.door.port = listening.getsockname()[1]
        self.host = options.host
        installed = False
        quiet = contextlib.redirect_stdout(io.StringIO())  # viser prints a box
        with _starting, quiet, _behind(self.door, listening) as used:
            self.viser = viser.ViserServer(options.host, self.port, label=label, verbose=False)
            installed = bool(used)
        if not installed or self.viser.get_port() != self.port:
            self.stop()
            raise UserError(
                f"viser {viser.__version__} cannot be guarded as this program needs it: pip "
                "install viser==1.1.1"
            )

    @property
    def token(self) -> str | None:
        """What a URL needs; None where only this machine can connect."""
        return self.door.token

    @property
    def url(self) -> str:
        """What a browser opens."""
        return url_of(self.host, self.port, self.token)

    def stop(self) -> None:
        """Stop serving; a second call changes nothing."""
        found = self.__dict__.get("viser")
        if found is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                found.stop()
            self.viser = None


def url_of(host: str, port: int, token: str | None) -> str:
    """What a browser opens of a view that listens at ``host``."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}" + (f"/?token={token}" if token else "")


@contextlib.contextmanager
def _behind(door: Door, listening: socket.socket):
    """Within this, a server of viser listens on that socket, behind that door. viser has no hook
    for requests: what it calls to serve, by the name of a module, is another function meanwhile.
    Gives a list that holds something once that was called."""
    import websockets
    import websockets.asyncio.server as real
    import websockets.datastructures
    import websockets.exceptions
    from viser.infra import _infra

    used: list[bool] = []

    def serve(handler: Any, host: Any, port: Any, **kwargs: Any) -> Any:
        used.append(True)
        files = leaving_room(kwargs.get("process_request"))
        kwargs["process_request"] = door.process_request(files)
        kwargs["max_size"] = 2 * MAX_MESSAGE
        kwargs["create_connection"] = door.counted(real.ServerConnection)
        kwargs["logger"] = _quiet_logger()
        return real.serve(door.handler(handler), sock=listening, **kwargs)

    stand_in = types.SimpleNamespace(
        asyncio=types.SimpleNamespace(
            server=types.SimpleNamespace(serve=serve, ServerConnection=real.ServerConnection)
        ),
        datastructures=websockets.datastructures,
        exceptions=websockets.exceptions,
    )
    before = _infra.websockets
    _infra.websockets = stand_in
    try:
        yield used
    finally:
        _infra.websockets = before


def _quiet_logger() -> Any:
    """Of connections: what goes wrong with one is no line of the run's log."""
    import logging

    logger = logging.getLogger("threestudio.viewer.connections")
    logger.propagate = False
    logger.setLevel(logging.CRITICAL + 1)
    return logger


# --- viewer.json ----------------------------------------------------------------------------------


def announce(folder: Path, server: Server, paused: bool = False) -> Path:
    """Write where the view of the run in `folder` is, and whether a visitor has paused the run, for
    other programs of the same user."""
    path = folder / FILE
    told = {"url": server.url, "host": server.host, "port": server.port, "token": server.token}
    with whole_file(path, allowed=0o600) as tmp:
        tmp.write_text(json.dumps({**told, "pid": os.getpid(), "paused": paused}) + "\n")
    return path


def withdraw(path: Path) -> None:
    """Remove the file that :func:`announce` has written, unless it is another process's by now."""
    if (found := read(path.parent)) and found["pid"] == os.getpid():
        with contextlib.suppress(OSError):
            path.unlink()


def read(folder: Path) -> dict[str, Any] | None:
    """What ``viewer.json`` in `folder` says, or None where there is none, or none that can be
    read. The folder may be somebody else's: a URL that leads elsewhere than the rest is none."""
    try:
        if FILE not in PlainFiles(folder):
            return None
        with open(folder / FILE, "rb") as file:
            found = json.loads(file.read(MAX_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"url": str, "host": str, "port": int, "pid": int}
    if not isinstance(found, dict) or not all(type(found.get(k)) is v for k, v in kinds.items()):
        return None
    host, port, token = found["host"], found["port"], found.get("token")
    if token is not None and not (isinstance(token, str) and re.fullmatch(r"[\w-]+", token, re.A)):
        return None
    good = re.fullmatch(r"[\w.:-]{1,253}", host, re.A) and 0 < port < 65536 and found["pid"] > 0
    return found if good and found["url"] == url_of(host, port, token) else None


def running(folder: Path) -> dict[str, Any] | None:
    """What :func:`read` gives, if that view still answers."""
    found = read(folder)
    if found is None:
        return None
    host: str = found["host"]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with contextlib.suppress(PermissionError):  # another user's process: it is there
            os.kill(found["pid"], 0)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as own:  # only an address of this machine can be bound
            own.bind((host, 0))
        socket.create_connection((host, found["port"]), timeout=2).close()
    except (OSError, OverflowError, UnicodeError):
        return None
    return found
