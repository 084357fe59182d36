"""The studio in Chromium, driven by Playwright: what a user sees and can do."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from tests.browser import chromium, patience
from tests.glb_files import read_glb
from tests.studio.toy import PROGRAM

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("aiohttp")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium.CHROMIUM is None, reason="Chromium is not installed"),
]
# the page around WebGL is drawn without it: Debian's wrapper asks for the GPU there
FLAGS = ["--disable-gpu-rasterization", "--disable-gpu-compositing"]
# a run of seconds in the place of the presets
PRESETS = """\
good:
  title: Tiny
  says: a run of seconds
  otherwise:
    - trainer.max_steps=3
    - trainer.val_check_interval=1
    - data.n_test_views=6
    - data.eval_width=64
    - data.eval_height=64
    - data.batch_size=1
    - system.geometry.ball.n_points=300
    - system.exporter.mesh_resolution=32
"""
# lods studio, with other presets and, if it is told one, another program for the runs
SERVER = """
    import functools, json, pathlib, sys
    import lods.studio.choices as choices
    import lods.studio.queue as queue
    from lods.cli import main
    choices.PRESETS = pathlib.Path(sys.argv[1])
    if program := json.loads(sys.argv[3]):
        queue.Queue = functools.partial(queue.Queue, program=tuple(program))
    sys.exit(main(["studio", "--port", "0", "--runs", sys.argv[2]]))
"""


@contextlib.contextmanager
def studio(folder, program=()):
    """The address of ``lods studio`` for the runs in ``folder / "runs"``."""
    presets = folder / "presets.yaml"
    presets.write_text(PRESETS)
    words = [sys.executable, "-u", "-c", textwrap.dedent(SERVER), presets, folder / "runs"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path)}
    with subprocess.Popen(
        [*map(str, words), json.dumps(program)], stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser():
    with chromium.driven(*FLAGS) as opened:
        yield opened


@pytest.fixture
def expected():
    """What an error in the browser's console may contain; a test adds what it provokes."""
    return ["ERR_CONNECTION_REFUSED"]  # the server has ended before the page


@pytest.fixture
def page(browser, request, expected):
    """A page that nothing goes wrong in."""
    said = []
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(patience.PAGE)
    page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    keep(page, request.node.name)
    page.close()
    assert [text for text in said if not any(part in text for part in expected)] == []


def keep(page, name):
    chromium.keep(f"studio-{name}", page.screenshot())


def picture(locator):
    """What is drawn there, as an array."""
    return chromium.seen(locator.screenshot())


def rests(page, count=1):
    """Wait until so many objects are drawn in full."""
    patience.frames(page)
    page.wait_for_function(
        "n => document.querySelectorAll('.stage canvas[data-state=resting]').length === n",
        arg=count,
    )


def downloaded(page, selector):
    with page.expect_download() as waiting:
        page.click(selector)
    return Path(waiting.value.path()), waiting.value.suggested_filename


def test_from_an_empty_page_to_a_downloaded_glb(page, tmp_path):
    """With a real run, three steps long."""
    with studio(tmp_path) as address:
        page.goto(address)
        page.wait_for_selector("text=Nothing has been made yet")
        page.click(".chip >> text=hamburger")
        page.click(".chip >> text=red")
        assert page.input_value("#prompt") == "a red hamburger"
        page.click("#make")
        page.wait_for_selector(".work >> text=a red hamburger")
        card = page.locator(".card")
        patience.until(card.count, lambda: patience.written(tmp_path / "runs"))
        keep(page, "card")
        page.click(".card a")
        page.wait_for_selector(".stage canvas")
        page.wait_for_selector(".note:has-text('Drag')")
        keep(page, "run")
        path, name = downloaded(page, "a.download:has(b:text-is('glb'))")
        assert name == "a-red-hamburger.glb"
        _, attributes, faces = read_glb(path)
        assert len(faces) and len(attributes["POSITION"]) == len(attributes["TEXCOORD_0"])
        page.click("button.download:has-text('splat')")
        path, name = downloaded(page, "a.download:has(b:text-is('splat'))")
        assert name.endswith(".splat") and path.stat().st_size == 32 * 300


def made(folder, name, seconds=5, **changes):
    """A finished run as folders of ``lods make`` are: three Gaussians, red to the right of the
    camera in front, green above, blue in the middle, and the mesh of a cube."""
    import trimesh
    from lods.gaussians.mesh_file import write_mesh
    from lods.gaussians.ply import write_ply

    from tests.studio.toy import QUICK

    run = folder / "runs" / name
    run.mkdir(parents=True)
    request = QUICK.plain() | changes
    (run / "request.json").write_text(json.dumps(request))
    key = type(QUICK).of(request).key
    job = {"key": key, "state": "done", "error": "", "seconds": seconds}
    (run / "job.json").write_text(json.dumps(job))
    full = 0.5 / 0.28209479177387814
    write_ply(
        run / "gaussians.ply",
        means=torch.tensor([[0.0, 0.6, 0.0], [0.0, 0.0, 0.6], [0.0, 0.0, 0.0]]),
        scales=torch.full((3, 3), 0.12).log(),
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(3, 1),
        opacities=torch.full((3,), 8.0),
        sh0=(full * (2 * torch.eye(3) - 1))[:, None],
    )
    cube = trimesh.creation.box((1, 1, 1))
    points = torch.from_numpy(cube.vertices.copy()).float()
    write_mesh(run / "gaussians.glb", points, torch.from_numpy(cube.faces.copy()), points + 0.5)


def middles(shown):
    """Where red, green and blue are: (x, y) of each, as parts of the picture."""
    found = []
    for k in range(3):
        others = np.delete(shown, k, axis=2).max(axis=2)
        rows, columns = np.nonzero(shown[..., k] - others > 100)
        assert len(rows) > 30
        found.append((columns.mean() / shown.shape[1], rows.mean() / shown.shape[0]))
    return found


def test_gaussians_are_drawn_where_and_in_the_colours_that_they_are(page, tmp_path):
    made(tmp_path, "one")
    with studio(tmp_path) as address:
        page.goto(f"{address}#/run/one")
        page.wait_for_selector(".note:has-text('Drag')")
        rests(page)
        red, green, blue = middles(picture(page.locator(".stage canvas")))
        # the camera is a little to the right of the front, and above
        assert red[0] > blue[0] + 0.15 and green[1] < blue[1] - 0.15
        assert abs(green[0] - blue[0]) < 0.03
        box = page.locator(".stage canvas").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + np.pi / 0.008, y, steps=5)  # half a turn
        page.mouse.up()
        rests(page)
        red, green, blue = middles(picture(page.locator(".stage canvas")))
        assert red[0] < blue[0] - 0.15 and green[1] < blue[1] - 0.15


def test_two_runs_are_seen_by_one_camera(page, tmp_path):
    made(tmp_path, "one")
    made(tmp_path, "two", prompt="a red mug")
    with studio(tmp_path) as address:
        page.goto(address)
        page.wait_for_selector(".card >> nth=1")
        page.check("#choose")
        for k in range(2):
            page.check(f".card >> nth={k} >> input")
        page.click("#compare")
        page.wait_for_selector(".two canvas >> nth=1")
        rests(page, 2)
        canvases = [page.locator(".two canvas").nth(k) for k in range(2)]
        before = [picture(canvas) for canvas in canvases]
        box = canvases[0].bounding_box()
        page.mouse.move(box["x"] + 100, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 180, box["y"] + 140, steps=5)
        page.mouse.up()
        rests(page, 2)
        after = [middles(picture(canvas)) for canvas in canvases]
        assert np.abs(np.array(after[0]) - np.array(middles(before[0]))).max() > 0.05
        np.testing.assert_allclose(after[0], after[1], atol=0.01)


def test_steps_are_told_and_how_long_they_take_as_soon_as_a_run_has_shown_it(page, tmp_path):
    with studio(tmp_path) as address:
        page.goto(address)
        page.wait_for_selector(".takes >> text='3 steps'")
        made(tmp_path, "one", seconds=200, model="pocket", quality="good")
        run = tmp_path / "runs" / "one"
        wish = {"created": 1.0, "turn": 1.0, "attempt": 1, "wish": "run", "quality": "good"}
        (run / "studio.json").write_text(json.dumps(wish | {"error": ""}))
        page.wait_for_selector(".takes >> text='3 steps, about 3 min'")
        page.click("#representations label:has-text('Radiance field')")  # nothing is known of it
        page.wait_for_selector(".takes >> text='3 steps'")


def test_a_colour_for_an_object_of_its_own_colours_is_commented_on(page, tmp_path):
    with studio(tmp_path) as address:
        page.goto(address)
        page.wait_for_selector(".chip >> text=cactus")
        for prompt, said in (
            ("a red cactus", "“cactus” in its own colours only: “red” may change little"),
            ("a cactus", ""),
            ("a red backpack", ""),
        ):
            page.fill("#prompt", prompt)
            text = page.text_content("#advice")
            assert said in text if said else text == ""


def test_texts_of_users_are_texts(page, tmp_path):
    evil = '<img src=x onerror="document.title=1">car</script><script>document.title=2</script>'
    made(tmp_path, "one", prompt=evil)
    with studio(tmp_path) as address:
        page.goto(address)
        page.wait_for_selector(".card")
        assert page.text_content(".card .prompt") == evil
        page.click(".card .prompt")
        page.wait_for_selector(".facts dl")
        assert page.text_content("#run-view h1") == evil
        assert page.title() == "LODS studio"


def test_a_run_is_cancelled_and_gone_on_with(page, tmp_path):
    with studio(tmp_path, PROGRAM) as address:
        page.goto(address)
        page.fill("#prompt", "a red car")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".work >> text=a red car")
        losses = "runs/a-red-car/run/*/csv_logs/*/metrics.csv"
        patience.until(lambda: [*tmp_path.glob(losses)])
        page.wait_for_selector(".work >> text=training 20 of 40")  # there until it is told to end
        keep(page, "work")
        page.click(".work >> text=cancel")
        page.wait_for_selector(".other >> text=stopped")
        page.click(".other >> text=go on")
        page.wait_for_selector(".work >> text=training")
        [run] = (tmp_path / "runs").glob("a-red-car")
        (run / "end").write_text("0")
        page.wait_for_selector(".card >> text=a red car")
        assert json.loads((run / "job.json").read_text())["state"] == "done"


def test_who_presses_enter_before_the_page_knows_what_there_is_is_heard(page, tmp_path):
    held = []
    page.route("**/api/choices", lambda route: held.append(route))
    with studio(tmp_path, PROGRAM) as address:
        page.goto(address)
        page.fill("#prompt", "a red car")
        page.press("#prompt", "Enter")
        patience.until(lambda: page.evaluate("1") and held)
        held[0].continue_()
        page.wait_for_selector(".work >> text=a red car")
        [run] = (tmp_path / "runs").glob("a-red-car")
        (run / "end").write_text("0")
        page.wait_for_selector(".card >> text=a red car")


def test_a_mesh_is_chosen_sent_and_painted(page, tmp_path, expected):
    expected.append("status of 400")  # of the file that is no mesh
    trimesh.creation.box((1.0, 1, 1)).export(tmp_path / "my box.stl")
    (tmp_path / "none.stl").write_text("no mesh")
    with studio(tmp_path, PROGRAM) as address:
        page.goto(address)
        page.fill("#prompt", "a red car")
        assert not page.is_visible("#mesh")
        page.click("#representations >> text=Your mesh")
        page.click("#make")
        page.wait_for_selector("#error:has-text('Choose the file of the mesh')")
        page.set_input_files("#mesh", tmp_path / "none.stl")
        page.wait_for_selector("#mesh-says.warn:has-text('no mesh to be painted')")
        keep(page, "no-mesh")
        page.set_input_files("#mesh", tmp_path / "my box.stl")
        page.wait_for_selector("#mesh-says:has-text('my-box.stl')")
        keep(page, "mesh")
        page.click("#make")
        page.wait_for_selector(".work >> text=a red car")
        [run] = (tmp_path / "runs").glob("a-red-car")
        (run / "end").write_text("0")
        page.wait_for_selector(".card >> text=a red car")
        request = json.loads((run / "request.json").read_text())
        assert Path(request["source"]).read_bytes() == (tmp_path / "my box.stl").read_bytes()
        page.click(".card a")
        page.wait_for_selector(".facts dl:has-text('my-box.stl')")
        keep(page, "mesh-run")
        page.click("text=other choices")
        assert page.text_content("#mesh-says") == "my-box.stl" and page.is_visible("#mesh")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width, scheme):
    made(tmp_path, "one", prompt="a " + "very" * 40 + " long car")
    page = browser.new_page(viewport={"width": width, "height": 840}, color_scheme=scheme)
    with studio(tmp_path) as address:
        for name, place in (("gallery", ""), ("run", "#/run/one"), ("two", "#/compare/one/one")):
            page.goto(f"{address}{place}")
            page.wait_for_selector(".card, .stage", state="attached")
            patience.frames(page)
            keep(page, f"{name}-{scheme}-{width}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, name
    page.close()
