"""Pictures in terminals that can show them. Light: imported before torch is."""

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH = 480  # pixels at most
CHUNK = 4096  # characters of one escape sequence of kitty
MAX_COLORS = 256  # of a sixel picture


def protocol_of(stream: Any, environment: Mapping[str, str] = os.environ) -> str | None:
    """The way in which the terminal at the end of `stream` shows pictures, by what it says of
    itself in the environment; None for a pipe or a file, inside of tmux or screen, which pass no
    pictures on, and for a terminal that is not known to show any."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    try:
        if not stream.isatty():
            return None
    except (AttributeError, ValueError):  # none, or closed
        return None
    if "TMUX" in environment or "STY" in environment or term.startswith(("tmux", "screen", "dumb")):
        return None
    if "KITTY_WINDOW_ID" in environment or "kitty" in term or "ghostty" in (term + program).lower():
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    konsole = environment.get("KONSOLE_VERSION", "")
    if konsole.isdecimal() and int(konsole) >= 220400:
        return "sixel"
    if re.match(r"(foot|mlterm|contour|yaft|xterm-sixel)", term) or "sixel" in term:
        return "sixel"
    return None


def drawn(path, protocol: str) -> str:
    """The picture in a file as text that makes a terminal show it, at most WIDTH pixels wide.
    Raises ``OSError`` or ``ValueError`` for a file that is no picture."""
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, max(1, round(image.height * WIDTH / image.width))))
    return PROTOCOLS[protocol](image)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def kitty(image: Any) -> str:
    """The graphics protocol of kitty: a PNG in chunks; the terminal answers nothing (q=2)."""
    data = base64.b64encode(_png(image)).decode()
    parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    text = ""
    for i, part in enumerate(parts):
        control = f"{'a=T,f=100,q=2,' * (i == 0)}m={int(i + 1 < len(parts))}"
        text += f"\x1b_G{control};{part}\x1b\\"
    return f"{text}\n"


def iterm2(image: Any) -> str:
    """The inline pictures of iTerm2: a PNG in one sequence."""
    data = _png(image)
    about = f"inline=1;size={len(data)};width={image.width}px"
    return f"\x1b]1337;File={about}:{base64.b64encode(data).decode()}\x07\n"


def sixel(image: Any) -> str:
    """DEC's sixels: up to MAX_COLORS colours in bands of six rows, runs of a pattern shortened."""
    small = image.quantize(MAX_COLORS, dither=0)
    palette, pixels = small.getpalette(), small.load()
    used = sorted({index for _, index in small.getcolors(MAX_COLORS)})
    text = f'\x1bP0;1q"1;1;{small.width};{small.height}'
    for index in used:
        shares = (round(100 * c / 255) for c in palette[3 * index : 3 * index + 3])
        text += f"#{index};2;{';'.join(map(str, shares))}"
    for top in range(0, small.height, 6):
        rows = range(top, min(top + 6, small.height))
        masks: dict[int, list[int]] = {}
        for x in range(small.width):
            for bit, y in enumerate(rows):
                masks.setdefault(pixels[x, y], [0] * small.width)[x] |= 1 << bit
        text += "$".join(f"#{index}{''.join(_runs(masks[index]))}" for index in sorted(masks)) + "-"
    return f"{text}\x1b\\\n"


def _runs(mask: list[int]) -> Iterator[str]:
    start = 0
    for x in range(1, len(mask) + 1):
        if x == len(mask) or mask[x] != mask[start]:
            count, letter = x - start, chr(63 + mask[start])
            yield f"!{count}{letter}" if count > 3 else letter * count
            start = x


PROTOCOLS = {"kitty": kitty, "iterm2": iterm2, "sixel": sixel}
