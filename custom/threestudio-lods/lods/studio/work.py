"""The process of a run: ``python -m lods.studio.work ATTEMPT`` in its folder.

It is told nothing but the number of the attempt, reads ``request.json``, and says by
``process.json`` who it is and by ``job.json`` what came of it, so that no server need be there when
it ends.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from lods import host
from lods.commands.job import Request, make, paused_in
from lods.commands.make import REQUEST, make_job
from lods.files import whole_file
from lods.studio.processes import identity
from lods.studio.records import PROCESS


def main(argv: list[str]) -> int:
    """Do what is left of the request in the current folder, unless another process is at it."""
    folder, attempt = Path.cwd(), int(argv[0])
    request = Request.of(json.loads((folder / REQUEST).read_bytes()))
    batch = host.module("evaluation.batch")
    job = make_job(request, folder)
    book = batch.Folders([job], retry=True)
    started = book.start(job)
    if started is None:
        return 0
    pid, begun = os.getpid(), time.time()
    about = {"attempt": attempt, "pid": pid, "who": identity(pid), "began": begun}
    with whole_file(folder / PROCESS) as partial:
        partial.write_text(json.dumps(about))
    status = 1
    try:
        status = make(request, folder, live_options())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    finally:
        if status < 128:  # what was stopped is neither done nor failed
            error = "" if status == 0 else f"the run ended with status {status}"
            seconds = time.time() - begun - paused_in(request, folder, begun)
            book.record(job, batch.Outcome(error=error, seconds=seconds))
        started[1].release()
    return status


def live_options() -> list[str]:
    """What gives a run a live view, on a port that is free, if viser is installed."""
    return ["--viewer", "0"] if importlib.util.find_spec("viser") else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
