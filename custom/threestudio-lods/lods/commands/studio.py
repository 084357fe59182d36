"""``lods studio``: the page on which objects are made without a terminal."""

import argparse
import errno
import os
import secrets
from pathlib import Path

from lods.commands.parser import Parser, count

ABOUT = """\
Open a page in the browser that makes objects: a prompt, a queue of runs, a gallery of results.

    lods studio

What is started there goes on when the studio ends, and is found again by the next one.
"""
PORT = 7860
LOCK, TOKEN = ".studio.lock", ".studio.token"
INSTALL = "pip install aiohttp"


def parse_args(argv: list[str], command: str) -> argparse.Namespace:
    parser = Parser(command, ABOUT)
    add = parser.add_argument
    add("--port", type=int, default=PORT, help=f"port of the page ({PORT}; 0 takes a free one)")
    add(
        "--runs",
        type=Path,
        default=Path("outputs", "studio"),
        metavar="DIR",
        help="folder of the runs (outputs/studio); one of lods make or train is shown too",
    )
    add("--at-once", type=count, default=1, metavar="N", help="runs under way at a time (1)")
    add(
        "--host",
        help="address to listen at, such as 0.0.0.0 for all of this machine's; whoever knows the "
        "token in the printed URL can then use the studio (without this option: only this machine "
        "can, without a token)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port} is not a number from 0 to 65535")
    if args.host is not None and (not args.host.strip() or len(args.host) > 253):
        parser.error("--host is the name or address of a network interface of this machine")
    return args


def main(argv: list[str], command: str) -> int:
    """Serve until it is stopped. Raises ``ValueError`` for a folder or an address that cannot be
    used."""
    args = parse_args(argv, command)
    try:
        from lods.studio.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "aiohttp":
            raise
        raise ValueError(f"lods studio needs aiohttp: {INSTALL}") from None
    from lods import host
    from lods.studio.queue import Queue
    from lods.studio.shelf import Shelf

    try:
        shelf = Shelf(args.runs)
        lock = host.module("evaluation.batch").Lock.take(shelf.root / LOCK)
        token = None if args.host is None else _token(shelf.root)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--runs {args.runs} cannot be used as a folder: {reason}") from None
    if lock is None:
        raise ValueError(
            f"--runs {args.runs}: another studio looks after this folder{_where(shelf.root)}"
        )
    address = args.host or "127.0.0.1"

    def tell(port: int) -> None:
        url = f"http://{_shown(address)}:{port}/" + (f"?token={token}" if token else "")
        lock.write(url.partition("?")[0])
        print(
            f"lods studio: {url}\nruns are in {shelf.root}; Ctrl-C ends the page, not the runs",
            flush=True,
        )

    try:
        serve(Queue(shelf, args.at_once), address, args.port, token, tell)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {args.port} is taken: choose another, or 0") from None
        if error.errno == errno.EACCES:
            raise ValueError(f"--port {args.port} is not allowed: take one above 1023") from None
        raise ValueError(f"--host {address}: {error.strerror or error}") from None
    finally:
        lock.release()
    print("the page is closed; runs that are under way go on")
    return 0


def _where(root: Path) -> str:
    """The address of the studio that has the lock."""
    try:
        text = (root / LOCK).read_text(encoding="utf-8")[:200]
    except (OSError, UnicodeDecodeError):
        return ""
    return f", at {text}" if text.startswith("http://") and text.isprintable() else ""


def _token(root: Path) -> str:
    """One that stays the same, so that bookmarks and cookies hold. Only its owner can read it."""
    path = root / TOKEN
    if not path.is_symlink() and path.is_file() and path.stat().st_uid == os.getuid():
        found = path.read_bytes()[:100].decode("ascii", errors="replace").strip()
        if len(found) == 43:
            path.chmod(0o600)
            return found
    token = secrets.token_urlsafe(32)
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(token)
    return token


def _shown(address: str) -> str:
    """An address as it is opened: that of all interfaces is none."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"[{address}]" if ":" in address else address
