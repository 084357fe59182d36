"""Tables as CSV files, whose cells may hold any text, of any length."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file

LONGEST = 1 << 24  # characters of a cell; Python's own limit of 131,072 is less than a prompt's


class _Lines:
    """Ends rows with a line feed. The writer's own rows end with a carriage return as well, so that
    it puts cells with either into quotes; else a carriage return in a cell would end the row."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Replace a table by ``rows``. The file is whole whatever happens."""
    with (
        whole_file(path, sync=True) as tmp,
        tmp.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file,
    ):
        writer = csv.DictWriter(_Lines(file), columns, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """``(columns, rows)`` of a table. Raises :class:`UserError`, one line, if it is none, and
    ``OSError``."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    with path.open(newline="", encoding="utf-8", errors="surrogatepass") as file:
        reader = csv.DictReader(file)
        try:
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no table ({error}): move it away") from None
        columns = list(reader.fieldnames or ())
    for k, row in enumerate(rows):
        if None in row or None in row.values():
            raise UserError(f"{path}, row {k + 2}: not as many cells as the header; remove the row")
    return columns, rows
