"""``--viewer [PORT]`` and what goes with it. Imports nothing heavy."""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

from threestudio.utils.errors import UserError

AUTO = "auto"  # 8080, or the next port that is free
FIRST_PORT, TRIED_PORTS = 8080, 100
LOCAL = "127.0.0.1"
HELP = (
    "watch and steer the run in a browser, at http://127.0.0.1:PORT (8080 or the next free port; "
    "0: any)"
)
HOST_HELP = (
    "address of this machine that the view is offered at, such as 0.0.0.0 (127.0.0.1). Any other "
    "than 127.0.0.1 can be reached from the network, and needs the token in the printed URL"
)


@dataclass(frozen=True)
class ViewerOptions:
    """``port`` None: 8080, or the next that is free; 0: any. ``host``: the address to listen at."""

    port: int | None = None
    host: str = LOCAL
    open: bool = False  # the browser of this machine

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in (LOCAL, "localhost", "::1")


def with_port(argv: Sequence[str]) -> list[str]:
    """`argv`, in which a lone ``--viewer`` does not take the word after it for its port."""
    words: list[str] = []
    for i, word in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else ""
        lone = word == "--viewer" and not re.fullmatch(r"-?\d+", following)
        words.append(f"--viewer={AUTO}" if lone else word)
    return words


def add_arguments(parser) -> None:
    """Add the options to a parser of argparse."""
    parser.add_argument("--viewer", metavar="[PORT]", help=HELP)
    parser.add_argument("--viewer-host", metavar="ADDRESS", help=HOST_HELP)
    parser.add_argument(
        "--viewer-open", action="store_true", help="also open the view in this machine's browser"
    )


def read(args) -> ViewerOptions | None:
    """What the parsed arguments say, None without ``--viewer``. Raises :class:`UserError` for a
    port that is none, for a host without a viewer, and where viser is not installed."""
    if args.viewer is None:
        for option in ("host", "open"):
            if getattr(args, f"viewer_{option}"):
                raise UserError(f"--viewer-{option} needs --viewer beside it")
        return None
    port = None
    if args.viewer != AUTO:
        if not re.fullmatch(r"\d{1,5}", args.viewer) or int(args.viewer) > 65535:
            raise UserError(f"--viewer {args.viewer} is not a port: give a number from 0 to 65535")
        port = int(args.viewer)
    host = LOCAL if args.viewer_host is None else args.viewer_host.strip()
    if not host:
        raise UserError("--viewer-host is empty: give an address of this machine, such as 0.0.0.0")
    if importlib.util.find_spec("viser") is None:
        raise UserError(
            "--viewer needs the package viser: pip install viser==1.1.1, or leave --viewer out"
        )
    return ViewerOptions(port, host, args.viewer_open)


def words(args) -> list[str]:
    """The options as they were given, for another command line."""
    found = [] if args.viewer is None else [f"--viewer={args.viewer}"]
    found += [] if args.viewer_host is None else ["--viewer-host", args.viewer_host]
    return found + ["--viewer-open"] * args.viewer_open
