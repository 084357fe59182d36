"""``evaluate.py``: the runs of a grid that are not done yet, on any number of workers."""

import argparse
import base64
import os
import signal
import statistics
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import threestudio
from evaluation.grid import TRUE, Grid, Run, load_grid
from evaluation.machine import ROOT, code, commit
from evaluation.on_ray import OnRay
from evaluation.table import Table, key_of
from evaluation.workers import WORK, Local, make_job
from threestudio.run.signals import stop_signals
from threestudio.utils.config import load_config
from threestudio.utils.errors import UserError, nearest
from threestudio.utils.extensions import load_custom_modules, report_failures
from threestudio.utils.files import FULL
from threestudio.utils.typing import *

QUICK = ROOT / "evaluation/grids/quick.yaml"
FIELDS = ("canvas", "prior", "prompt", "seed")


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


def parse_args(argv) -> argparse.Namespace:
    parser = _Parser(
        prog="evaluate.py",
        description="Compare priors: carry out the runs of a grid that its table lacks, one "
        "process a run. It can be stopped and started again; several can share a table.",
        epilog="python evaluate.py evaluation/grids/pocket.yaml --only canvas=2d prior=sds,csd "
        "--workers 2 --threads 1",
    )
    add = parser.add_argument
    add("grid", nargs="?", help="YAML of the grid: evaluation/grid.py says what is in it")
    add("--quick", action="store_true", help="grids/quick.yaml, to build/evaluation-quick")
    only = "canvas=, prior=, prompt= or seed=, of which commas separate several (not of prompts)"
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
    add("--out", type=Path, help="folder of the table (default docs/evaluation)")
    add("--retry", action="store_true", help="repeat runs whose row says that they failed")
    add("--dry-run", action="store_true", help="list the runs that are left, and do nothing")
    args = parser.parse_args(argv)
    if args.quick == (args.grid is not None):
        parser.error("give a grid, or --quick")
    args.grid = QUICK if args.quick else Path(args.grid)
    args.out = args.out or ROOT / ("build/evaluation-quick" if args.quick else "docs/evaluation")
    return args


def select(grid: Grid, only: List[str]) -> List[Run]:
    """The runs that match every ``key=value``; several of one key are alternatives."""
    wanted: Dict[str, set] = {}
    for text in only:
        key, equals, value = text.partition("=")
        if not equals or key not in FIELDS:
            raise UserError(f"--only {text!r}: write {', '.join(f'{k}=...' for k in FIELDS)}")
        there = {str(getattr(run, key)) for run in grid.runs}
        for part in [value] if key == "prompt" else value.split(","):
            if part not in there:
                hint = nearest(part, there) or f": there are {', '.join(sorted(there))}"
                raise UserError(f"--only: the grid {grid.name} has no {key} {part!r}{hint}")
            wanted.setdefault(key, set()).add(part)
    return [run for run in grid.runs if all(str(getattr(run, k)) in v for k, v in wanted.items())]


def check_priors(runs: List[Run]) -> None:
    """Refuse a guidance that is not registered before a process finds out for each run."""
    load_custom_modules(ROOT / "custom")
    report_failures()
    for name, prior in {run.guidance_type: run.prior for run in runs if run.guidance_type}.items():
        if name not in threestudio.__modules__:
            hint = nearest(name, threestudio.__modules__)
            raise UserError(
                f"prior {prior}: no guidance is registered as {name!r}{hint}; "
                "--only prior=... chooses others"
            )


def check_prompts(runs: List[Run]) -> None:
    """Refuse a prompt in which a run's model knows no object, before a process finds out."""
    from lods.preflight import check_prompt

    distinct: Dict[tuple, set] = {}  # what a config depends on here -> prompts
    for run in (run for run in runs if run.prior != TRUE):
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

    def add(self, canvas: str, prior: str, seconds: float) -> None:
        for key in ((canvas, prior), (canvas,), ()):
            if key or prior != TRUE:
                self.seconds.setdefault(key, []).append(seconds)

    def left(self, runs: Iterable[Run], workers: int) -> str:
        """About how long these runs take, in words; "" where nothing is known."""
        total = 0.0
        for run in runs:
            keys = ((run.canvas, run.prior), (run.canvas,), ())
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
        if row[key]:
            parts.append(f"{name} {float(row[key]):.0%}")
    for key, name in {"frechet": "Frechet", "silhouette_iou": "IoU", "clip_score": "CLIP"}.items():
        if row[key]:
            parts.append(f"{name} {float(row[key]):.3g}")
    return ", ".join(parts)


def _stopped(what, error: OSError) -> UserError:
    remedy = "make room; the" if error.errno in FULL else "the"
    return UserError(
        f"{what} cannot be written ({error.strerror or error}): {remedy} same command goes on with "
        "what is left"
    )


class Session:
    """Hands runs to a backend and records what comes back."""

    def __init__(self, table: Table, backend, threads: int, retry=False, bad=None):
        self.table, self.backend = table, backend
        self.threads, self.retry, self.bad = threads, retry, bad or {}
        self.code = code()
        self.commit = commit()  # of what a run is forked from, and so of all
        self.pace = Pace()
        self.ok = self.failed = self.elsewhere = 0

    def due(self, run: Run) -> bool:
        row = self.table.find(run)
        # one that failed is repeated once, by whichever evaluate.py comes first
        return row is None or (self.retry and row["status"] != "ok" and row == self.bad.get(run))

    def carry_out(self, runs: List[Run]) -> None:
        """Do the runs. Raises :class:`UserError` where nothing can be written any more: what was in
        progress is lost then, and what is done is in the table."""
        total, waiting, going = len(runs), deque(runs), {}
        try:
            while waiting or going:
                while waiting and len(going) < self.backend.slots:
                    self._start(waiting.popleft(), going)
                for handle, result in self.backend.wait() if going else ():
                    run, claim = going.pop(handle)
                    self._record(run, result)
                    claim.release()
                    if result["row"]["status"] == "ok":
                        self.pace.add(run.canvas, run.prior, result["wall"])
                    left = [*waiting, *(r for r, _ in going.values())]
                    self._tell(run, result, total, left)
        except OSError as error:
            raise _stopped(error.filename or "the next file", error) from None
        finally:
            for _, claim in going.values():
                claim.release()

    def _start(self, run: Run, going: dict) -> None:
        """Submit a run, unless another evaluate.py is at it, or has done it meanwhile."""
        claim = self.table.claim(run)
        if claim is None or not self.due(run):
            self.elsewhere += 1
            if claim is not None:
                claim.release()
            return
        # the configs that it will read are of now
        mark = self.commit if code() == self.code else f"{self.commit}-changed"
        try:
            handle = self.backend.submit(make_job(run, self.threads, mark))
        except BaseException:
            claim.release()
            raise
        going[handle] = run, claim

    def _record(self, run: Run, result: dict) -> None:
        sheet = result["sheet"] and base64.b64decode(result["sheet"])
        try:
            self.table.record(result["row"], result["curves"], sheet)
        except OSError as error:
            raise _stopped(self.table.path, error) from None

    def _tell(self, run: Run, result: dict, total: int, left: List[Run]) -> None:
        if result["row"]["status"] == "ok":
            self.ok += 1
            text = f"{_summary(result['row'])}; {result['wall']:.0f} s"
        else:
            self.failed += 1
            log = WORK / "logs" / run.grid / f"{run.slug}-{run.digest}.txt"
            text = f"FAILED: {result['row']['status']}"
            with suppress(OSError):  # the row is in the table
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(result["log"], encoding="utf-8", errors="replace")
                text += f"; see {log}"
        done = self.ok + self.failed + self.elsewhere
        until = self.pace.left(left, min(self.backend.slots, max(len(left), 1))) if left else "done"
        print(f"[{done}/{total}] {run.title}: {text}; {until}", flush=True)


def _stop(signum, frame):
    raise KeyboardInterrupt


def main(argv=None) -> int:
    """Returns the exit status: 1 if a chosen run has failed or, left to another evaluate.py, is not
    done, 130 after Ctrl-C, SIGTERM and the like. Raises :class:`UserError` for a mistake."""
    args = parse_args(argv)
    grid = load_grid(args.grid)
    chosen = select(grid, args.only)
    # read before it is made: a dry run leaves no folder
    table = Table(args.out, grid.tuning) if args.out.exists() or not args.dry_run else None
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
    check_priors(runs)
    check_prompts(runs)
    on_ray = args.ray is not None
    workers = args.workers or (None if on_ray else 1)
    threads = args.threads or default_threads(None if on_ray else workers)
    backend = OnRay(args.ray, threads, grid.gpus, workers) if on_ray else Local(workers)
    before = {n: signal.signal(n, _stop) for n in stop_signals() if n != signal.SIGINT}
    session = Session(table, backend, threads, args.retry, bad)
    for row in index.values():  # of earlier sessions
        if row["seconds"]:
            session.pace.add(row["canvas"], row["prior"], float(row["seconds"]))
    where = f"{'on Ray, ' if on_ray else ''}{backend.slots} at a time"
    print(f"{where}, {threads} thread{'s' * (threads > 1)} each, to {table.path}", flush=True)
    try:
        session.carry_out(runs)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is left", flush=True)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        backend.close()
    beside = f", {session.elsewhere} left to another evaluate.py" if session.elsewhere else ""
    print(f"{session.ok} ok, {session.failed} failed{beside}: {table.path}", flush=True)
    if not grid.tuning:
        print(f"a report: python -m evaluation.report --folder {args.out}", flush=True)
    index = table.index()
    rows = [index.get(key_of(run)) for run in chosen]
    return 0 if all(row and row["status"] == "ok" for row in rows) else 1
