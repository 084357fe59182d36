"""``evaluate.py``: the runs of a grid that are not done yet, on any number of workers."""

import argparse
import base64
import os
import statistics
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import threestudio
from evaluation.batch import BatchError, Job, Lock, Outcome, carry_out, stoppable
from evaluation.grid import TRUE, Grid, Run, load_grid
from evaluation.machine import BUILD, OBJECTS, ROOT, TABLES, code, commit, not_for_others
from evaluation.on_ray import OnRay
from evaluation.processes import Local
from evaluation.table import Table, begun, key_of
from evaluation.worlds import DEFAULT, WORLDS
from threestudio.utils.config import load_config
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.extensions import load_custom_modules, report_failures
from threestudio.utils.typing import *

QUICK = ROOT / "evaluation/grids/quick.yaml"
WORK = BUILD / "evaluation"
PRELOAD = ("evaluation.preload",)
FIELDS = ("representation", "method", "prompt", "seed")
ALIASES = {"canvas": "representation", "prior": "method"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help shows the options)\n")


MOST = 1024  # runs at a time, and threads of one


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST:
        raise ValueError
    return value


_count.__name__ = f"number from 1 to {MOST}"  # argparse names it in its message


def default_threads(workers: Optional[int]) -> int:
    """Threads of a run where ``--threads`` does not say: OMP_NUM_THREADS, of which the first number
    counts, else this process's cores shared out to the workers; 1 without workers, on Ray."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and 1 <= int(asked) <= MOST:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // workers) if workers else 1


def parse_args(argv, prog: str = "evaluate.py") -> argparse.Namespace:
    parser = _Parser(
        prog=prog,
        description="Compare methods: carry out the runs of a grid that its table lacks, one "
        "process a run. It can be stopped and started again; several can share a table.",
        epilog="python evaluate.py evaluation/grids/shapes.yaml --only representation=2d "
        "method=sds,csd --workers 2 --threads 1",
    )
    add = parser.add_argument
    add("grid", nargs="?", help="YAML of the grid: evaluation/grid.py says what is in it")
    add(
        "--quick",
        action="store_true",
        help="grids/quick.yaml, to evaluation-quick in the build folder",
    )
    only = "representation=, method=, prompt= or seed=; commas separate several (not of prompts)"
    add("--only", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=only)
    add("--workers", type=_count, help="runs at a time (default 1; on Ray: what fits)")
    threads = "CPU threads per run (default: OMP_NUM_THREADS, else cores / workers; on Ray 1)"
    add("--threads", type=_count, help=threads)
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on Ray (2.52.0 or later): one that is started here, which listens on the "
        "loopback interface only and asks for a token, or the cluster at ADDRESS (auto: the one of "
        "this machine)",
    )
    default = f"default {os.path.relpath(TABLES)}, of real objects {os.path.relpath(OBJECTS)}"
    add("--out", type=Path, help=f"folder of the table ({default})")
    add("--retry", action="store_true", help="repeat runs whose row says that they failed")
    add("--dry-run", action="store_true", help="list the runs that are left, and do nothing")
    args = parser.parse_args(argv)
    if args.quick == (args.grid is not None):
        parser.error("give a grid, or --quick")
    args.grid = QUICK if args.quick else Path(args.grid)
    if args.quick and not args.out:
        args.out = BUILD / "evaluation-quick"
    return args


def select(grid: Grid, only: List[str]) -> List[Run]:
    """The runs that match every ``key=value``; several of one key are alternatives."""
    wanted: Dict[str, set] = {}
    for text in only:
        key, equals, value = text.partition("=")
        key = ALIASES.get(key, key)
        if not equals or key not in FIELDS:
            raise UserError(f"--only {text!r}: write {', '.join(f'{k}=...' for k in FIELDS)}")
        there = {str(getattr(run, key)) for run in grid.runs}
        for part in [value] if key == "prompt" else value.split(","):
            if part not in there:
                hint = nearest(part, there) or f": there are {', '.join(sorted(there))}"
                raise UserError(f"--only: the grid {grid.name} has no {key} {part!r}{hint}")
            wanted.setdefault(key, set()).add(part)
    return [run for run in grid.runs if all(str(getattr(run, k)) in v for k, v in wanted.items())]


def check_methods(runs: List[Run]) -> None:
    """Refuse a guidance that is not registered before a process finds out for each run."""
    load_custom_modules(ROOT / "custom")
    report_failures()
    for name, method in {r.guidance_type: r.method for r in runs if r.guidance_type}.items():
        if name not in threestudio.__modules__:
            hint = nearest(name, threestudio.__modules__)
            raise UserError(
                f"method {method}: no guidance is registered as {name!r}{hint}; "
                "--only method=... chooses others"
            )


def check_truth(world: str, runs: List[Run]) -> None:
    """Refuse to judge runs where there is nothing to judge them by."""
    if any(run.judge for run in runs):
        try:
            WORLDS[world].ready()
        except ValueError as error:
            raise UserError(str(error)) from None


def check_prompts(runs: List[Run]) -> None:
    """Refuse a prompt in which a run's model knows no object, before a process finds out."""
    from lods.preflight import check_prompt

    distinct: Dict[tuple, set] = {}  # what a config depends on here -> prompts
    for run in (run for run in runs if run.method != TRUE):
        overrides = [o for o in run.overrides if o.startswith("system.prompt_processor")]
        distinct.setdefault((run.configs, tuple(overrides)), set()).add(run.prompt)
    for (configs, overrides), prompts in distinct.items():
        first = [f"system.prompt_processor.prompt={min(prompts)}", *overrides]
        cfg = load_config(*(str(ROOT / name) for name in configs), cli_args=first)
        for prompt in sorted(prompts):
            cfg.system.prompt_processor.prompt = prompt
            try:
                check_prompt(cfg)
            except ValueError as error:
                raise UserError(str(error)) from None


@dataclass
class Pace:
    """How long runs take, to say how long the others will."""

    seconds: Dict[Tuple[str, ...], List[float]] = field(default_factory=dict)

    def add(self, representation: str, method: str, seconds: float) -> None:
        for key in ((representation, method), (representation,), ()):
            if key or method != TRUE:
                self.seconds.setdefault(key, []).append(seconds)

    def left(self, runs: Iterable[Run], workers: int) -> str:
        """About how long these runs take, in words; "" where nothing is known."""
        total = 0.0
        for run in runs:
            keys = ((run.representation, run.method), (run.representation,), ())
            known = next((self.seconds[k] for k in keys if k in self.seconds), None)
            if known is None:
                return ""
            total += statistics.mean(known)
        minutes = total / workers / 60
        if minutes < 1:
            return "less than a minute left"
        about = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
        return f"about {about} left"


def _summary(row: Dict[str, str]) -> str:
    """What a line of the progress says of a finished run."""
    parts = []
    names = {"object_accuracy": "object", "color_accuracy": "colour", "janus_rate": "front behind"}
    for key, name in names.items():
        if row.get(key):
            parts.append(f"{name} {float(row[key]):.0%}")
    names = {"frechet": "Fréchet", "psnr": "PSNR", "silhouette_iou": "IoU", "iou": "IoU"}
    for key, name in (names | {"clip_score": "CLIP"}).items():
        if row.get(key):
            parts.append(f"{name} {float(row[key]):.3g}")
    return ", ".join(parts)


class Session:
    """The book of the runs of a table: what is due, and what became of it. Prints a line a run."""

    def __init__(self, table: Table, threads: int, retry=False, bad=None):
        self.table, self.threads, self.retry, self.bad = table, threads, retry, bad or {}
        self.code = code()
        self.commit = commit()  # of what a run is forked from, and so of all
        self.pace = Pace()
        self.ok = self.failed = self.elsewhere = 0
        self._begun: Dict[Run, dict] = {}

    def due(self, run: Run) -> bool:
        row = self.table.find(run)
        # one that failed is repeated once, by whichever evaluate.py comes first
        return row is None or (self.retry and row["status"] != "ok" and row == self.bad.get(run))

    def start(self, run: Run) -> Optional[Tuple[Job, Lock]]:
        from evaluation.run import work

        claim = self.table.claim(run)
        if claim is None:
            return None
        if not self.due(run):
            claim.release()
            return None
        # the configs that it will read are of now
        mark = self.commit if code() == self.code else f"{self.commit}-changed"
        self._begun[run] = begun(run, self.threads, mark)
        argument = {"run": asdict(run), "threads": self.threads, "commit": mark}
        return Job(run.title, work, argument=argument, threads=self.threads), claim

    def record(self, run: Run, outcome: Outcome) -> None:
        row = self._begun.pop(run)
        if outcome.error:
            found = {"row": row | {"status": outcome.error}, "curves": [], "sheet": None}
        else:
            found = outcome.value
        self._status = found["row"]
        sheet = found["sheet"] and base64.b64decode(found["sheet"])
        try:
            self.table.record(found["row"], found["curves"], sheet)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.table.path)) from None

    def tell(self, total: int, workers: int, run: Run, outcome, left: List[Run]) -> None:
        if outcome is None:
            self.elsewhere += 1
            return
        row = self._status
        if row["status"] == "ok":
            self.ok += 1
            self.pace.add(run.representation, run.method, outcome.seconds)
            text = f"{_summary(row)}; {outcome.seconds:.0f} s"
        else:
            self.failed += 1
            log = WORK / "logs" / run.grid / f"{run.slug}-{run.digest}.txt"
            text = f"FAILED: {row['status']}"
            with suppress(OSError):  # the row is in the table
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(outcome.log, encoding="utf-8", errors="replace")
                text += f"; see {log}"
        until = self.pace.left(left, min(workers, len(left))) if left else "done"
        print(f"[{total - len(left)}/{total}] {run.title}: {text}; {until}", flush=True)


def main(argv=None, prog: str = "evaluate.py") -> int:
    """Returns the exit status: 1 if a chosen run has failed or, left to another evaluate.py, is not
    done, 130 after Ctrl-C, SIGTERM and the like. Raises :class:`UserError` for a mistake."""
    args = parse_args(argv, prog)
    grid = load_grid(args.grid)
    args.out = args.out or (TABLES if grid.world == DEFAULT else OBJECTS)
    chosen = select(grid, args.only)
    # read before it is made: a dry run leaves no folder
    table = None
    if args.out.exists() or not args.dry_run:
        table = Table(args.out, grid.tuning, grid.world, grid.sheets)
    index = table.index() if table else {}
    rows = [index.get(key_of(run)) for run in chosen]
    bad = {run: row for run, row in zip(chosen, rows) if row and row["status"] != "ok"}
    runs = [run for run, row in zip(chosen, rows) if row is None]
    print(
        f"{grid.name}: {len(chosen)} runs, {len(chosen) - len(bad) - len(runs)} done, "
        f"{len(bad)} failed{' (--retry repeats them)' if bad and not args.retry else ''}, "
        f"{len(runs)} left",
        flush=True,
    )
    if args.retry:
        runs = [run for run, row in zip(chosen, rows) if row is None or run in bad]
    if args.dry_run:
        try:
            print("\n".join(run.title for run in runs), flush=True)
        except BrokenPipeError:  # head has seen enough; what is flushed at the end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    if not runs:
        return 1 if bad else 0
    check_truth(grid.world, runs)
    check_methods(runs)
    check_prompts(runs)
    on_ray = args.ray is not None
    workers = args.workers or (None if on_ray else 1)
    threads = args.threads or default_threads(None if on_ray else workers)
    try:
        if on_ray:
            backend = OnRay(args.ray, threads, grid.gpus, workers, ROOT, not_for_others())
        else:
            backend = Local(workers, PRELOAD, WORK)
    except BatchError as error:
        raise UserError(str(error)) from None
    session = Session(table, threads, args.retry, bad)
    for row in index.values():  # of earlier sessions
        if row["seconds"]:
            session.pace.add(row["canvas"], row["prior"], float(row["seconds"]))
    where = f"{'on Ray, ' if on_ray else ''}{backend.slots} at a time"
    print(f"{where}, {threads} thread{'s' * (threads > 1)} each, to {table.path}", flush=True)
    try:
        with stoppable(), closing(backend):
            tell = partial(session.tell, len(runs), backend.slots)
            carry_out(runs, backend, session, tell)
    except BatchError as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is left", flush=True)
        return 130
    beside = f", {session.elsewhere} left to another evaluate.py" if session.elsewhere else ""
    print(f"{session.ok} ok, {session.failed} failed{beside}: {table.path}", flush=True)
    if not grid.tuning:
        report = "python -m evaluation.report" if prog == "evaluate.py" else f"{prog} report"
        print(f"a report: {report} --folder {args.out}", flush=True)
    index = table.index()
    rows = [index.get(key_of(run)) for run in chosen]
    return 0 if all(row and row["status"] == "ok" for row in rows) else 1
