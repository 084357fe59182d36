"""What the speed benchmarks share: the clock, what they ran on, and their tables."""

import csv
import math
import sys
import time
from pathlib import Path

import numba
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.machine import commit, peak_mib  # noqa: E402, F401
from threestudio.run.machine import cpu_name  # noqa: E402


def fastest(function, budget: float, least: int = 3) -> float:
    """Minimum seconds of a call over repeats, for about ``budget`` seconds."""
    best, start, calls = math.inf, time.perf_counter(), 0
    while calls < least or time.perf_counter() - start < budget:
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
        calls += 1
        if time.perf_counter() - start > 8 * budget:
            break
    return best


def machine() -> dict:
    """The columns that say what a table was measured on."""
    return {
        "device": "cpu",
        "cpu": cpu_name(),
        "threads": numba.get_num_threads(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "commit": commit(),
    }


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def show(row: dict, about: dict) -> None:
    print({k: v for k, v in row.items() if k not in about}, flush=True)
