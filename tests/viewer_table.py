"""The table of how far other people's viewers are from our colours.

The tests that show our files in a browser or in Blender call :func:`note`. Where
``LODS_VIEWERS_CSV`` names a file, each call adds or replaces a row there, which makes
``benchmarks/results/viewers.csv``:

    LODS_BLENDER=PYTHON LODS_VIEWERS_CSV=benchmarks/results/viewers.csv \
        pytest -m slow tests/assets/test_blender.py tests/host/test_browser.py
"""

import csv
import os
from pathlib import Path

import numpy as np
from lods.files import whole_file

from evaluation.machine import commit

COLUMNS = ("viewer", "file", "mean", "nine_tenths_below", "commit")


def note(viewer: str, file: str, apart: np.ndarray) -> None:
    """Say the absolute differences, of 255, of what ``viewer`` shows of ``file`` and what it should
    show, and put their mean and 0.9 quantile into the table, if one is asked for."""
    mean, most = float(np.mean(apart)), float(np.quantile(apart, 0.9))
    print(f"{file} in {viewer}: mean {mean:.3f} of 255, nine tenths below {most:.2f}")
    if "LODS_VIEWERS_CSV" not in os.environ:
        return
    table = Path(os.environ["LODS_VIEWERS_CSV"])
    rows = list(csv.DictReader(table.open(newline=""))) if table.exists() else []
    rows = [row for row in rows if (row["viewer"], row["file"]) != (viewer, file)]
    cells = (viewer, file, f"{mean:.3f}", f"{most:.2f}", commit())
    rows.append(dict(zip(COLUMNS, cells, strict=True)))
    with whole_file(table) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["viewer"], row["file"])))
