"""The gallery of objects that were fixed in advance: ``python -m evaluation.gallery``.

The twelve objects of GALLERY in :mod:`pocket.truth`: four sides of the true object and below them
four of the distilled one, as one WebP, and the metrics of each as CSV. They are from the table of
the comparison (``--folder``, ``--representation``, ``--method``), or, where folders of launched
runs are given, rendered from those. All twelve have to be there; with ``--partial`` some may be
missing, and the picture names them.
"""

import argparse
import io
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from evaluation.against_truth import TRUTH, cell, load_run, over, truth_of, views_of
from evaluation.csvfile import write_rows
from evaluation.machine import OBJECTS, ROOT
from evaluation.measures import OBJECTS as MEASURES
from evaluation.results import CEILING, KEYS, latest, read
from evaluation.table import sheet_path
from evaluation.tool import parser_of, write_files
from evaluation.worlds.objects import Objects, compared, judged, pictures
from pocket.truth import GALLERY, JUDGED
from pocket.world import Object, asked
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.files import whole_file

SIDES = tuple(range(0, JUDGED, JUDGED // 4))  # azimuths 0, 90, 180 and 270 of the judged views
COLUMNS = 3  # objects in a row
GAP, LINE, LETTER = 12, 16, 7  # pixels between objects, of a line of text, of a letter
GIVEN = "what is given"
MOST = 400_000  # bytes of the picture
FIRST = ("object", "run", "seconds")
Strip = UInt8[np.ndarray, "H W 3"]  # four sides in a row
Shown = tuple[dict[str, str], Strip, Strip]  # cells, truth, run


def strip(rgb) -> Strip:
    """Four of the judged views (V, H, W, 3), in 0..1, in a row."""
    picked = (rgb[list(SIDES)].numpy() * 255).round().astype(np.uint8)
    return np.concatenate(list(picked), axis=1)


def object_of(prompt: str) -> tuple[Object, str | None]:
    """Object and colour that a prompt names. Raises :class:`UserError` where it names none."""
    try:
        return asked(prompt)
    except ValueError as error:
        raise UserError(str(error)) from None


def from_table(folder: Path, representation: str, method: str, seed: str) -> dict[str, Shown]:
    """Finished runs of the comparison by object: their rows and contact sheets."""
    found: dict[str, Shown] = {}
    rows = latest(read(folder / "results.csv", (*KEYS, "status", "psnr")) or ())
    for row in rows:
        if (row["canvas"], row["prior"], row["seed"]) != (representation, method, seed):
            continue
        thing, colour = object_of(row["prompt"])
        sheet = sheet_path(folder, *(row[k] for k in KEYS))
        if row["status"] == "ok" and colour is None and sheet.is_file():
            with Image.open(sheet) as picture:
                made = np.asarray(picture.convert("RGB"))
            name = f"{row['grid']} {representation} {method} seed {seed}"
            cells = {"object": thing.name, "run": name, "seconds": row["seconds"]}
            cells |= {m.column: row.get(m.column, "") for m in MEASURES.metrics}
            found[thing.name] = cells, strip(truth_of(row["prompt"]).rgb), made
    return found


def from_runs(runs: Sequence[Path], partial: bool) -> dict[str, Shown]:
    """Launched runs by object, rendered and judged here, once it is clear that the gallery can be
    made of them."""
    load_extension(ROOT / "custom" / "threestudio-lods")
    loaded: dict[str, tuple] = {}
    for run in runs:
        cfg, system = load_run(run)
        prompt = cfg.system.prompt_processor.prompt
        true = truth_of(prompt, TRUTH)
        name = true.thing.name
        if name not in GALLERY:
            raise UserError(f"{run}: the gallery has no {name}; leave this run out")
        if name in loaded:
            raise UserError(f"{loaded[name][0]} and {run} have the same object, {name}: give one")
        loaded[name] = run, prompt, system, true
    missing_of(loaded, GIVEN, partial)
    found: dict[str, Shown] = {}
    for name, (run, prompt, system, true) in loaded.items():
        rgb, opacity = views_of(system.renderer, true.cameras, Objects.side)
        rgb = over(rgb, opacity)
        made = pictures(rgb, opacity, np.arange(JUDGED))
        scores = judged(made, prompt) | compared(rgb, opacity, true)
        cells = {"object": name, "run": str(run), "seconds": ""}
        cells |= {m.column: cell(scores.get(m.column, float("nan"))) for m in MEASURES.metrics}
        found[name] = cells, strip(true.rgb), strip(rgb)
    return found


def missing_of(found: Iterable[str], where: str, partial: bool) -> list[str]:
    """The objects of the gallery that are not among ``found``. Raises :class:`UserError` that names
    them, unless ``partial`` allows some: what was left out must not look like a choice."""
    missing = [name for name in GALLERY if name not in found]
    if missing and not (partial and len(missing) < len(GALLERY)):
        hint = "" if partial else "; --partial makes a gallery without them"
        raise UserError(f"{where} has no finished run of: {', '.join(missing)}{hint}")
    return missing


def page(shown: Sequence[Shown], missing: Sequence[str] = ()) -> Image.Image:
    """The picture: three objects in a row, the truth above the run, and below them all what is
    missing."""
    height, width = shown[0][1].shape[:2]
    columns = min(COLUMNS, len(shown))
    down = LINE + 2 * height + GAP
    across = columns * (width + GAP) - GAP
    note = textwrap.wrap(f"no run of: {', '.join(missing)}", across // LETTER) if missing else []
    bottom = -(-len(shown) // columns) * down - GAP
    sheet = Image.new("RGB", (across, bottom + len(note) * LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (cells, true, made) in enumerate(shown):
        x, y = k % columns * (width + GAP), k // columns * down
        text = f"{cells['object']}: true above, distilled below"
        if cells["psnr"]:
            text += f" ({float(cells['psnr']):.1f} dB)"
        draw.text((x + 2, y + 2), text, fill="black")
        sheet.paste(Image.fromarray(true), (x, y + LINE))
        sheet.paste(Image.fromarray(made), (x, y + LINE + height))
    for k, line in enumerate(note):
        draw.text((2, bottom + k * LINE + 2), line, fill="black")
    return sheet


def packed(sheet: Image.Image, most: int = MOST) -> bytes:
    """The picture as a WebP of at most so many bytes, in the best quality that this allows. Raises
    :class:`UserError` where none does."""
    for quality in range(92, 10, -6):
        file = io.BytesIO()
        sheet.save(file, "WEBP", quality=quality, method=6)
        if file.tell() <= most:
            return file.getvalue()
    raise UserError(f"the picture has {file.tell():,} bytes, more than {most:,}, at any quality")


def write(out: Path, shown: Sequence[Shown], missing: Sequence[str] = ()) -> tuple[Path, Path]:
    """Write ``out`` and the table beside it."""
    table = out.with_suffix(".csv")
    rows = [cells for cells, _, _ in shown]
    columns = [m.column for m in MEASURES.metrics if any(row[m.column] for row in rows)]
    kept = [{k: row[k] for k in (*FIRST, *columns)} for row in rows]
    picture = packed(page(shown, missing))
    write_rows(table, [*FIRST, *columns], kept)
    with whole_file(out) as tmp:
        tmp.write_bytes(picture)
    return out, table


def make(options: argparse.Namespace) -> tuple[Path, Path]:
    """The files that the command line asks for."""
    out = options.out or (Path() if options.runs else options.folder) / "gallery.webp"
    if out.suffix != ".webp":
        raise UserError(f"--out {out} must end in .webp; the table beside it ends in .csv")
    if options.method == CEILING:
        raise UserError("true renders are no runs: choose another --method")
    if options.runs:
        found, where = from_runs(options.runs, options.partial), GIVEN
    else:
        found = from_table(options.folder, options.representation, options.method, options.seed)
        where = f"{options.folder / 'results.csv'} ({options.representation}, {options.method})"
    missing = missing_of(found, where, options.partial)
    return write(out, [found[name] for name in GALLERY if name in found], missing)


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("gallery", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs of launch.py")
    add("--folder", type=Path, default=OBJECTS, help="of results.csv, where no RUN is given")
    add("--representation", default="gaussians-tokens", help="default gaussians-tokens")
    add("--method", default="sds", help="default sds")
    add("--seed", default="0", help="default 0")
    add("--partial", action="store_true", help="make it also where objects are missing")
    add(
        "--out",
        type=Path,
        help="WebP to write (default gallery.webp in --folder, of RUNs here)",
    )
    options = parser.parse_args(arguments)
    return write_files(lambda: make(options))


if __name__ == "__main__":
    sys.exit(main())
