"""The process of a run with a toy in the place of the training, and servers of the studio for it.

    python -m tests.studio.toy work ATTEMPT       in the folder of a run
    python -m tests.studio.toy serve FOLDER       prints its port

The toy writes a line of losses, and waits for a file called ``end`` in its folder, which says with
which status it ends; with the seed 1 it ends at once. SIGTERM ends it as it ends a training.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from lods.commands.job import Request
from lods.studio import work
from lods.studio.queue import Queue
from lods.studio.shelf import Shelf

PROGRAM = (sys.executable, "-P", "-m", "tests.studio.toy", "work")
REQUEST = Request("a red car", "gaussians", "lods-sds", "pocket-shapes", True)
QUICK = Request("a blue car", "gaussians", "lods-sds", "pocket-shapes", True, seed=1)
FORM = {"prompt": "a red car", "on": "gaussians", "method": "lods-sds", "model": "pocket-shapes"}
HEAD = "epoch,step,train/loss"


def toy(request, folder, options=()):
    """In the place of :func:`lods.commands.job.make`."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    run = folder / "run" / request.key
    logs = run / "csv_logs" / "version_0"
    logs.mkdir(parents=True, exist_ok=True)
    (run / "configs").mkdir(exist_ok=True)
    text = "trainer: {max_steps: 40}\ndata: {n_test_views: 4}\n"
    (run / "configs" / "parsed.yaml").write_text(text)
    (logs / "metrics.csv").write_text(f"{HEAD}\n0,9,1.5\n0,19,1.25\n")
    (run / "ckpts").mkdir(exist_ok=True)
    (run / "ckpts" / "last.ckpt").write_text("20")
    print("the toy has begun", flush=True)
    end = folder / "end"
    while not asked and not end.exists() and request.seed != 1:
        time.sleep(0.01)
    if asked:
        return 143
    status = int(end.read_text() or 0) if end.exists() else 0
    if status == 0:
        (folder / "video.mp4").write_bytes(b"film")
        (folder / "gaussians.ply").write_bytes(b"ply")
    else:
        print("error: the toy broke")
    return status


def until(condition, seconds=20.0):
    """Wait for it; what it gives then."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
    return found


def queue_of(folder, **options):
    return Queue(Shelf(Path(folder)), program=PROGRAM, **options)


def state(queue, name):
    queue.tick()
    entry = queue.shelf.find(name)
    return entry and entry.state


def let_end(queue, name, status=0):
    partial = queue.shelf.root / name / "end.tmp"
    partial.write_text(str(status))
    partial.rename(queue.shelf.root / name / "end")


def stop_all(folder):
    """End the toys below a folder, whoever has started them."""
    for file in Path(folder).glob("*/process.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(file.read_text())
            from lods.studio.processes import ask

            ask(found["pid"], found["who"], signal.SIGKILL)


@contextlib.contextmanager
def server(folder, token=None, host="127.0.0.1"):
    """``(port, queue)`` of a server in a thread of this process."""
    import asyncio

    from aiohttp import web
    from lods.studio.guard import Guard
    from lods.studio.server import Studio

    queue, loop = queue_of(folder), asyncio.new_event_loop()
    runner = web.AppRunner(
        Studio(queue).app(Guard(host, token, 0)), shutdown_timeout=0.1, access_log=None
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    async def start():
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner.addresses[0][1]

    try:
        yield call(start()), queue
    finally:
        call(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        stop_all(folder)


def ask(port, method, path, body=None, headers=None):
    """``(status, headers, content)``; as a page of the server asks, unless ``headers`` say
    otherwise (None leaves one out)."""
    given = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}"}
    if body is not None:
        given["Content-Type"] = "application/json"
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        given["Content-Length"] = str(len(body))
    given |= headers or {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def raw(port, data):
    """The first bytes of what the server says to ``data``; b"" if it hangs up."""
    connection = socket.create_connection(("127.0.0.1", port), 5)
    with connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(200)
    return b""


def serve(folder):
    """Serve as ``lods studio`` does, with the toy; kill it to end it."""
    from lods.studio.server import serve as forever

    forever(queue_of(folder), "127.0.0.1", 0, None, lambda port: print(port, flush=True))


@contextlib.contextmanager
def server_process(folder):
    """``(port, process)`` of such a server in a process of its own."""
    words = [sys.executable, "-m", "tests.studio.toy", "serve", str(folder)]
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        try:
            yield int(process.stdout.readline()), process
        finally:
            process.kill()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        work.make = toy
        sys.exit(work.main(sys.argv[2:]))
