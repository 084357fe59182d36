"""How long a user waits: from the command to its first line, to a refusal, a step, a picture.

``python benchmarks/startup.py --against PATH`` starts trainings of this checkout and of another one
in turn, Gaussians and a radiance field by ``launch.py`` and Gaussians by ``lods make``, each with
the embedded model, and writes ``benchmarks/results/startup.csv``, one row for each command, kind of
start and checkout, and ``startup_imports.csv``. All times are seconds from the start of the process
until something is seen from outside; each is the median over the rounds. The ``ratio`` columns are
the times of the other checkout over those of the row, from the same alternation.

- ``first_line_s``: the first bytes on standard output or standard error
- ``refusal_s``: the end of a process whose command line has a mistyped option
- ``first_step_s``: the end of the first training step, which a callback notes
- ``first_picture_s``: the time of the first picture file in the run's folder ``save``

*Cold* is a clone that was just made (the state of the working tree, without ``__pycache__``) with
an empty folder of compiled kernels; installed packages keep their compiled bytecode, as pip leaves
it, and the files that the system has in memory stay there. *Warm* is the same clone afterwards.
Another program on the machine changes all times: ``load`` is the average number of running
programs over the minute before a round. Columns that end in ``_cpu_s`` are the seconds of processor
time that the process had used by then (without git and the like, which it starts): where ``load``
is above ``cores``, their ratios, ``_cpu_ratio``, are the result, and the seconds are not.

``startup_imports.csv`` has the seconds that ``python -X importtime`` counts for the packages that
a warm run of one step imports up to its end. With ``--keep FOLDER`` the clones and their caches
stay there for a later call, which can then measure warm starts alone (``--only-start warm``); rows
that a call does not measure stay in the tables.
"""

import argparse
import collections
import csv
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from threestudio.run.machine import cpu_name  # noqa: E402

PROMPT = "a hamburger"


def launch(*configs: str) -> tuple[str, ...]:
    words = f"system.prompt_processor.prompt={PROMPT}", "exp_root_dir={folder}"
    return ("launch.py", "--config", *configs, "--train", *words)


COMMANDS = {  # the words after python; {folder}: that of the run
    "gaussians": launch("lods-gs-embedding", "pocket"),
    "radiance field": launch("lods-ngp-embedding", "pocket-ngp"),
    "lods make": ("-P", "-m", "lods", "make", PROMPT, "--out", "{folder}"),
}
MISTAKE = "system.guidance.guidance_scal=7"
SEEN = ("first_line", "refusal", "first_step", "first_picture")
MEASURES = tuple(f"{what}{unit}" for what in SEEN for unit in ("_s", "_cpu_s"))
PATIENCE = 600.0  # seconds after which a run is given up
CALLBACK = """
import os, time
from pathlib import Path
from pytorch_lightning.callbacks import Callback

class FirstStep(Callback):
    def on_train_batch_end(self, trainer, *rest):
        note = Path(os.environ["FIRST_STEP_NOTE"])
        if not note.exists():
            note.write_text(f"{time.time()} {time.process_time()}")
"""


def git(tree: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(tree), *words], check=True, capture_output=True, text=True
    ).stdout


def commit_of(tree: Path) -> str:
    dirty = git(tree, "status", "--porcelain", "--untracked-files=no").strip()
    return git(tree, "rev-parse", "--short", "HEAD").strip() + ("-dirty" if dirty else "")


def clone(tree: Path, target: Path) -> None:
    """A clone with the changes that are not committed yet."""
    subprocess.run(["git", "clone", "--quiet", str(tree), str(target)], check=True)
    for name in git(tree, "diff", "--name-only", "-z", "HEAD").split("\0"):
        if name and (tree / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, target / name)
        elif name:
            (target / name).unlink(missing_ok=True)


class Checkout:
    """A clone of a tree, with caches of its own."""

    def __init__(self, name: str, tree: Path, folder: Path) -> None:
        self.name, self.root = name, folder / name
        self.here = self.root / "clone"
        self.tree, self.runs = tree, 0
        self.helpers = self.root / "helpers"
        self.helpers.mkdir(parents=True, exist_ok=True)
        (self.helpers / "first_step.py").write_text(CALLBACK)
        if not (self.root / "commit").is_file():
            self.renew()

    @property
    def commit(self) -> str:
        """That of the clone."""
        return (self.root / "commit").read_text()

    def renew(self) -> None:
        """Make everything cold."""
        for path in (self.here, self.root / "cache"):
            shutil.rmtree(path, ignore_errors=True)
        clone(self.tree, self.here)
        (self.root / "commit").write_text(commit_of(self.tree))

    def start(self, command: str, *overrides: str, python: tuple[str, ...] = ()) -> "Run":
        self.runs += 1
        folder = self.root / f"run{self.runs}"
        folder.mkdir()
        env = os.environ | {
            "NUMBA_CACHE_DIR": str(self.root / "cache"),
            "PYTHONPATH": f"{self.helpers}:{self.here / 'custom' / 'threestudio-lods'}",
            "FIRST_STEP_NOTE": str(folder / "first_step"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        words = [word.replace("{folder}", str(folder)) for word in COMMANDS[command]]
        words = [sys.executable, *python, *words, *overrides]
        return Run(words, self.here, env, folder)


class Run:
    """A process, and when it was first heard of."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str], folder: Path) -> None:
        self.folder, self.text = folder, ""
        self.heard = (math.nan, math.nan)  # when, and after how much processor time
        self.begun = time.time()
        self.process = subprocess.Popen(
            words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            if not self.text:
                self.heard = time.time() - self.begun, self.used()
            self.text += data.decode(errors="replace")

    def used(self) -> float:
        """Seconds of processor time so far; NaN of a process that is gone."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return math.nan
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def wait(self) -> tuple[float, float]:
        """Seconds until the process has ended by itself, and of processor time."""
        _, status, usage = os.wait4(self.process.pid, 0)
        ended = time.time()
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.reader.join()
        return ended - self.begun, usage.ru_utime + usage.ru_stime

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()

    def look(self) -> dict[str, float]:
        """Wait for the first step and the first picture."""
        note, found = self.folder / "first_step", {}
        while time.time() - self.begun < PATIENCE and self.process.poll() is None:
            pictures = self.folder.glob("**/save/**/[!.]*.png")  # a hidden one is not whole yet
            pictures = [p for p in pictures if p.is_file()]
            if pictures and "first_picture_s" not in found:
                found["first_picture_cpu_s"] = self.used()
                found["first_picture_s"] = min(p.stat().st_mtime for p in pictures) - self.begun
            if note.exists() and len(words := note.read_text().split()) == 2:
                found["first_step_s"] = float(words[0]) - self.begun
                found["first_step_cpu_s"] = float(words[1])
            if len(found) == 4:
                return found
            time.sleep(0.02)
        self.stop()
        sys.exit(f"no picture was made:\n{self.text[-3000:]}")


def measure(checkout: Checkout, command: str) -> dict[str, float]:
    """One start and one refusal."""
    run = checkout.start(command, "trainer.callbacks=[first_step.FirstStep]")
    try:
        found = run.look()
    finally:
        run.stop()
    found["first_line_s"], found["first_line_cpu_s"] = run.heard
    refused = checkout.start(command, MISTAKE)
    found["refusal_s"], found["refusal_cpu_s"] = refused.wait()
    if refused.process.returncode != 2:
        sys.exit(f"the mistake was not refused:\n{refused.text[-3000:]}")
    for folder in checkout.root.glob("run*"):
        shutil.rmtree(folder)
    return found


def imports(checkout: Checkout) -> dict[str, float]:
    """Seconds of the imports of a short warm run, by package; ``"all"``: their sum."""
    short = ("trainer.max_steps=1", "data.n_test_views=1")
    run = checkout.start("gaussians", *short, python=("-X", "importtime"))
    run.wait()
    if run.process.returncode:
        sys.exit(f"the run failed:\n{run.text[-3000:]}")
    sums: collections.defaultdict[str, float] = collections.defaultdict(float)
    for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +([\w.]+)", run.text):
        for key in ("all", name.split(".")[0]):
            sums[key] += int(own) / 1e6
    return sums


def rows_of(checkouts: list[Checkout], rounds: range, commands: list[str]) -> list[dict]:
    """The rows of the table; round 0 is the cold one."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = collections.defaultdict(list)
    loads: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for command in commands:
        for number in rounds:
            kind = "warm" if number else "cold"
            # in turn, and each first as often as the other
            for checkout in checkouts[:: 1 if number % 2 else -1]:
                if kind == "cold":
                    checkout.renew()
                loads[command, kind].append(os.getloadavg()[0])
                found[command, kind, checkout.name].append(measure(checkout, command))
                print(command, kind, checkout.name, found[command, kind, checkout.name][-1])
    rows = []
    for (command, kind, name), runs in found.items():
        checkout = next(c for c in checkouts if c.name == name)
        row = {"command": command, "start": kind, "checkout": name, "runs": len(runs)}
        row |= {m: round(statistics.median(r[m] for r in runs), 2) for m in MEASURES}
        other = found.get((command, kind, "other"), [])
        for m in MEASURES:
            theirs = statistics.median(r[m] for r in other) if other else math.nan
            row[m.removesuffix("_s") + "_ratio"] = round(theirs / row[m], 2) if other else ""
        row["load"] = round(statistics.median(loads[command, kind]), 1)
        rows.append(row | about(checkout))
    return rows


def about(checkout: Checkout) -> dict:
    from importlib.metadata import version

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "torch": version("torch"),
        "pytorch_lightning": version("pytorch-lightning"),
        "commit": checkout.commit,
    }


def write(path: Path, rows: list[dict], key: tuple[str, ...]) -> None:
    """Write a table, with the rows of the file there that have another `key`."""
    measured, kept = [[row[k] for k in key] for row in rows], []
    if path.is_file():
        with path.open(newline="") as file:
            found = [row for row in csv.DictReader(file) if row.keys() == rows[0].keys()]
        kept = [row for row in found if [row[k] for k in key] not in measured]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*kept, *rows])


def write_imports(path: Path, checkouts: list[Checkout]) -> None:
    sums = {checkout.name: imports(checkout) for checkout in checkouts}
    most = {n: max(s[n] for s in sums.values()) for n in set().union(*sums.values())}
    names = sorted((n for n in most if most[n] >= 0.05), key=lambda n: -most[n])
    rows = [{"package": n, **{f"{c}_s": round(s[n], 3) for c, s in sums.items()}} for n in names]
    for row in rows:
        row |= {f"{c.name}_commit": c.commit for c in checkouts}
    path.unlink(missing_ok=True)
    write(path, rows, ("package",))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the start of a training.")
    add = parser.add_argument
    add("--against", type=Path, help="another checkout, to compare with")
    add("--rounds", type=int, default=3, help="warm starts of each (3)")
    add("--only-command", choices=list(COMMANDS), help="one of the commands")
    add("--only-start", choices=["cold", "warm", "imports"], help="one kind of start")
    add("--keep", type=Path, help="a folder that keeps the clones and caches for a later call")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    numbers = {"cold": range(1), "warm": range(1, args.rounds + 1), "imports": range(0)}
    rounds = numbers.get(args.only_start, range(args.rounds + 1))
    commands = [args.only_command] if args.only_command else list(COMMANDS)
    trees = {"this": ROOT} | ({"other": args.against.resolve()} if args.against else {})
    with tempfile.TemporaryDirectory() as folder:
        where = args.keep.resolve() if args.keep else Path(folder)
        checkouts = [Checkout(name, tree, where) for name, tree in trees.items()]
        rows = rows_of(checkouts, rounds, commands)
        if rows:
            write(args.out / "startup.csv", rows, ("command", "start", "checkout"))
        if args.only_start in (None, "imports"):
            write_imports(args.out / "startup_imports.csv", checkouts)


if __name__ == "__main__":
    main()
