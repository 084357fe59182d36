"""Pictures in a terminal: which terminals, and what is written."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from threestudio.run import terminal
from threestudio.run.terminal import drawn, protocol_of


class Stream(io.StringIO):
    def __init__(self, tty=True):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


KITTY = {"KITTY_WINDOW_ID": "3", "TERM": "xterm-kitty"}
TERMINALS = [
    (KITTY, "kitty"),
    ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
    ({"TERM_PROGRAM": "iTerm.app", "TERM": "xterm-256color"}, "iterm2"),
    ({"LC_TERMINAL": "iTerm2", "TERM": "xterm-256color"}, "iterm2"),
    ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
    ({"TERM": "foot"}, "sixel"),
    ({"KONSOLE_VERSION": "230804", "TERM": "xterm-256color"}, "sixel"),
    ({"KONSOLE_VERSION": "210400", "TERM": "xterm-256color"}, None),
    ({"TERM": "xterm-256color"}, None),
    ({}, None),
    ({**KITTY, "TMUX": "/tmp/tmux-1,2,3"}, None),
    ({**KITTY, "TERM": "screen-256color"}, None),
    ({**KITTY, "TERM": "dumb"}, None),
]


@pytest.mark.parametrize("environment, protocol", TERMINALS)
def test_terminals_are_known_by_what_they_say_of_themselves(environment, protocol):
    assert protocol_of(Stream(), environment) == protocol


@pytest.mark.parametrize("environment, protocol", TERMINALS)
def test_a_pipe_shows_no_pictures(environment, protocol):
    assert protocol_of(Stream(tty=False), environment) is None
    assert protocol_of(None, environment) is None


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (67, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    return tmp_path / "p.png", pixels


def test_kitty_gets_the_picture_in_chunks(picture):
    path, pixels = picture
    sequences = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn(path, "kitty"))
    assert len(sequences) > 1 and all(len(data) <= 4096 for _, data in sequences)
    controls = [dict(item.split("=") for item in keys.split(",")) for keys, _ in sequences]
    assert controls[0] == {"a": "T", "f": "100", "q": "2", "m": "1"}
    assert [c["m"] for c in controls] == ["1"] * (len(controls) - 1) + ["0"]
    data = base64.b64decode("".join(part for _, part in sequences))
    assert (np.asarray(Image.open(io.BytesIO(data))) == pixels).all()


def test_iterm2_gets_the_picture_in_one_sequence(picture):
    path, pixels = picture
    found = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07\n", drawn(path, "iterm2"))
    data = base64.b64decode(found[2])
    about = dict(item.split("=") for item in found[1].split(";"))
    assert about == {"inline": "1", "size": str(len(data)), "width": "90px"}
    assert (np.asarray(Image.open(io.BytesIO(data))) == pixels).all()


def read_sixel(text):
    """The pixels that a terminal would draw, read by the rules of DEC's manual."""
    found = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\\n', text, re.S)
    width, height = int(found[1]), int(found[2])
    pixels = np.full((height + 6, width, 3), -1.0)
    palette, x, top, color = {}, 0, 0, None
    for n, rgb, count, letter, move in re.findall(
        r"#(\d+)(?:;2;(\d+;\d+;\d+))?|(?:!(\d+))?([?-~])|([$-])", found[3]
    ):
        if n:
            color = int(n)
            if rgb:
                palette[color] = np.array(rgb.split(";"), float) * 2.55
        elif move:
            x, top = 0, top + 6 * (move == "-")
        else:
            run = int(count or 1)
            for bit in range(6):
                if (ord(letter) - 63) >> bit & 1:
                    pixels[top + bit, x : x + run] = palette[color]
            x += run
    assert (pixels[height:] == -1).all() and (pixels[:height] >= 0).all()
    return pixels[:height]


def test_sixels_are_the_picture_in_few_colours(tmp_path):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (40, 3), dtype=np.uint8)
    pixels = colors[rng.integers(0, 40, (67, 90))]
    pixels[10:40, 20:70] = colors[0]  # long runs too
    Image.fromarray(pixels).save(tmp_path / "p.png")
    shown = read_sixel(drawn(tmp_path / "p.png", "sixel"))
    assert np.abs(shown - pixels).max() <= 1.3  # they have shares of a hundred


def test_a_large_picture_is_made_smaller(tmp_path):
    Image.new("RGB", (960, 300), "blue").save(tmp_path / "p.png")
    assert read_sixel(drawn(tmp_path / "p.png", "sixel")).shape == (150, 480, 3)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "p.png").write_bytes(b"no picture")
    for protocol in terminal.PROTOCOLS:
        with pytest.raises(OSError):
            drawn(tmp_path / "p.png", protocol)
