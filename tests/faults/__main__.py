"""``python -m tests.faults [PART ...] [--count N | --quick] [--seed N]``: prints a table; the exit
status is 1 if anything failed. Needs no GPU; mounts a small disk where that is allowed."""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"  # children are forked: no thread may run before
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

from tests.runs import ROOT  # noqa: E402

sys.path.insert(0, str(ROOT))

from tests.faults import (  # noqa: E402
    caches,
    checkpoints,
    disk,
    inputs,
    kills,
    pairs,
    signals,
    strangers,
)
from tests.faults.children import Table  # noqa: E402
from tests.signals import hear_signals  # noqa: E402
from tests.tiny_models import make_tiny_sd  # noqa: E402
from threestudio.utils.extensions import load_extension  # noqa: E402

PARTS = (
    *("kills", "disk", "checkpoints", "prompts", "ply"),
    *("pairs", "signals", "strangers", "caches"),
)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--only", default="", help="the same, with commas between them")
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    parser.add_argument("--count", type=int, help="trials of each kind of fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    args = parser.parse_args(argv)
    chosen = [*args.parts, *filter(None, args.only.split(","))] or PARTS
    if not set(chosen) <= set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")

    hear_signals()

    def times(n: int) -> int:
        return args.count or (max(n // 10, 3) if args.quick else n)

    load_extension(ROOT / "custom" / "threestudio-lods")
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        model = make_tiny_sd(folder / "model")
        table = Table()
        if "kills" in chosen:
            trials = kills.kills(times(50), model, folder / "kills", args.seed)
            table.row("killed at a random moment, resumed", trials)
            cold = kills.cold_kills(times(6), model, folder / "kills", args.seed)
            table.row("killed in a process of its own, resumed", cold)
        if "disk" in chosen:
            for name, trials in disk.rows(times(24), model, folder / "disk"):
                table.row(name, trials)
        if "checkpoints" in chosen:
            for name, trials in checkpoints.rows(times(200), model, folder / "c", args.seed):
                table.row(name, trials)
        if "prompts" in chosen:
            for name, trials in inputs.prompt_rows(times(300), model, folder / "p", args.seed):
                table.row(name, trials)
        if "ply" in chosen:
            for name, trials in inputs.ply_rows(times(300), model, folder / "y", args.seed):
                table.row(name, trials)
        if "caches" in chosen:
            for name, trials in caches.rows(times(50), model, folder / "k", args.seed):
                table.row(name, trials)
        for part, name, n, trials in (
            ("pairs", "two runs that start at once", 50, pairs.pairs),
            ("signals", "signals and lost terminals, in all phases", 40, signals.signals),
            ("strangers", "checkpoints with paths of others", 100, strangers.strangers),
        ):
            if part in chosen:
                table.row(name, trials(times(n), folder / part, args.seed))
        print("failed" if table.failed else "all well")
        return int(table.failed)
    finally:
        if args.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
