"""Which run is next, and the processes of runs and exports."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lods.commands.job import Request
from lods.commands.make import threads_of
from lods.studio import choices, processes
from lods.studio.meshes import Meshes
from lods.studio.progress import log_end
from lods.studio.records import LOG, in_use, plain_file
from lods.studio.shelf import WAITING, Entry, Shelf

PATIENCE = 30.0  # seconds that a run which was cancelled has to save what it has
EXPORT_LOG = "export.log"
MAX_EXPORTS = 2  # at a time
OVER = ("stopped", "failed", "interrupted")  # states that a run can go on from
# what is over by itself, or once there is room again
SHORTAGES = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
Started = subprocess.Popen[bytes]


class Refused(ValueError):
    """What cannot be done with a run as it stands; its text is one line."""


class Queue:
    """Starts the runs of a shelf in their turn, ``at_once`` at a time, and exports beside them.

    Everything that must survive is in the folders: a run that is under way when a server ends goes
    on, and the next server finds it. Methods may be called from any thread. ``program``: what is
    started in the folder of a run, with the number of the attempt after it.
    """

    def __init__(
        self,
        shelf: Shelf,
        at_once: int = 1,
        program: tuple[str, ...] = (sys.executable, "-P", "-m", "lods.studio.work"),
        patience: float = PATIENCE,
    ):
        self.shelf, self.at_once, self.patience = shelf, at_once, patience
        self.meshes = Meshes(shelf.root)
        self._program = program
        self._lock = threading.RLock()
        self._children: dict[str, Started] = {}  # of this server, by the name of the run
        self._asked: dict[str, float] = {}  # when a run was asked to stop
        self._stopping: dict[str, float] = {}  # since when one is seen that others have asked
        self._exports: dict[tuple[str, str], Started] = {}

    # --- what the page asks for -------------------------------------------------------------------

    def add(self, request: Request, quality: str) -> str:
        """Put a run into the queue; returns its name."""
        with self._lock:
            name = self.shelf.create(request, quality)
        self._tick_now()
        return name

    def keep_mesh(self, title: str, content: bytes) -> str:
        """Store a mesh that was sent; returns the name by which a form asks for it. Raises
        ``ValueError``, one line, for what is none."""
        with self._lock:
            entries = [entry for entry in self.shelf.entries() if entry.request is not None]
        used = {self.meshes.name_of(entry.request) for entry in entries if entry.request}
        return self.meshes.keep(title, content, used)

    def cancel(self, name: str) -> None:
        """Take a run out of the queue, or ask the one under way to save what it has and stop."""
        with self._lock:
            entry = self._own(name)
            if entry.state not in ("queued", "running"):
                raise Refused(f"{name} is {entry.state}: there is nothing to cancel")
            self.shelf.write(entry, replace(_wish(entry), wish="stop"))
            self._press(entry, now=True)

    def resume(self, name: str) -> None:
        """Put a run that has been stopped, killed or has failed at the end of the queue again."""
        with self._lock:
            entry = self._own(name)
            if entry.state not in OVER:
                raise Refused(f"{name} is {entry.state}: it cannot be gone on with")
            last = max((_wish(e).turn for e in self.shelf.entries() if e.wish), default=0.0)
            self._again(entry, max(time.time(), last + 1e-3))  # also if the clock was set back
        self._tick_now()

    def remove(self, name: str) -> None:
        """Delete the folder of a run of the studio that is not under way."""
        with self._lock:
            entry = self._own(name)
            begins = entry.state == "queued" and name in self._children
            if begins or (entry.is_alive and entry.state != "done"):
                raise Refused(f"{name} is running: cancel it first")
            if any(
                run == name and child.poll() is None for (run, _), child in self._exports.items()
            ):
                raise Refused(f"a file of {name} is being made: wait for it")
            if _stays_in_use(entry.folder):
                raise Refused(f"another program is at work in the folder of {name}: end it first")
            self.shelf.remove(entry)

    def _own(self, name: str) -> Entry:
        entry = self.shelf.find(name)
        if entry is None:
            raise Refused("there is no such run")
        if entry.kind != "studio":
            raise Refused(f"{name} was not made by the studio: use the command lods for it")
        return entry

    def _again(self, entry: Entry, turn: float) -> None:
        wish = _wish(entry)
        again = replace(wish, wish="run", attempt=wish.attempt + 1, turn=turn, error="")
        self.shelf.write(entry, again)

    # --- runs -------------------------------------------------------------------------------------

    def recover(self) -> None:
        """At the start of a server: what was under way and has been killed since goes on, before
        what is waiting."""
        with self._lock:
            self.shelf.sweep()
            for entry in self.shelf.entries():
                if entry.state == "interrupted":
                    self._again(entry, _wish(entry).turn)

    def tick(self) -> None:
        """Look after the processes, and start what is due. Called again and again."""
        with self._lock:
            self._reap()
            entries = self.shelf.entries()
            active = [e for e in entries if e.state in ("running", "stopping")]
            active += [e for e in entries if e.name in self._children and e not in active]
            for entry in active:
                if entry.state == "stopping" or (entry.wish and entry.wish.wish == "stop"):
                    self._press(entry)
            due = [e for e in entries if e.state == "queued" and e not in active]
            for entry in sorted(due, key=lambda e: _wish(e).turn)[: self.at_once - len(active)]:
                self._start(entry)

    def _tick_now(self) -> None:
        with suppress(OSError):  # a shortage: the next tick tries again
            self.tick()

    def waiting(self) -> list[str]:
        """The names of the runs that are queued, the next one first."""
        due = [e for e in self.shelf.entries() if e.state == "queued"]
        return [e.name for e in sorted(due, key=lambda e: _wish(e).turn)]

    def is_starting(self, name: str) -> bool:
        """Whether its process is there, but has not said so yet."""
        return name in self._children

    def _start(self, entry: Entry) -> None:
        assert entry.request is not None, entry.name
        try:
            choices.refuse_foreign(entry.request, self.meshes)
        except choices.Refused as error:
            self._give_up(entry, f"request.json asks for what no form can ask for: {error}")
            return
        try:
            with plain_file(entry.folder / LOG, keep=True) as log:
                child = self._spawn([*self._program, str(_wish(entry).attempt)], entry.folder, log)
        except OSError as error:
            if error.errno in SHORTAGES:
                raise  # the run stays where it is in the queue, and is tried again
            self._give_up(entry, f"it could not be started: {error.strerror or error}")
            return
        self._children[entry.name] = child

    def _reap(self) -> None:
        for child in self._exports.values():
            child.poll()
        for name, child in list(self._children.items()):
            if child.poll() is None:
                continue
            del self._children[name]
            entry = self.shelf.find(name)
            if entry is not None and entry.state == "queued":  # it has not even begun
                self._give_up(entry, _last_line(entry.folder / LOG, child.returncode))
        for times in (self._asked, self._stopping):
            for name in [name for name in times if not self._is_stopping(name)]:
                del times[name]

    def _is_stopping(self, name: str) -> bool:
        entry = self.shelf.find(name)
        return entry is not None and (entry.state == "stopping" or name in self._children)

    def _give_up(self, entry: Entry, error: str) -> None:
        self.shelf.write(entry, replace(_wish(entry), error=error))

    def _press(self, entry: Entry, now: bool = False) -> None:
        """Ask the process of a run to stop, once: asked twice, a training does not save. After
        ``patience`` it is killed. Unless a stop is wished for ``now``, another server has asked
        already, or was killed before it could: then this one asks after a while."""
        if entry.name not in self._asked and not now:
            # by a clock that nobody sets back
            since = self._stopping.setdefault(entry.name, time.monotonic())
            if time.monotonic() - since < self.patience:
                return
        first = entry.name not in self._asked
        asked = self._asked.setdefault(entry.name, time.monotonic())
        late = not first and time.monotonic() - asked > self.patience
        if not first and not late:
            return
        signum = signal.SIGKILL if late else signal.SIGTERM
        child = self._children.get(entry.name)
        if entry.process.get("attempt") == _wish(entry).attempt:
            processes.ask(entry.process["pid"], entry.process["who"], signum)
        elif child is not None and (who := processes.identity(child.pid)):
            processes.ask(child.pid, who, signum)

    def _spawn(self, words: list[str], folder: Path, log: Any) -> Started:
        threads = threads_of(self.at_once)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)  # lods is found as here
        return subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it goes on when this process ends, and has a group of its own
        )

    # --- exports ----------------------------------------------------------------------------------

    def formats(self, entry: Entry) -> dict[str, str]:
        """What can be downloaded of a run: each format with "ready", "making", "possible" or
        "failed: " and why."""
        files, found = self.shelf.files(entry), {}
        for fmt, words in _exporters(entry, files).items():
            child = self._exports.get((entry.name, fmt))
            if child is not None and child.poll() is None:
                found[fmt] = "making"
            elif fmt in files:
                found[fmt] = "ready"
            elif child is not None and child.returncode:
                found[fmt] = f"failed: {_last_line(entry.folder / EXPORT_LOG, 1)}"
            elif words:
                found[fmt] = "possible"
        return found

    def export(self, name: str, fmt: str) -> None:
        """Begin to make a file of the object, unless it is there."""
        with self._lock:
            entry = self.shelf.find(name)
            if entry is None:
                raise Refused("there is no such run")
            state = self.formats(entry).get(fmt)
            if state in ("ready", "making"):
                return
            words = _exporters(entry, self.shelf.files(entry)).get(fmt)
            if not words:
                raise Refused(f"{name} cannot be had as {fmt[:20]}")
            if sum(child.poll() is None for child in self._exports.values()) >= MAX_EXPORTS:
                raise Refused(f"{MAX_EXPORTS} exports are under way: wait for one of them")
            with plain_file(entry.folder / EXPORT_LOG) as log:
                self._exports[name, fmt] = self._spawn(words, entry.folder, log)


def _wish(entry: Entry) -> Any:
    assert entry.wish is not None, entry.name
    return entry.wish


def _stays_in_use(folder: Path) -> bool:
    """Whether a program is at work in it, and not one that is just ending."""
    end = time.monotonic() + 1.0
    while in_use(folder):
        if time.monotonic() > end:
            return True
        time.sleep(0.02)
    return False


def _exporters(entry: Entry, files: dict[str, Path]) -> dict[str, list[str]]:
    """The commands that make what can be had of a run; of what only its end makes, none."""
    python = [sys.executable, "-P", "-m"]
    found: dict[str, list[str]] = {"ply": [], "splat": [], "glb": [], "video": []}
    run = entry.trained
    if run is not None and entry.state not in WAITING:
        out = ["--out", str(entry.folder)] if entry.kind != "train" else []
        for fmt in ("ply", "glb"):
            found[fmt] = [*python, "lods", "export", str(run), "--format", fmt, *out]
        found["video"] = [*python, "lods.studio.finish"] if entry.kind == "studio" else []
    on = "" if entry.request is None else entry.request.on
    if on == "mesh":
        del found["ply"]
    if on != "gaussians":
        del found["splat"]
    elif "ply" in files:
        target = files["ply"].with_suffix(".splat")
        found["splat"] = [*python, "lods.gaussians.splat_file", str(files["ply"]), str(target)]
    return found


def _last_line(log: Path, status: int) -> str:
    """Why a process has ended, as the end of its log says it."""
    try:
        lines = [line for line in log_end(log).splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line.partition("error:")[2].strip() for line in lines if "error:" in line]
    return (errors or lines or [f"its process ended with status {status}"])[-1][:300]
