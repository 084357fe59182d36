"""How far a run is, from what it has written so far."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lods.commands.job import RECORD
from lods.commands.runs import PARSED
from lods.studio.records import (
    MAX_JSON,
    changed,
    config_in,
    is_plain,
    read_json,
    seconds_of,
)
from lods.studio.shelf import Entry

CHANGES = "interventions.jsonl"  # of the host: what was changed in the live view
MAX_STEERED = 1000  # characters of a prompt
LOG_END = 6000  # bytes of a log that are shown


def steered_to(entry: Entry) -> str:
    """The last prompt that a run was given on its way, from its ``interventions.jsonl``; "" where
    it has the one that it was asked for. Lines that are none are passed over."""
    path = entry.run / CHANGES if entry.run is not None else None
    if path is None or not is_plain(path):
        return ""
    with path.open("rb") as file:
        lines = file.read(MAX_JSON).splitlines()
    for line in reversed(lines):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            change = json.loads(line)
            if change["what"] == "prompt" and isinstance(change["new"], str):
                asked = entry.request.prompt if entry.request is not None else ""
                return change["new"][:MAX_STEERED] if change["new"] != asked else ""
    return ""


def trained_for(entry: Entry) -> float:
    """The seconds of the last training of a run, from its ``run.json``, of the host; 0 where it
    does not tell them."""
    path = entry.run / RECORD if entry.run is not None else None
    if path is None or not is_plain(path):
        return 0.0
    with suppress(OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return seconds_of(read_json(path)["trainings"][-1]["seconds"])
    return 0.0


def log_end(path: Path) -> str:
    """The last lines of a log. Of a line that was drawn again and again, the last state."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_END))
        text = file.read(LOG_END).decode("utf-8", errors="replace")
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(lines).strip()


def progress(entry: Entry) -> dict[str, Any]:
    """How far the process of a run is: ``{"stage", "step", "of"}``."""
    run = entry.run
    if run is None:
        return {"stage": "starting", "step": 0, "of": 0}
    with suppress(OSError, ValueError, KeyError, IndexError):
        of, views = _lengths(str(run / PARSED), (run / PARSED).stat().st_mtime_ns)
        if next(run.glob(f"save/it{of}-test.mp4"), None):
            return {"stage": "exporting", "step": 0, "of": 0}
        if (frames := run / "save" / f"it{of}-test").is_dir():
            drawn = sum(1 for _ in frames.glob("*.png"))
            return {"stage": "rendering", "step": min(drawn, views), "of": views}
        return {"stage": "training", "step": _last_step(run), "of": of}
    return {"stage": "starting", "step": 0, "of": 0}


_known_lengths: dict[tuple[str, int], tuple[int, int]] = {}


def _lengths(parsed: str, changed: int) -> tuple[int, int]:
    """Steps and test views, of a file that changes only when a run is begun again."""
    if (parsed, changed) not in _known_lengths:
        if len(_known_lengths) > 100:
            _known_lengths.clear()
        try:
            found = config_in(Path(parsed))
            pair = int(found["trainer"]["max_steps"]), int(found["data"]["n_test_views"])
        except Exception:
            raise ValueError from None
        _known_lengths[parsed, changed] = pair
    return _known_lengths[parsed, changed]


def _last_step(run: Path) -> int:
    """The last step in the newest table of losses."""
    tables = [path for path in run.glob("csv_logs/version_*/metrics.csv") if is_plain(path)]
    tables.sort(key=changed)
    if not tables:
        return 0
    with tables[-1].open("rb") as file:
        column = file.readline(8192).decode().strip().split(",").index("step")
        file.seek(max(0, tables[-1].stat().st_size - 4096))
        rows = file.read(4096).decode(errors="replace").split("\n")[:-1]
    steps = [row.split(",")[column] for row in rows[-5:] if row.count(",") >= column]
    return max((int(step) + 1 for step in steps if step.isdecimal()), default=0)
