"""A picture of several contestants side by side, put together from contact sheets."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from evaluation.results import CEILING
from threestudio.utils.files import whole_file

LABEL, LINE, GAP = 120, 18, 4  # pixels: the column of names, the line of prompts, between pictures


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
    size = LABEL + len(prompts) * (width + GAP), LINE + len(priors) * (side + GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for j, prompt in enumerate(prompts):
        while draw.textlength(prompt) > width and " " in prompt:
            prompt = prompt.split(" ", 1)[1]  # the last words say what it is
        draw.text((LABEL + j * (width + GAP), 2), prompt, fill="black")
    for i, (prior, row) in enumerate(zip(priors, sheets)):
        y = LINE + i * (side + GAP)
        name = prior if prior != CEILING else "true renders"
        draw.text((4, y + side // 2 - 6), name, fill="black")
        for j, path in enumerate(row):
            if path.exists():
                with Image.open(path) as sheet:
                    pair = sheet.convert("RGB").crop((0, 0, width, side))
                page.paste(pair, (LABEL + j * (width + GAP), y))
    with whole_file(file, keep_suffix=True) as tmp:
        page.save(tmp, "WEBP", quality=80)
