"""``python -m lods.studio.finish`` in the folder of a run that was stopped: its pictures, video and
files, as it is."""

import json
import sys
from pathlib import Path

from lods.commands.job import Request, finish
from lods.commands.make import REQUEST


def main() -> int:
    folder = Path.cwd()
    try:
        return finish(Request.of(json.loads((folder / REQUEST).read_bytes())), folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
