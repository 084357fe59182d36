"""``lods train``: the command line of launch.py, from any folder."""

from lods import host

_MODES = ("--train", "--validate", "--test", "--export", "-h", "--help")


def main(argv: list[str], command: str) -> int:
    """The options are launch.py's; without a mode it trains."""
    if not any(word in _MODES for word in argv):
        argv = [*argv, "--train"]
    return host.module("threestudio.run.cli").main(argv, prog=command, home=host.home())
