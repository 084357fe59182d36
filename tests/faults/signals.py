"""Signals, vanished readers and closed terminals in every phase of a run: it saves what it has and
says how it goes on, or goes on as if nothing had happened; nothing is lost."""

import fcntl
import os
import shlex
import signal
import termios
from collections.abc import Iterator
from pathlib import Path

from tests.faults.children import Child, ends_well
from tests.faults.toys import PHASES, fresh, load_toy, pausing, toy_command, wait_for
from tests.runs import read, same
from threestudio.utils.errors import UserError

STOPS = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")}
OTHERS = ("nohup", "stdout", "stderr", "terminal")
KEYS = ("state_dict", "optimizer_states", "rng_state", "global_step")
LAST = "outputs/toy/p/ckpts/last.ckpt"


class Disturbance:
    """What happens to a child: `before` prepares it, `strike` does it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stops = kind in STOPS or kind == "terminal"
        self.status = 128 + STOPS.get(kind, signal.SIGHUP)
        if kind in ("stdout", "stderr"):
            self.reader, self.writer = os.pipe()
        elif kind == "terminal":
            self.reader, self.writer = os.openpty()

    def before(self) -> None:
        if self.kind == "nohup":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        elif self.kind in ("stdout", "stderr"):
            os.close(self.reader)
            os.dup2(self.writer, 1 if self.kind == "stdout" else 2)
        elif self.kind == "terminal":
            os.close(self.reader)
            os.setsid()
            fcntl.ioctl(self.writer, termios.TIOCSCTTY, 0)
            for number in (0, 1, 2):
                os.dup2(self.writer, number)

    def forked(self) -> None:
        if hasattr(self, "writer"):
            os.close(self.writer)

    def strike(self, pid: int) -> None:
        if self.kind in STOPS or self.kind == "nohup":
            os.kill(pid, STOPS.get(self.kind, signal.SIGHUP))
        else:
            os.close(self.reader)


def _disturbed(kind: str, phase: str, cwd: Path) -> tuple[Child, Disturbance, str]:
    mode, more = "--train", []
    if phase == "export":
        first = Child(toy_command(), cwd / "first.log", cwd)
        if problem := ends_well(first, may_fail=False):
            return first, Disturbance("nohup"), problem
        mode, more = "--export", [f"resume={LAST}"]
    what, mark = Disturbance(kind), cwd / "mark"
    pause = pausing(phase, mark)

    def before() -> None:
        what.before()
        pause()

    child = Child(toy_command(*more, mode=mode), cwd / "run.log", cwd, before)
    what.forked()
    if not wait_for(mark, child):
        child.kill()
        return child, what, f"it did not come so far: {child.output()[-300:]}"
    what.strike(child.pid)
    child.wait(60)
    return child, what, ""


def _stopped(child: Child, what: Disturbance, phase: str, cwd: Path, whole: dict) -> str:
    output = child.output()
    if child.status != what.status:
        return f"status {child.status}, not {what.status}: {output[-300:]}"
    if "Traceback" in output:
        return f"a traceback: {output[-300:]}"
    if phase == "start-up":
        return "something is left behind" if (cwd / "outputs").exists() else ""
    if not (cwd / LAST).exists():
        return "nothing was saved"
    if phase in ("training", "validation"):
        step = read(cwd / LAST)["global_step"]
        if step not in ((2,) if phase == "training" else (2, 3)):
            return f"step {step} was saved"
    command = ["--config", "outputs/toy/p/configs/parsed.yaml", "--train", f"resume={LAST}"]
    argv = ["--extensions", "custom", *command]
    if what.kind != "terminal":  # what it says there nobody reads
        (line,) = [line for line in output.splitlines() if line.startswith("interrupted")] or [""]
        if "python launch.py " not in line:
            return f"no command that continues: {line!r}"
        argv = shlex.split(line.split("python launch.py ", 1)[1])
    again = Child(argv, cwd / "again.log", cwd)
    if problem := ends_well(again, may_fail=False):
        return f"the command that continues: {problem}"
    return _finished(cwd, whole)


def _finished(cwd: Path, whole: dict) -> str:
    content = read(cwd / LAST)
    try:
        for key in KEYS:
            same(content[key], whole[key], key)
    except AssertionError as error:
        return f"not the undisturbed run's {error}"
    if not (cwd / "outputs/toy/p/save/it4-test.json").exists():
        return "it was not tested"
    left = [p.name for p in cwd.rglob(".*") if p.is_file()]
    return f"left behind: {left}" if left else ""


def _case(kind: str, phase: str, cwd: Path, whole: dict) -> str:
    child, what, problem = _disturbed(kind, phase, cwd)
    if problem:
        return problem
    if what.stops:
        return _stopped(child, what, phase, cwd, whole)
    return ends_well(child, may_fail=False) or _finished(cwd, whole)


def signals(n: int, folder: Path, _seed: int) -> Iterator[str]:
    """`n` cases: each kind in each phase in turn, 40 in all."""
    load_toy()
    cwd = fresh(folder / "alone")
    child = Child(toy_command(), cwd / "log", cwd)
    if problem := ends_well(child, may_fail=False):
        raise UserError(f"a run alone: {problem}")
    whole = read(cwd / LAST)
    # an order in which a few cases are of many kinds and phases
    cases = [(k, PHASES[(i + j) % 5]) for j in range(5) for i, k in enumerate((*STOPS, *OTHERS))]
    for kind, phase in (cases * (n // len(cases) + 1))[:n]:
        problem = _case(kind, phase, fresh(folder / "case"), whole)
        yield f"{kind} in {phase}: {problem}" if problem else ""
