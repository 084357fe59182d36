"""Edits of true renders with the embedded model, against the true render of what was asked for.

Each edit begins at a render of ``pocket/truth`` over white, at 128 pixels, and is carried out by
each method with the defaults of ``lods edit``. What is done stays in the folder, and the same
command goes on.

A table has a row for each edit and method (``edits.csv``): the PSNR of the source, of the result
and of the result without the details of :mod:`lods.edits.details` to the true target, and the mean
change, of 255, where neither shows its object; and whether the judge (:mod:`pocket.judge`) takes
the result for the object and the colour that were asked for, 1 or 0, empty for an object that comes
in one colour. A sheet (``edits.png``) has the source, what the autoencoder alone makes of it, the
methods, and the true target.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from evaluation.against_truth import truth_of
from evaluation.csvfile import read_rows, write_rows
from evaluation.machine import ROOT
from evaluation.tool import parser_of, write_files
from threestudio.utils.errors import UserError
from threestudio.utils.extensions import load_extension
from threestudio.utils.files import whole_file

EDITS = (
    ("a red armchair", "a blue armchair"),
    ("a cat", "a dog"),
    ("a soccer ball", "a basketball"),
    ("a teddy bear", "a rabbit"),
    ("a green car", "a yellow car"),
    ("a chair", "an armchair"),
    ("a yellow kettle", "a red kettle"),
    ("a christmas tree", "a bonsai tree"),
)
METHODS = ("dds", "pds", "ssd", "edit")
VIEW = 2  # of the 24 true ones: from the front and the side
COLUMNS = ("source", "target", "method", "source_psnr", "target_psnr", "bare_psnr", "outside")
COLUMNS += ("object", "colour", "steps", "scale")
TABLE, SHEET, PLAIN = "edits.csv", "edits.png", "autoencoder"
Pixels = UInt8[np.ndarray, "S S 3"]


@dataclass(frozen=True)
class Sides:
    """The true renders of an edit, the camera (elevation, azimuth) that both are seen from, and
    where neither shows its object."""

    before: Pixels
    after: Pixels
    camera: tuple[float, float]
    outside: np.ndarray


def sides(source: str, target: str) -> Sides:
    """Those of two prompts."""
    one, two = truth_of(source), truth_of(target)
    pictures = [(255 * true.rgb[VIEW]).round().byte().numpy() for true in (one, two)]
    outside = ((one.opacity[VIEW] == 0) & (two.opacity[VIEW] == 0)).numpy()
    elevation, azimuth = (float(number) for number in one.cameras[VIEW][:2])
    return Sides(pictures[0], pictures[1], (elevation, azimuth), outside)


def psnr(one: Pixels, two: Pixels) -> float:
    """In decibels."""
    mean = float(((one.astype(np.float64) - two) ** 2).mean()) / 255**2
    return -10 * float(np.log10(max(mean, 1e-12)))


def carry_out(source: str, target: str, method: str, model, folder: Path) -> dict:
    """One edit; writes its picture, and that of the autoencoder alone, and returns its row."""
    import lods
    import torch
    from lods.edits.picture import Picture
    from lods.edits.run import PictureEdit
    from lods.edits.settings import EditSettings, defaults

    seen = sides(source, target)
    full = "lods-edit" if method == "edit" else f"lods-{method}"
    settings = EditSettings(
        source, target, full, "pocket", cameras="tokens", **defaults("pocket", full)
    )
    settings.elevation, settings.azimuth = seen.camera
    torch.manual_seed(settings.seed)
    made = lods.load(full, model, target, source_prompt=source, **settings.of_method())
    size = len(seen.before)
    picture = Picture(seen.before, size, size)
    edit = PictureEdit(settings, picture, np.ones((size, size), bool), made)
    settings.details = 0.0
    plain = edit.pixels()  # nothing is changed yet
    for _ in edit.steps():
        pass
    bare = edit.pixels()
    settings.details = 1.0
    found = edit.pixels()
    save(folder / f"{name_of(source, target, PLAIN)}.png", plain)
    save(folder / f"{name_of(source, target, method)}.png", found)
    said = verdict(found, target)
    change = np.abs(found.astype(float) - seen.before)[seen.outside]
    return {
        "source": source,
        "target": target,
        "method": method,
        "source_psnr": f"{psnr(seen.before, seen.after):.2f}",
        "target_psnr": f"{psnr(found, seen.after):.2f}",
        "bare_psnr": f"{psnr(bare, seen.after):.2f}",
        "outside": f"{change.mean():.2f}",
        **{key: "" if np.isnan(said[key]) else f"{said[key]:.0f}" for key in said},
        "steps": settings.steps,
        "scale": settings.scale,
    }


def verdict(pixels: Pixels, target: str) -> dict[str, float]:
    """Whether the judge sees the ``object`` and the ``colour`` of a prompt in a picture: 1 or 0;
    NaN for the colour of an object that comes in one."""
    import torch

    from evaluation.worlds.objects import judged, pictures

    said = judged(pictures(torch.from_numpy(pixels)[None] / 255, None, np.array([VIEW])), target)
    return {"object": said["object_accuracy"], "colour": said["color_accuracy"]}


def save(path: Path, pixels: np.ndarray) -> None:
    """Write a picture."""
    from PIL import Image

    with whole_file(path, keep_suffix=True) as partial:
        Image.fromarray(pixels).save(partial, optimize=True)


def name_of(source: str, target: str, method: str) -> str:
    return f"{source} to {target} {method}".replace(" ", "-")


def make_sheet(folder: Path, edits) -> Path:
    """A row for each edit that is complete."""
    from PIL import Image

    rows = []
    for source, target in edits:
        files = [folder / f"{name_of(source, target, m)}.png" for m in (PLAIN, *METHODS)]
        if all(file.is_file() for file in files):
            seen = sides(source, target)
            made = [np.asarray(Image.open(file).convert("RGB")) for file in files]
            rows.append(np.concatenate([seen.before, *made, seen.after], axis=1))
    if not rows:
        raise UserError("no edit is complete yet")
    save(folder / SHEET, np.concatenate(rows))
    return folder / SHEET


def main(argv=None) -> int:
    """Run the command line; returns the exit status: 2 after a mistake."""
    parser = parser_of("edits", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the results")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="of the edits, from 0 on")
    args = parser.parse_args(argv)

    def make() -> list[Path]:
        args.out.mkdir(parents=True, exist_ok=True)
        load_extension(ROOT / "custom" / "threestudio-lods")
        import lods

        chosen = (
            EDITS if args.only is None else [EDITS[n] for n in args.only if 0 <= n < len(EDITS)]
        )
        table = args.out / TABLE
        rows = read_rows(table)[1] if table.is_file() else []
        done = {(row["source"], row["target"], row["method"]) for row in rows}
        model = None
        for source, target in chosen:
            for method in METHODS:
                if (source, target, method) in done:
                    continue
                model = model or lods.models.load("pocket", cameras="tokens")
                rows.append(carry_out(source, target, method, model, args.out))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                write_rows(table, COLUMNS, rows)
        return [table, make_sheet(args.out, EDITS)]

    return write_files(make)


if __name__ == "__main__":
    sys.exit(main())
