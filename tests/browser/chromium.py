"""Chromium without a window: driven by Playwright, or opened with a page of this folder that sends
back what it finds.

``BROWSER_PICTURES=<folder>`` keeps the screenshots of the tests, to be looked at.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
CHROMIUM = next((p for n in ("chromium", "chromium-browser") if (p := shutil.which(n))), None)
MODULES = HERE / "node_modules"
FLAGS = (
    "--headless --no-sandbox --disable-gpu-sandbox --use-gl=angle --use-angle=swiftshader "
    "--enable-unsafe-swiftshader --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run --disable-dev-shm-usage --window-size=300,300"
)


@contextlib.contextmanager
def driven(*more: str):
    """A browser of Playwright that draws WebGL in software."""
    from playwright.sync_api import sync_playwright

    flags = [flag for flag in FLAGS.split() if flag != "--headless"]  # Playwright sees to it
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[*flags, *more])
        yield browser
        browser.close()


def seen(png: bytes, name: str = "") -> np.ndarray:
    """A screenshot as colours (H, W, 3), 0..255; with a name it is kept where pictures are."""
    if name:
        keep(name, png)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float64)


def keep(name: str, png: bytes) -> None:
    """Write a screenshot for whoever wants to look at it."""
    if folder := os.environ.get("BROWSER_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(png)


def missing() -> str:
    """What keeps these tests from running; empty if nothing does."""
    if CHROMIUM is None:
        return "Chromium is not installed (Debian: apt-get install chromium)"
    if not (MODULES / "three").is_dir():
        return "three.js is not installed: npm install --prefix tests/browser"
    return ""


def show(page: str, model: bytes, timeout: float = 600.0, **job) -> dict[str, bytes]:
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
