"""The live view in a real browser: Chromium, driven by Playwright."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.browser import chromium, patience
from tests.runs import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("viser", reason="viser is not installed (the extra 'viewer')")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium.CHROMIUM is None, reason="Chromium is not installed"),
]
CONFIGS = {
    "gaussians": ["lods-gs-embedding", "pocket-shapes"],
    "nerf": ["lods-ngp-embedding", "pocket-shapes-ngp"],
}
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZE = {"width": 880, "height": 500}
OBJECT = {"x": 40, "y": 140, "width": 480, "height": 340}  # of the page, beside the controls
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # the other core is the browser's
PROMPT, OTHER = "a hamburger", "a blue car"


@pytest.fixture(scope="module")
def open_browser():
    """``open_browser()``: one more Chromium, with what it draws in a process of its own."""
    with playwright.sync_playwright() as started, contextlib.ExitStack() as stack:

        def open_one():
            opened = started.chromium.launch(
                executable_path=chromium.CHROMIUM, args=[*FLAGS, "--disable-dev-shm-usage"]
            )
            stack.callback(opened.close)
            return opened

        yield open_one


@pytest.fixture(scope="module")
def browser(open_browser):
    return open_browser()


class Run:
    """``launch.py --viewer`` in a process of its own."""

    def __init__(self, folder, kind, *overrides, options=()):
        self.log = folder / "log.txt"
        self.folder = folder / "outputs" / CONFIGS[kind][0] / "t"
        words = ["--config", *CONFIGS[kind], "--train", "--viewer", "0", *options]
        settings = [
            f"system.prompt_processor.prompt={PROMPT}",
            "use_timestamp=false",
            "tag=t",
            "data.n_test_views=2",
            "data.batch_size=2",
            *overrides,
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "launch.py"), *words, *settings],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **ONE_THREAD},
                preexec_fn=lambda: os.nice(10),  # the browser draws in software, beside it
            )
        self.url = self.until(lambda: re.search(r"^.*view: (http\S+)", self.text(), re.M))[1]

    def text(self):
        return self.log.read_text(errors="replace")

    def until(self, condition, every=0.1, worth=400.0, sign=None):
        """Wait for `condition` while the run goes on; what it gives then. The run has `worth`
        seconds of the processor for it, anew whenever `sign` changes: on a busy machine they take
        longer. What a run that waits does not do is given up after a long silence."""
        begun = [sign and sign(), self.worked()]

        def found_or_over():
            if found := condition():
                return found
            assert self.process.poll() is None, f"the run has ended:\n{self.text()[-3000:]}"
            if sign and (now := sign()) != begun[0]:
                begun[:] = now, self.worked()
            assert self.worked() - begun[1] < worth, f"not there yet:\n{self.text()[-3000:]}"
            return None

        signs = lambda: (len(self.text()), begun[0], int(self.worked() / 5))  # noqa: E731
        return patience.until(found_or_over, signs, every=every)

    def worked(self):
        return patience.processor_seconds(self.process.pid)

    def ended(self):
        """The status that it ends with, by itself."""
        signs = lambda: (len(self.text()), round(self.worked()))  # noqa: E731
        patience.until(lambda: self.process.poll() is not None, signs)
        return self.process.returncode

    def stop(self, signum=signal.SIGINT):
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.ended()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture
def started(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options):
            run = Run(tmp_path, *arguments, **options)
            stack.callback(run.stop)
            return run

        yield start


def open_page(browser, run, size=SIZE):
    page = browser.new_page(viewport=size)
    page.set_default_timeout(patience.PAGE)
    page.on("console", lambda message: print("console:", message.text))  # pytest shows it
    page.on("pageerror", lambda error: print("page:", error))
    page.goto(run.url)
    page.get_by_role("button", name="Snapshot").wait_for()
    return page


def step(page):
    """The step that the page shows."""
    found = re.search(r"step ([\d,]+)", page.inner_text("body"))
    return int(found[1].replace(",", "")) if found else -1


def wait_for_step(page, run, wanted):
    run.until(lambda: step(page) >= wanted, sign=lambda: step(page))


def picture(page, name=None):
    """The part of the page where the object is, (H, W, 3), 0..255."""
    if name:
        chromium.keep(name, page.screenshot())
    return chromium.seen(page.screenshot(clip=OBJECT))


def change(a, b):
    return float(np.abs(a - b).mean())


def redness(image):
    return float((image[..., 0] - image[..., 2]).mean())


def settled(page, run, name=None):
    """The picture of a paused run, once nothing has changed in it for seconds."""
    shown = [picture(page)]

    def rests():
        time.sleep(1.5)
        shown.append(picture(page))
        last = shown[-4:]
        return len(last) == 4 and max(change(a, b) for a, b in itertools.pairwise(last)) < 0.01

    run.until(rests)
    return picture(page, name)


def drag(page, across=200, down=40):
    page.mouse.move(300, 320)
    page.mouse.down()
    for i in range(1, 11):
        page.mouse.move(300 + across * i / 10, 320 + down * i / 10)
        time.sleep(0.05)
    page.mouse.up()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_object_grows_before_the_visitors_eyes(browser, started, kind):
    run = started(kind, "trainer.max_steps=3000")
    page, seen = open_page(browser, run), []
    for wanted in (1, 100, 300):
        wait_for_step(page, run, wanted)
        if seen:
            run.until(lambda: change(picture(page), seen[-1]) > 0.5, every=0.5)
        else:  # something is there
            run.until(lambda: picture(page).std() > 1, every=0.5)
        seen.append(picture(page, f"{kind}-{wanted}"))
    page.get_by_role("button", name="Pause").click()  # what changes now is not the object
    page.get_by_role("button", name="Resume").wait_for()
    before = settled(page, run)
    drag(page)
    run.until(lambda: change(picture(page), before) > 2, every=0.5)
    settled(page, run, f"{kind}-turned")
    page.close()


def test_a_paused_run_is_turned_and_goes_on_when_it_is_resumed(browser, open_browser, started):
    run = started("gaussians", "trainer.max_steps=3000")
    one = open_page(browser, run)
    wait_for_step(one, run, 3)
    one.get_by_role("button", name="Pause").click()
    one.get_by_role("button", name="Resume").wait_for()
    two = open_page(open_browser(), run)
    two.get_by_role("button", name="Resume").wait_for()  # who comes later sees it
    before, other, paused = settled(one, run), settled(two, run), step(one)
    drag(one)
    run.until(lambda: change(picture(one), before) > 2, every=0.5)
    turned, still = settled(one, run, "paused-turned"), settled(two, run, "paused-other")
    assert step(one) == paused and change(still, other) < 0.5  # each its own camera
    assert change(turned, before) > 2
    two.get_by_role("button", name="Resume").click()
    one.get_by_role("button", name="Pause").wait_for()  # all share the controls
    two.close()  # vanishes
    wait_for_step(one, run, paused + 3)
    one.get_by_role("button", name="Pause").click()
    one.get_by_role("button", name="Resume").wait_for()
    assert run.stop(signal.SIGTERM) == 143  # a pause holds no signal back
    assert (run.folder / "ckpts" / "last.ckpt").exists()
    assert not (run.folder / "viewer.json").exists()


def test_another_prompt_in_the_middle_of_a_run_makes_another_object(browser, started):
    run = started("gaussians", "trainer.max_steps=3000")
    page = open_page(browser, run)
    wait_for_step(page, run, 40)
    page.get_by_role("tab", name="Steer").click()
    page.get_by_role("textbox").first.fill(OTHER)
    page.get_by_role("button", name="Use this prompt").click()
    log = run.folder / "interventions.jsonl"
    run.until(lambda: log.exists() and log.read_text().endswith("\n"))
    noted = json.loads(log.read_text())
    assert (noted["what"], noted["old"], noted["new"]) == ("prompt", PROMPT, OTHER)
    before = picture(page, "prompt-before")
    wait_for_step(page, run, noted["step"] + 100)
    run.until(lambda: redness(picture(page)) < redness(before) - 1, every=0.5)  # brown, then blue
    picture(page, "prompt-after")
    assert OTHER in page.inner_text("body")
    page.close()


def test_what_the_model_sees_and_the_curves_are_shown(browser, started):
    run = started("gaussians", "trainer.max_steps=3000")
    page = open_page(browser, run)
    wait_for_step(page, run, 12)
    page.get_by_role("tab", name="Model").click()
    page.get_by_text("Show what the model sees").click()
    for name in ("noisy", "guess under the prompt", "guess of the learned part", "difference"):
        page.get_by_text(name, exact=True).wait_for()
    page.get_by_text("difference", exact=True).scroll_into_view_if_needed()
    patience.frames(page)
    picture(page, "model")
    page.get_by_role("tab", name="Curves").click()
    page.locator("canvas").nth(1).wait_for()
    patience.frames(page)
    picture(page, "curves")
    page.get_by_role("tab", name="View").click()
    page.get_by_text("Training cameras").click()
    wait_for_step(page, run, step(page) + 5)
    page.get_by_role("button", name="Pause").click()  # what changes now is not the object
    page.get_by_role("button", name="Resume").wait_for()
    page.mouse.move(300, 320)
    for _ in range(3):  # they stand around the object, as far from it as the visitor, or behind him
        page.mouse.wheel(0, 800)
        patience.frames(page)
    shown = settled(page, run, "cameras")
    page.get_by_text("Training cameras").click()
    run.until(lambda: change(picture(page), shown) > 0.2, every=0.5)
    before = settled(page, run)
    page.get_by_text("Drawn by the browser").click()
    run.until(lambda: change(picture(page), before) > 0.1, every=0.5)
    splats = settled(page, run, "splats")
    print(f"pictures and splats: {change(splats, before):.2f}")
    assert splats.std() > 1 and change(splats, before) < 40  # the same object, drawn there
    page.close()


def test_stop_and_save_ends_the_run_with_a_checkpoint(browser, started):
    run = started("gaussians", "trainer.max_steps=3000")
    page = open_page(browser, run)
    wait_for_step(page, run, 2)
    page.get_by_role("button", name="Stop and save").click()
    page.get_by_role("button", name="Go on training").wait_for()
    picture(page, "stop")
    page.get_by_role("button", name="Stop and save").last.click()
    assert run.ended() == 130 and "resume with:" in run.text()
    assert (run.folder / "ckpts" / "last.ckpt").exists()
    page.close()


def test_a_phone_shows_the_whole_object_above_the_controls(browser, started):
    run = started("gaussians", "trainer.max_steps=3000")
    page = open_page(browser, run, {"width": 390, "height": 844})
    sheet = page.locator('[style*="max-height: 60%"]').bounding_box()
    assert sheet["y"] > 0.6 * 844 and sheet["width"] == 390
    above = {"x": 0, "y": 140, "width": 390, "height": int(sheet["y"]) - 150}

    def fits():
        image = chromium.seen(page.screenshot(clip=above))
        sides = np.abs(np.diff(np.concatenate([image[:, :12], image[:, -12:]], axis=1), axis=0))
        return image.std() > 5 and sides.mean() < 0.5

    run.until(fits, every=0.5)
    chromium.keep("phone", page.screenshot())
    page.close()


def test_a_page_of_another_origin_cannot_connect(browser, started):
    run = started("gaussians", "trainer.max_steps=3000")
    page = browser.new_page()
    page.goto("about:blank")
    result = page.evaluate(
        """url => new Promise(done => {
            const socket = new WebSocket(url.replace("http", "ws"), ["viser-v1.1.1"]);
            socket.onopen = () => done("open");
            socket.onerror = () => done("refused");
        })""",
        run.url,
    )
    assert result == "refused"
    page.close()


def test_the_token_of_a_public_address_goes_with_the_page(browser, started):
    run = started("gaussians", "trainer.max_steps=3000", options=["--viewer-host", "0.0.0.0"])
    url = re.sub(r"//[^:/]+", "//127.0.0.1", run.url)
    page = browser.new_page()
    page.set_default_timeout(patience.PAGE)
    assert page.goto(url.partition("?")[0]).status == 403
    assert page.goto(url).status == 200
    page.get_by_role("button", name="Snapshot").wait_for()
    page.close()


def test_code_in_a_prompt_is_shown_and_not_run(browser):
    """viser's client makes elements of the HTML in its markdown."""
    import viser

    from threestudio.run.viewer.panel import as_text

    text = "a car <iframe srcdoc=\"<script>parent.document.title='run'</script>\"></iframe> & *b*"
    server = viser.ViserServer("127.0.0.1", 0, verbose=False)
    try:
        server.gui.add_markdown(f"- {as_text(text)}")
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.get_port()}")
        page.get_by_text(text).wait_for(timeout=patience.PAGE)
        assert page.title() != "run" and page.locator("iframe").count() == 0
        page.close()
    finally:
        server.stop()
