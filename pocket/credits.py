"""``python -m pocket.credits``: who made the objects, and under which licence, as CREDITS.md.

The table is written from the libraries' own catalogues and licence files, so it says of the objects
in ``world.py`` what their makers say.
"""

import argparse
import re
import zipfile
from pathlib import Path, PurePosixPath

from pocket.assets import PACKAGE, find, find_entry
from pocket.tools import whole_file
from pocket.world import HALF_SIDE, LIBRARIES, OBJECTS, SIZE, Object

FILE = Path(__file__).with_name("CREDITS.md")
COLUMNS = ("Object", "Model", "Author", "Library", "Licence", "Also changed")
LICENCES = {  # name: address
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY 3.0 US": "https://creativecommons.org/licenses/by/3.0/us/",
}
WORDS = {  # what a model's own licence file calls them
    "Creative Commons Zero": "CC0 1.0",
    "Creative Commons Attribution 3.0": "CC-BY 3.0",
}
MAKERS = {  # the credit that a library asks for
    "BlendSwap-CC-0": "by various authors at Blend Swap, converted by Emmanuel Puybaret / eTeks",
    "BlendSwap-CC-BY": "by various authors at Blend Swap, converted by Emmanuel Puybaret / eTeks",
    "KatorLegaz": "(C) Andrew Kator & Jennifer Legaz",
    "Scopia": "(C) Emmanuel Puybaret / eTeks and Scopia Visual Interfaces Systems, s.l. "
    "(http://www.scopia.es)",
}
ABOUT = f"""# Who made the objects

The objects of the pocket world are models of the furniture libraries of
[Sweet Home 3D](https://www.sweethome3d.com) in Debian's package `{PACKAGE}`. The
models are not in this repository; pictures of them are, under the licence of the model that they
show, and the weights of networks that were trained on such pictures. Thanks to everyone in the
table. None of them endorses this project.

All models were changed in the same way: centred, scaled so that the longest side of the bounding
box is {2 * HALF_SIDE:g}, lit by three directional lights without highlights, their textures reduced
and made wholly opaque or wholly transparent, and rendered at {SIZE} x {SIZE} pixels.
The last column says what else was done; "in" names the colours that the object was also painted in.
A model whose own licence file differs from its library's is listed under its own.

This file is written by `python -m pocket.credits`; change `pocket/world.py`, not the table.
"""


def licence(archive: Path, entry: dict[str, str], library: str) -> tuple[str, str | None]:
    """(licence, page of the original) of a model: what the licence file beside it says, or the
    licence of its library, and no page, where there is none.

    Raises ``ValueError`` for a licence file that names none of the licences that are known here.
    """
    folder = PurePosixPath(entry["model"].lstrip("/")).parent
    with zipfile.ZipFile(archive) as opened:
        files = [
            name
            for name in opened.namelist()
            if PurePosixPath(name).parent == folder and "licen" in name.lower()
        ]
        if not files:
            return LIBRARIES[library], None
        text = opened.read(files[0]).decode("utf-8", "replace")
    names = {name for words, name in WORDS.items() if words in text}
    if len(names) != 1:
        raise ValueError(f"{archive}: {files[0]} names no licence that is known, or several")
    page = re.search(r"https?://(?:www\.)?blendswap\.com/blends/view/\d+", text)
    return names.pop(), page and page[0]


def changes(thing: Object) -> str:
    """What was done to this object and not to all."""
    done = [f"turned by {thing.turn:g} degrees"] if thing.turn else []
    if thing.colours:
        done.append(f"in {', '.join(thing.colours)}")
    return "; ".join(done)


def row(thing: Object, assets: Path) -> dict[str, str]:
    """The row of an object, by COLUMNS."""
    archive = assets / f"{thing.library}.sh3f"
    entry = find_entry(archive, thing.entry)
    name, page = licence(archive, entry, thing.library)
    model = entry["name"].strip()
    values = (
        thing.name,
        f"[{model}]({page})" if page else model,
        entry["creator"].strip(),
        thing.library,
        f"[{name}]({LICENCES[name]})",
        changes(thing),
    )
    return dict(zip(COLUMNS, (v.replace("|", "/") for v in values), strict=True))


def text(assets: Path) -> str:
    """The text of CREDITS.md."""
    lines = [ABOUT]
    for library, name in LIBRARIES.items():
        lines.append(f"- {library}: {MAKERS[library]}; [{name}]({LICENCES[name]})")
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for thing in OBJECTS:
        lines.append(f"| {' | '.join(row(thing, assets).values())} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.credits", description="Write pocket/CREDITS.md."
    )
    parser.add_argument("--assets", type=Path, help=f"folder of the .sh3f files of {PACKAGE}")
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    try:
        written = text(find(options.assets, options.work))
    except ValueError as error:
        parser.error(str(error))
    with whole_file(options.out) as tmp:
        tmp.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
