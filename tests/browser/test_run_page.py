"""report.html in a real browser, from a file and without a network."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.browser import chromium, patience
from tests.host.run_pages import EVIL, write_mesh
from tests.run_folders import gaussians, run_folder, write_gaussians
from threestudio.run.page import write_page

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium.CHROMIUM is None, reason="Chromium is not installed"),
]

RESTS = "n => document.querySelectorAll('.stage canvas')[n].dataset.state === 'resting'"


@pytest.fixture(scope="module")
def browser():
    with chromium.driven() as opened:
        yield opened


@pytest.fixture
def show(browser):
    """``show(path)``: the page, opened from its file with the network off; whatever it says in the
    console, or asks for, fails the test."""
    said, contexts = [], []

    def show(path, drawn=True, script="", **options):
        options = {"viewport": {"width": 500, "height": 600}, "reduced_motion": "reduce", **options}
        contexts.append(browser.new_context(offline=True, **options))
        contexts[-1].add_init_script(script)
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        uri = Path(path).as_uri()
        page.on(
            "request", lambda r: said.append(r.url) if not r.url.startswith((uri, "data:")) else 0
        )
        page.goto(uri)
        if drawn:
            page.wait_for_selector(".stage.drawn", timeout=patience.PAGE)
        return page

    yield show
    for context in contexts:
        context.close()
    assert said == []


def pixels(page, name, number=0, rest=True):
    """The canvas as it is seen, 0..255."""
    patience.frames(page)
    if rest:  # until nothing moves, and it is drawn in full
        page.wait_for_function(RESTS, arg=number, timeout=patience.PAGE)
    data = page.locator(".stage").nth(number).screenshot()
    return chromium.seen(data, name)


def drag(page, dx, dy, number=0):
    """In several pulls: the mouse stays inside of the window."""
    box = page.locator(".stage").nth(number).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    pulls = math.ceil(max(abs(dx), abs(dy)) / 150)
    for _ in range(pulls):
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + dx / pulls, y + dy / pulls)
        page.mouse.up()


def two_balls(run):
    """A red Gaussian at the front, on +x, a blue one opposite, a green one on top; the background
    is white."""
    rows = gaussians(3)
    rows[:, :3] = [[0.6, 0, 0], [-0.6, 0, 0], [0, 0, 0.7]]
    rows[:, 6:9] = (np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0]]) - 0.5) / 0.28209479
    rows[:, 9], rows[:, 10:13], rows[:, 13:] = 8.0, np.log(0.12), [1, 0, 0, 0]
    write_gaussians(run / "save/it30-export/gaussians.ply", rows)


def where(picture, channel):
    """The middle of what is red, green or blue (0, 1, 2): x and y as shares of the sides, and the
    share of the picture that it takes."""
    others = [c for c in range(3) if c != channel]
    hit = (picture[..., channel] > 150) & (picture[..., others] < 110).all(axis=-1)
    y, x = np.nonzero(hit)
    return x.mean() / hit.shape[1], y.mean() / hit.shape[0], hit.mean()


def test_gaussians_are_drawn_where_they_are(show, tmp_path):
    run = run_folder(tmp_path / "r")
    two_balls(run)
    page = show(write_page([run]))
    first = pixels(page, "balls")
    assert (first[5, 5] == 255).all()
    # the camera is at 0.5 rad, so the front one is left of the middle, and it is in front
    red, blue, green = (where(first, channel) for channel in (0, 2, 1))
    assert red[0] < 0.5 < blue[0] and green[1] < 0.4 and abs(green[0] - 0.5) < 0.02
    assert red[2] > blue[2] > 0.001
    # eval_camera_distance 3.6, 40 degrees, elevation 15, azimuth 0.5 rad
    eye = 3.6 * np.array(
        [np.cos(0.2618) * np.cos(0.5), np.cos(0.2618) * np.sin(0.5), np.sin(0.2618)]
    )
    back = eye / 3.6
    right = np.array([-np.sin(0.5), np.cos(0.5), 0])
    up = np.cross(back, right)
    for (x, y, _), place in ((red, [0.6, 0, 0]), (blue, [-0.6, 0, 0]), (green, [0, 0, 0.7])):
        seen = np.array(place) - eye
        scale = 0.5 / np.tan(np.radians(20)) / -(seen @ back)
        assert x == pytest.approx(0.5 + scale * (seen @ right), abs=0.01)
        assert y == pytest.approx(0.5 - scale * (seen @ up), abs=0.01)


def test_it_turns_by_mouse_by_keys_and_back(show, tmp_path):
    run = run_folder(tmp_path / "r")
    two_balls(run)
    page = show(write_page([run]))
    first = pixels(page, "before")
    drag(page, -0.5 / 0.008 - np.pi / 0.008 + 62.5 * 2, 0)  # about half a turn
    other = pixels(page, "behind")
    assert where(other, 2)[2] > where(other, 0)[2]  # now the blue one is the nearer
    page.get_by_role("button", name="Reset").click()
    assert np.abs(pixels(page, "again") - first).mean() < 0.5
    page.locator("canvas").focus()
    page.keyboard.press("+")
    assert where(pixels(page, "nearer"), 0)[2] > 1.1 * where(first, 0)[2]
    page.keyboard.press("ArrowUp")
    assert where(pixels(page, "above"), 1)[1] != pytest.approx(where(first, 1)[1], abs=0.01)


def test_the_nearer_gaussian_covers_the_other(show, tmp_path):
    run = run_folder(tmp_path / "r")
    rows = gaussians(2)
    rows[:, :3] = [[-0.4, 0, 0], [0.4, 0, 0]]
    rows[:, 6:9] = (np.array([[0, 0, 1], [1, 0, 0]]) - 0.5) / 0.28209479
    rows[:, 9], rows[:, 10:13], rows[:, 13:] = 8.0, np.log(0.3), [1, 0, 0, 0]
    write_gaussians(run / "save/it30-export/gaussians.ply", rows)
    page = show(write_page([run]))
    drag(page, 0.5 / 0.008, 0)  # to the front
    picture = pixels(page, "front")
    assert where(picture, 0)[2] > 0.02
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
    assert middle[0] > 230 and middle[2] < 40
    drag(page, np.pi / 0.008, 0)
    picture = pixels(page, "back")
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
    assert middle[2] > 230 and middle[0] < 40


def test_a_mesh_is_drawn_in_its_colours(show, tmp_path):
    run = run_folder(tmp_path / "r")
    (run / "save/it30-export/gaussians.ply").unlink()
    points = np.array([[0, y, z] for y in (-0.9, 0.9) for z in (-0.9, 0.9)], float)
    rgb = np.tile([[200, 100, 30]], (4, 1)) / 255
    write_mesh(run / "save/it30-export/model.glb", points, rgb, np.array([[0, 2, 1], [1, 2, 3]]))
    page = show(write_page([run]))
    picture = pixels(page, "mesh")
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
    assert np.abs(middle - [200, 100, 30]).max() <= 1 and (picture[5, 5] == 255).all()
    page.get_by_role("button", name="Shape").click()
    middle = pixels(page, "shape")[picture.shape[0] // 2, picture.shape[1] // 2]
    assert np.ptp(middle) <= 1  # grey


def test_two_objects_turn_together(show, tmp_path):
    runs = [run_folder(tmp_path / "one"), run_folder(tmp_path / "two")]
    for run in runs:
        two_balls(run)
    both = write_page(runs, tmp_path / "both.html")
    page = show(both, viewport={"width": 800, "height": 600})
    drag(page, -200, 40)
    one, two = pixels(page, "left", 0), pixels(page, "right", 1)
    assert where(one, 0)[2] > 0 and np.abs(one - two).mean() < 1


def test_hostile_text_is_shown_and_not_run(show, tmp_path):
    run = run_folder(tmp_path / "r", prompt=EVIL)
    page = show(write_page([run]))
    assert page.locator("h1").inner_text() == EVIL
    assert page.title().startswith("</script>")


def test_it_turns_by_itself_until_it_is_touched(show, tmp_path):
    run = run_folder(tmp_path / "r")
    two_balls(run)
    page = show(write_page([run]), reduced_motion="no-preference")
    first = where(pixels(page, "turning", rest=False), 0)[0]
    while abs(where(pixels(page, "turned", rest=False), 0)[0] - first) <= 0.005:
        if page.get_by_role("button", name="Turn").is_visible():
            pytest.skip("this browser draws too slowly: the page has stopped turning by itself")
    drag(page, 3, 0)
    assert page.get_by_role("button", name="Turn").is_visible()
    still = pixels(page, "still")
    page.wait_for_timeout(400)
    assert np.abs(pixels(page, "still too") - still).mean() < 0.1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(show, tmp_path, scheme):
    run = run_folder(tmp_path / "r", prompt="a " + "very" * 60 + " long word")
    options = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    page = show(write_page([run]), color_scheme=scheme, **options)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, c[4:-1].split(","))) for c in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark")
