"""The animations of a run's views in a real browser, before a checkerboard."""

import numpy as np
import pytest
from lods.threestudio.systems import turntable

from tests.browser import chromium, patience
from tests.host.test_turntable import HEIGHT, WIDTH, views

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium.CHROMIUM is None, reason="Chromium is not installed"),
]
LEVELS = 2.0  # of 255, the mean difference
BOARD = "conic-gradient(#777 25%, #fff 0 50%, #777 0 75%, #fff 0) 0 0 / 16px 16px"
PAGE = f"""<!doctype html><style>body {{ margin: 0; display: flex; background: {BOARD} }}
  img, video {{ width: {WIDTH}px; margin-right: {64 - WIDTH}px }}</style>
<img src="0.png"><video src="turntable.webm" muted preload="auto"></video><img src="turntable.webp">
"""


def test_a_browser_shows_an_animation_before_what_is_behind_it(tmp_path):
    """Its first frame, against the PNG file."""
    frames = views(tmp_path)
    turntable.write_webm(tmp_path / "turntable.webm", frames, 30)
    turntable.write_webp(tmp_path / "turntable.webp", frames[:1], 30)
    (tmp_path / "page.html").write_text(PAGE)
    with chromium.driven() as browser:
        page = browser.new_page(viewport={"width": 3 * 64, "height": HEIGHT})
        page.goto((tmp_path / "page.html").as_uri())
        ready = "document.querySelector('video').readyState >= 2"
        page.wait_for_function(ready, timeout=patience.PAGE)
        patience.frames(page)
        seen = chromium.seen(page.screenshot(), "turntable")
    frame, video, webp = (seen[:, 64 * i : 64 * i + WIDTH] for i in range(3))
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 3  # the ball, and both fields
    assert np.abs(video - frame).mean() < LEVELS
    assert np.abs(webp - frame).mean() < LEVELS
