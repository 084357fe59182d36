"""A picture of several methods side by side, put together from contact sheets."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from threestudio.utils.files import whole_file

LEFT, LINE, GAP, LETTER = 150, 14, 4, 7  # pixels: names, a line of text, a gap, a letter


def montage(
    file: Path,
    sheets: Sequence[Sequence[Path | None]],
    names: Sequence[str],
    prompts: Sequence[str],
    pictures: int = 2,
) -> None:
    """Write ``file``: a row a name and a column a prompt, the first ``pictures`` of each sheet
    ``sheets[name][prompt]``, which may be absent or None; nothing where all are."""
    found = [path for row in sheets for path in row if path and path.exists()]
    if not found:
        return
    with Image.open(found[0]) as first:
        side = first.height
    width = pictures * side
    heads = [textwrap.fill(prompt, max(1, width // LETTER)) for prompt in prompts]
    top = 6 + LINE * max(head.count("\n") + 1 for head in heads)
    size = LEFT + len(prompts) * (width + GAP), top + len(names) * (side + GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for j, head in enumerate(heads):
        draw.multiline_text((LEFT + j * (width + GAP), 2), head, fill="black")
    for i, (name, row) in enumerate(zip(names, sheets)):
        y = top + i * (side + GAP)
        draw.text((4, y + side // 2 - 6), name, fill="black")
        for j, path in enumerate(row):
            if path and path.exists():
                with Image.open(path) as sheet:
                    pair = sheet.convert("RGB").crop((0, 0, width, side))
                page.paste(pair, (LEFT + j * (width + GAP), y))
    with whole_file(file, keep_suffix=True) as tmp:
        page.save(tmp, "WEBP", quality=80)
