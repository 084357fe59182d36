"""Opens a page of this folder in Chromium, without a window, and collects what it sends back."""

import functools
import json
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent
CHROMIUM = next((p for n in ("chromium", "chromium-browser") if (p := shutil.which(n))), None)
MODULES = HERE / "node_modules"
FLAGS = (
    "--headless --no-sandbox --disable-gpu-sandbox --use-gl=angle --use-angle=swiftshader "
    "--enable-unsafe-swiftshader --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run --disable-dev-shm-usage --window-size=300,300"
)


def missing() -> str:
    """What keeps these tests from running; empty if nothing does."""
    if CHROMIUM is None:
        return "Chromium is not installed (Debian: apt-get install chromium)"
    if not (MODULES / "three").is_dir():
        return "three.js is not installed: npm install --prefix tests/browser"
    return ""


def show(page: str, model: bytes, timeout: float = 180.0, **job) -> dict[str, bytes]:
    """What ``page`` sends: ``{name: content}``. It finds ``model`` at /model.glb and ``job`` at
    /job.json. Raises RuntimeError where the page says that something failed, or says nothing."""
    results, finished = {}, threading.Event()
    given = {"/model.glb": model, "/job.json": json.dumps(job).encode()}

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path not in given:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", str(len(given[self.path])))
            self.end_headers()
            self.wfile.write(given[self.path])

        def do_POST(self):
            name = self.path.rpartition("/")[2]
            results[name] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            if name in ("done", "error"):
                finished.set()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(HERE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = tempfile.mkdtemp()
    url = f"http://127.0.0.1:{server.server_port}/{page}"
    # a page is left open as long as a debugger could come: until it is ended here
    browser = subprocess.Popen(
        [CHROMIUM, *FLAGS.split(), "--remote-debugging-port=0", f"--user-data-dir={profile}", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        said = finished.wait(timeout)
    finally:
        browser.terminate()
        _, log = browser.communicate()
        server.shutdown()
        server.server_close()
        shutil.rmtree(profile, ignore_errors=True)
    if "error" in results or not said:
        reason = results.get("error") or log[-800:]
        raise RuntimeError(f"{page}: {reason.decode(errors='replace')}")
    return results
