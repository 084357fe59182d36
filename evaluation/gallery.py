"""The gallery of objects that were fixed in advance: ``python -m evaluation.gallery``.

The twelve objects of GALLERY in :mod:`pocket.truth`, all of them or none: four sides of the true
object and below them four of the distilled one, as one WebP, and the metrics of each as CSV. They
are from the table of the comparison (``--folder``, ``--representation``, ``--method``), or, where
folders of launched runs are given, rendered from those.
"""

import argparse
import io
import sys
from collections.abc import Sequence
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
from evaluation.worlds.objects import Objects, compared, judged, pictures
from pocket.truth import GALLERY, JUDGED
from pocket.world import asked
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.files import whole_file

SIDES = tuple(range(0, JUDGED, JUDGED // 4))  # azimuths 0, 90, 180 and 270 of the judged views
COLUMNS, GAP, LINE = 3, 12, 16  # objects in a row; pixels between them, and of a line of text
MOST = 400_000  # bytes of the picture
FIRST = ("object", "run", "seconds")
Strip = UInt8[np.ndarray, "H W 3"]  # four sides in a row
Shown = tuple[dict[str, str], Strip, Strip]  # cells, truth, run


def strip(rgb) -> Strip:
    """Four of the judged views (V, H, W, 3), in 0..1, in a row."""
    picked = (rgb[list(SIDES)].numpy() * 255).round().astype(np.uint8)
    return np.concatenate(list(picked), axis=1)


def from_table(folder: Path, representation: str, method: str, seed: str) -> dict[str, Shown]:
    """Finished runs of the comparison by object: their rows and contact sheets."""
    found: dict[str, Shown] = {}
    rows = latest(read(folder / "results.csv", (*KEYS, "status", "psnr")) or ())
    for row in rows:
        if (row["canvas"], row["prior"], row["seed"]) != (representation, method, seed):
            continue
        thing, colour = asked(row["prompt"])
        sheet = sheet_path(folder, *(row[k] for k in KEYS))
        if row["status"] == "ok" and colour is None and sheet.is_file():
            with Image.open(sheet) as picture:
                made = np.asarray(picture.convert("RGB"))
            name = f"{row['grid']} {representation} {method} seed {seed}"
            cells = {"object": thing.name, "run": name, "seconds": row["seconds"]}
            cells |= {m.column: row.get(m.column, "") for m in MEASURES.metrics}
            found[thing.name] = cells, strip(truth_of(row["prompt"]).rgb), made
    return found


def from_runs(runs: Sequence[Path]) -> dict[str, Shown]:
    """Launched runs by object, rendered and judged here."""
    load_extension(ROOT / "custom" / "threestudio-lods")
    found: dict[str, Shown] = {}
    for run in runs:
        cfg, system = load_run(run)
        prompt = cfg.system.prompt_processor.prompt
        true = truth_of(prompt, TRUTH)
        if true.thing.name in found:
            before = found[true.thing.name][0]["run"]
            raise UserError(f"{before} and {run} are both of a {true.thing.name}: give one")
        rgb, opacity = views_of(system.renderer, true.cameras, Objects.side)
        rgb = over(rgb, opacity)
        made = pictures(rgb, opacity, np.arange(JUDGED))
        scores = judged(made, prompt) | compared(rgb, opacity, true)
        cells = {"object": true.thing.name, "run": str(run), "seconds": ""}
        cells |= {m.column: cell(scores.get(m.column, float("nan"))) for m in MEASURES.metrics}
        found[true.thing.name] = cells, strip(true.rgb), strip(rgb)
    return found


def chosen(found: dict[str, Shown], where: str) -> list[Shown]:
    """All objects of the gallery in its order: none is left out, or it would be a choice. Raises
    :class:`UserError` that names those that lack."""
    lacking = [name for name in GALLERY if name not in found]
    if lacking:
        raise UserError(f"{where} has no finished run of: {', '.join(lacking)}")
    return [found[name] for name in GALLERY]


def page(shown: Sequence[Shown]) -> Image.Image:
    """The picture: three objects in a row, the truth above the run."""
    height, width = shown[0][1].shape[:2]
    down = LINE + 2 * height + GAP
    rows = -(-len(shown) // COLUMNS)
    size = COLUMNS * (width + GAP) - GAP, rows * down - GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (cells, true, made) in enumerate(shown):
        x, y = k % COLUMNS * (width + GAP), k // COLUMNS * down
        text = f"{cells['object']}: true above, distilled below"
        if cells["psnr"]:
            text += f" ({float(cells['psnr']):.1f} dB)"
        draw.text((x + 2, y + 2), text, fill="black")
        sheet.paste(Image.fromarray(true), (x, y + LINE))
        sheet.paste(Image.fromarray(made), (x, y + LINE + height))
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


def write(out: Path, shown: Sequence[Shown]) -> tuple[Path, Path]:
    """Write ``out`` and the table beside it."""
    table = out.with_suffix(".csv")
    rows = [cells for cells, _, _ in shown]
    columns = [m.column for m in MEASURES.metrics if any(row[m.column] for row in rows)]
    kept = [{k: row[k] for k in (*FIRST, *columns)} for row in rows]
    picture = packed(page(shown))
    write_rows(table, [*FIRST, *columns], kept)
    with whole_file(out) as tmp:
        tmp.write_bytes(picture)
    return out, table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.gallery", description=(__doc__ or "").split("\n\n")[-1]
    )
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs of launch.py")
    add("--folder", type=Path, default=OBJECTS, help="of results.csv, where no RUN is given")
    add("--representation", default="gaussians-tokens", help="default gaussians-tokens")
    add("--method", default="sds", help="default sds")
    add("--seed", default="0", help="default 0")
    add("--out", type=Path, help="the WebP to write (default gallery.webp in the folder)")
    options = parser.parse_args(arguments)
    out = options.out or options.folder / "gallery.webp"
    try:
        if options.method == CEILING:
            raise UserError("true renders are no runs: choose another --method")
        if options.runs:
            found, where = from_runs(options.runs), "what is given"
        else:
            found = from_table(options.folder, options.representation, options.method, options.seed)
            where = f"{options.folder / 'results.csv'} ({options.representation}, {options.method})"
        files = write(out, chosen(found, where))
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("wrote " + " and ".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
