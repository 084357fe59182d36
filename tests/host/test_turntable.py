"""The views of a run without their background: what asks for them, and the animations."""

import subprocess

import numpy as np
import pytest
from lods.threestudio.systems import turntable
from PIL import Image

WIDTH, HEIGHT, VIEWS = 61, 46, 5  # odd, too


def views(folder):
    """A ball that grows, red on its left and blue on its right, on nothing, which is black."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    paths = []
    for i in range(VIEWS):
        away = np.hypot(x - WIDTH / 2, y - HEIGHT / 2)
        picture = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
        picture[..., 3] = (255 * (12 + i - away).clip(0, 1)).round()
        color = np.where(x[..., None] < WIDTH / 2, [220, 40, 30], [30, 60, 210])
        picture[..., :3] = np.where(picture[..., 3:] > 0, color, 0)
        paths.append(folder / f"{i}.png")
        turntable.write_frame(paths[-1], picture)
    return paths


def decoded(path):
    """The frames of a WebM with their opacity, (N, H, W, 4)."""
    import imageio_ffmpeg

    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-c:v", "libvpx-vp9", "-i", path]
    data = subprocess.check_output([*words, "-f", "rawvideo", "-pix_fmt", "rgba", "-"])
    return np.frombuffer(data, np.uint8).reshape(-1, HEIGHT, WIDTH, 4).astype(float)


def before(background, frames):
    share = frames[..., 3:] / 255
    return share * frames[..., :3] + (1 - share) * background


def test_a_webm_shows_the_frames_before_any_background(tmp_path):
    paths = views(tmp_path)
    turntable.write_webm(tmp_path / "a.webm", paths, 30)
    found = decoded(tmp_path / "a.webm")
    wanted = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(float)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted)[..., 3].mean() < 2
    for background in (0, 128, 255):
        apart = np.abs(before(background, found) - before(background, wanted))
        assert apart.mean() < 2
    # where half a pixel is seen, in front of white, nothing dark of what is behind it
    edge = (wanted[..., 3] > 40) & (wanted[..., 3] < 215) & (np.arange(WIDTH) < WIDTH / 2 - 3)
    assert edge.sum() > 50
    red = np.abs(found[..., :3] - [220, 40, 30])[edge]
    assert red.mean() < 12


def test_what_ffmpeg_says_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch):
    paths = views(tmp_path)
    (tmp_path / "a.webm").write_text("old")
    monkeypatch.setattr(turntable, "VP9", "-c:v no-such-codec")
    with pytest.raises(ValueError, match=r"ffmpeg could not write '.*a\.webm': .+") as caught:
        turntable.write_webm(tmp_path / "a.webm", paths, 30)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a.webm").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == VIEWS + 1


@pytest.mark.parametrize("write", [turntable.write_webp, turntable.write_webm])
def test_no_views_are_no_animation(tmp_path, write):
    with pytest.raises(ValueError, match="there are no views to animate"):
        write(tmp_path / "a", [], 30)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        ("none", ()),
        ("webm", ("webm",)),
        ("both", ("webp", "frames")),
        (["frames", "webm", "frames"], ("webm", "frames")),
        (["both", "webm"], ("webp", "webm", "frames")),
        ([], ()),
    ],
)
def test_one_kind_or_several_may_be_asked_for(asked, kinds):
    assert turntable.kinds_of(asked) == kinds


@pytest.mark.parametrize("asked", ["gif", ["webm", "mp4"], 3, None, {"webm": 1}])
def test_other_kinds_are_refused(asked):
    with pytest.raises(ValueError, match="it is one or a list of webp, webm, frames, or both"):
        turntable.kinds_of(asked)


def test_without_ffmpeg_a_webm_is_refused_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr(turntable.importlib.util, "find_spec", lambda name: None)
    assert turntable.kinds_of("webp") == ("webp",)
    with pytest.raises(ValueError, match="a webm needs ffmpeg: pip install imageio-ffmpeg"):
        turntable.kinds_of("webm")
