"""``lods compare``: the command line of evaluate.py, from any folder."""

from pathlib import Path

from lods import host
from lods.settings import nearest


def main(argv: list[str], command: str) -> int:
    """The options are evaluate.py's. A grid may be named, ``lods compare quick``, and the report is
    written by ``lods compare report``."""
    if argv[:1] == ["report"]:
        return host.module("evaluation.report").main(argv[1:], f"{command} report")
    shipped = host.home() / "evaluation" / "grids"
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    words = []
    for word in argv:
        if word in names and not Path(word).is_file():
            word = str(shipped / f"{word}.yaml")
        words.append(word)
    first = words[0] if words else "--help"
    if not first.startswith("-") and not Path(first).is_file():
        known = nearest(first, names) or f": the shipped ones are {', '.join(names)}"
        raise ValueError(f"there is no grid {first!r}{known}")
    return host.module("evaluation.command").main(words, prog=command)
