"""The tables that runs are written to, shared by any number of processes at once."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from evaluation.batch import Lock
from evaluation.csvfile import read_rows, write_rows
from evaluation.grid import CELL, IDENTITY, Run, slug
from evaluation.worlds import DEFAULT, WORLDS
from threestudio.utils.errors import UserError
from threestudio.utils.files import whole_file

HEAD = (
    *("grid", "canvas", "prior", "prompt", "kind", "color", "seed", "settings", "steps", "digest"),
    "status",
)
TAIL = (
    *("clip_score", "prior_loss_first", "prior_loss_last", "seconds"),
    *("seconds_per_step", "peak_mib", "threads", "device", "cpu", "python", "torch", "diffusers"),
    *("peft", "commit"),
)
CURVES = (*CELL, "step", "loss_sds", "prior_loss", "grad_norm")


def columns_of(world: str) -> tuple[str, ...]:
    """The columns of a table of runs in this world."""
    return (*HEAD, *WORLDS[world].metrics, *TAIL)


RESULTS = columns_of(DEFAULT)


class Table:
    """``results.csv``, ``curves.csv`` and ``sheets/`` in a folder: a row, curve and sheet for each
    cell of a grid, of which a new one replaces the old. With ``tuning`` it is ``tuning.csv`` alone,
    in which each setting of a cell has a row of its own, and with ``sheets`` a sheet too. Tables of
    another ``world`` have other columns.

    Every change is made under a lock and by renaming whole files. Locks (flock) go with the process
    that holds them, however it ends.
    """

    def __init__(
        self, folder: Path, tuning: bool = False, world: str = DEFAULT, sheets: bool = False
    ):
        self.folder, self.tuning = Path(folder), tuning
        self.columns, self.sheets = columns_of(world), sheets or not tuning
        self.path = self.folder / ("tuning.csv" if tuning else "results.csv")
        self.key = (*CELL, "settings") if tuning else CELL
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the folder {folder} cannot be made ({error.strerror}): give another with --out"
            ) from None

    def rows(self) -> list[dict[str, str]]:
        """The rows that are there, as texts."""
        return _read(self.path, self.columns)

    def find(self, run: Run) -> dict[str, str] | None:
        """The row of this very run: of the same settings, steps and grid too."""
        return self.index().get(key_of(run))

    def index(self) -> dict[tuple, dict[str, str]]:
        """The rows by what sets their runs apart; see :func:`key_of`."""
        return {_key(row, IDENTITY): row for row in self.rows()}

    def record(self, row: dict, curves: list[dict], sheet: bytes | None) -> None:
        """Add what a run has given; ``sheet`` are the bytes of a webp."""
        with self._lock():
            if self.sheets:
                settings = row["settings"] if self.tuning else ""
                path = sheet_path(self.folder, *(row[k] for k in CELL), settings)
                if sheet is None:
                    path.unlink(missing_ok=True)  # of a run before
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(path) as tmp:
                        tmp.write_bytes(sheet)
            if not self.tuning:
                self._replace(self.folder / "curves.csv", CURVES, CELL, row, curves)
            # last: a run whose row is there is done
            self._replace(self.path, self.columns, self.key, row, [row])

    def _replace(self, path, columns, key, row, new) -> None:
        """Rewrite a table with ``new`` in place of the rows that share ``row``'s key."""
        old = [r for r in _read(path, columns) if _key(r, key) != _key(row, key)]
        write_rows(path, columns, [*old, *new])

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def claim(self, run: Run) -> Lock | None:
        """The right to do a run, or None if another process is at it."""
        folder = self.folder / ".running"
        folder.mkdir(exist_ok=True)
        name = hashlib.sha256(repr(_key(run.identity, self.key)).encode()).hexdigest()[:24]
        return Lock.take(folder / name)


def sheet_path(
    folder: Path, grid: str, representation: str, method: str, prompt: str, seed, settings: str = ""
) -> Path:
    """Where the contact sheet of a cell is, or that of one of the settings that were tried."""
    name = slug(representation, method, prompt, seed, *([settings] if settings else []))
    return Path(folder) / "sheets" / slug(grid) / f"{name}.webp"


def key_of(run: Run) -> tuple:
    """What :meth:`Table.index` knows a run by."""
    return _key(run.identity, IDENTITY)


def _key(row: dict, names) -> tuple:
    return tuple(str(row[name]) for name in names)


def begun(run: Run, threads: int, commit: str) -> dict[str, str]:
    """The row of a run of which nothing is known yet but what it is."""
    row = dict.fromkeys(columns_of(run.world), "") | run.identity
    row |= {"threads": str(threads), "commit": commit}
    return row | (WORLDS[run.world].labels(run.prompt) if run.judge else {})


def _read(path: Path, columns) -> list[dict[str, str]]:
    if not path.exists():
        return []
    found, rows = read_rows(path)
    if found != list(columns):
        raise UserError(
            f"{path} has other columns than are written now: move it away, or give another "
            "folder with --out"
        )
    return rows
