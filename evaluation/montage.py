"""A picture of several contestants side by side, put together from contact sheets."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from evaluation.results import CEILING
from threestudio.utils.files import whole_file

# pixels: the least width of the column of names, a line of text, and between pictures
LABEL, LINE, GAP = 120, 14, 4


def wrapped(draw: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels, between words where that can be."""
    lines = [""]
    for word in text.split():
        while draw.textlength(word) > width:
            fits = next(k for k in range(len(word), 0, -1) if draw.textlength(word[:k]) <= width)
            lines[-1:] = [lines[-1], word[:fits]] if lines[-1] else [word[:fits]]
            word = word[fits:]
        together = f"{lines[-1]} {word}".strip()
        lines[-1:] = [together] if draw.textlength(together) <= width else [lines[-1], word]
    return lines


def layout(
    draw: ImageDraw.ImageDraw, names: Sequence[str], prompts: Sequence[str], width: int
) -> tuple[int, list[list[str]]]:
    """How wide the column of names is, and the lines of each prompt's heading."""
    left = max([LABEL, *(8 + math.ceil(draw.textlength(name)) for name in names)])
    return left, [wrapped(draw, prompt, width) for prompt in prompts]


def montage(
    file: Path, sheets: Sequence[Sequence[Path]], priors: Sequence[str], prompts: Sequence[str]
) -> None:
    """Write ``file``: a row a prior and a column a prompt, the first two pictures of each sheet
    ``sheets[prior][prompt]``, which may be absent; nothing where all are."""
    found = [path for row in sheets for path in row if path.exists()]
    if not found:
        return
    with Image.open(found[0]) as first:
        side = first.height
    width = 2 * side
    names = [prior if prior != CEILING else "true renders" for prior in priors]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, heads = layout(pen, names, prompts, width)
    top = 4 + LINE * max(map(len, heads), default=1)
    size = left + len(prompts) * (width + GAP), top + len(priors) * (side + GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for j, head in enumerate(heads):
        for k, line in enumerate(head):  # the last line is beside the pictures
            y = top - 2 - LINE * (len(head) - k)
            draw.text((left + j * (width + GAP), y), line, fill="black")
    for i, (name, row) in enumerate(zip(names, sheets)):
        y = top + i * (side + GAP)
        draw.text((4, y + side // 2 - 6), name, fill="black")
        for j, path in enumerate(row):
            if path.exists():
                with Image.open(path) as sheet:
                    pair = sheet.convert("RGB").crop((0, 0, width, side))
                page.paste(pair, (left + j * (width + GAP), y))
    with whole_file(file, keep_suffix=True) as tmp:
        page.save(tmp, "WEBP", quality=80)
