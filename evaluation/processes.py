"""Processes of this machine for :mod:`evaluation.batch`, and what happens inside them."""

import contextlib
import errno
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.batch import FULL, Job, Outcome

LOG = "log.txt"
LOG_END = 20_000  # characters of a job's output that its outcome has
DISK_FULL = 74  # the exit status of a job that found the disk full (EX_IOERR of sysexits.h)
GRACE = 20.0  # seconds that a job with a folder has to save what it has, when it is stopped


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)  # functions are found as here
    return dict.fromkeys(names, str(threads)) | {"PYTHONPATH": path}


def ended_with(status: int, last: str) -> str:
    """Why a job failed whose process left no result: by its exit status and its last line."""
    if status == -signal.SIGKILL:
        return "the process was killed (signal 9), as is done when memory runs out"
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"the process ended with {how}: {last[:200] or 'it said nothing'}"


class Process:
    """A job in a process of its own, which ends when this one does. ``scratch`` is where temporary
    folders go."""

    def __init__(self, task: dict[str, Any], device: str | None = None, scratch=None):
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        self.task, self._start = task, time.monotonic()
        self.spool = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))  # of no use afterwards
        self.folder = Path(task["folder"] or self.spool)
        self.log = self.folder / LOG
        self._begin(device)

    def _begin(self, device: str | None) -> None:
        env = os.environ | _environment(self.task["threads"])
        if device is not None:
            env["CUDA_VISIBLE_DEVICES"] = device
        with self.log.open("a") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(self.spool)],
                env=env,
                stdin=subprocess.PIPE,  # stays open: its end is the process's end
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for the process that started the jobs
            )
        self.pid = self._popen.pid
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(json.dumps(self.task) + "\n")
            self._popen.stdin.flush()

    def status(self) -> int | None:
        """The exit status, -N after signal N; None while it runs."""
        return self._popen.poll()

    def _release(self) -> None:
        """Wait for a process that was killed or has ended, and let go of it."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        self._popen.wait()

    def outcome(self) -> Outcome | None:
        """What came of it; None while it runs. Raises ``OSError`` if it found the disk full."""
        status = self.status()
        if status is None:
            return None
        log = self.log.read_text("utf-8", errors="replace")[-LOG_END:] if self.log.exists() else ""
        seconds = time.monotonic() - self._start
        found: dict[str, Any] = {"status": status}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.spool / "result.json").read_text())
        error = found.get("error", "")
        if "status" in found:
            last = next((line for line in log.splitlines()[::-1] if line.strip()), "")
            error = ended_with(found["status"], last)
        self.end()
        if status == DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder.parent))
        return Outcome(found.get("value"), error, log, seconds)

    def ask(self) -> None:
        """Ask it, and what it has started, to stop."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)

    def end(self) -> None:
        """Kill it and what it has started, and remove its temporary files."""
        if self.status() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # it may not have a group of its own yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._release()
        shutil.rmtree(self.spool, ignore_errors=True)


class Forked(Process):
    """The same, as a fork of a server that has imported what jobs need: imports can be ten seconds
    of each. The server has the threads of the first job, and ends when this process does. Not where
    CUDA is, which does not live through a fork."""

    preload: Sequence[str] = ()

    def _begin(self, device: str | None) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload([*self.preload])
        before = {name: os.environ.get(name) for name in _environment(1)}
        os.environ.update(_environment(self.task["threads"]))  # for the server, started just now
        try:
            self._process = forks.Process(target=_forked, args=(self.task, self.spool, self.log))
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.pid = self._process.pid

    def status(self) -> int | None:
        return self._process.exitcode

    def _release(self) -> None:
        self._process.join()


class Local:
    """Processes of this machine, one a slot; several visible GPUs are shared out to the slots."""

    def __init__(self, workers: int, preload: Sequence[str] = (), scratch: Path | None = None):
        import torch  # knows the GPUs

        self.slots, self._scratch = workers, scratch
        every = ",".join(map(str, range(max(1, torch.cuda.device_count()))))
        self._devices = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        self._going: dict[int, Process] = {}  # by slot
        self._kind = Forked if preload and not torch.cuda.is_available() else Process
        Forked.preload = preload

    def submit(self, job: Job) -> Process:
        slot = next(i for i in range(self.slots) if i not in self._going)
        kind = self._kind if callable(job.work) else Process
        device = self._devices[slot % len(self._devices)]
        self._going[slot] = kind(job.task(), device, self._scratch)
        return self._going[slot]

    def wait(self) -> list[tuple[Process, Outcome]]:
        done: list[tuple[Process, Outcome]] = []
        while self._going and not done:
            for slot, process in list(self._going.items()):
                outcome = process.outcome()
                if outcome is not None:
                    del self._going[slot]
                    done.append((process, outcome))
            if not done:
                time.sleep(0.1)
        return done

    def close(self) -> None:
        """Stop what is going on: at once, or where a folder is kept after the time to save it."""
        kept = [process for process in self._going.values() if process.task["folder"]]
        for process in kept:
            process.ask()
        until = time.monotonic() + GRACE
        while any(p.status() is None for p in kept) and time.monotonic() < until:
            time.sleep(0.05)
        for process in self._going.values():
            process.end()
        self._going = {}


# --- inside the process of a job ------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """An error in one line; of one without a text, where it was raised."""
    text = " ".join(str(error).split())[:300]
    if not text:
        frames = traceback.extract_tb(error.__traceback__)
        text = f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no reason"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _work(task: dict[str, Any], spool: Path, child: list[subprocess.Popen]) -> None:
    """Leave ``result.json``, or end with a status that says more."""
    folder = Path(task["folder"] or spool)
    if "argv" in task:
        # the command is asked, and says by its status what it did
        signal.signal(signal.SIGTERM, lambda *_: None)
        argv = [sys.executable if a is None else a for a in task["argv"]]
        try:
            child.append(subprocess.Popen(argv, cwd=folder, stdin=subprocess.DEVNULL))
        except OSError as error:
            sys.exit(f"{argv[0]} cannot be started ({error.strerror or error})")
        status = child[0].wait()
        result = {"status": status} if status else {}
    else:
        module, name = task["call"]
        try:
            value = getattr(importlib.import_module(module), name)(task["argument"], folder)
            json.dumps(result := {"value": value})
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                os._exit(DISK_FULL)
            traceback.print_exc()  # for the log
            result = {"error": reason(error)}
    partial = spool / "result.tmp"
    try:
        partial.write_text(json.dumps(result))
        partial.replace(spool / "result.json")
    except OSError as error:
        os._exit(DISK_FULL if error.errno in FULL else 1)


def _end_with(starter: Callable[[], None], spool: Path, child: list[subprocess.Popen]) -> None:
    """End this process as soon as ``starter`` returns: then who started it has ended."""

    def watch() -> None:
        starter()
        for command in child:
            command.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(GRACE)
            command.kill()
        shutil.rmtree(spool, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _input_ends() -> None:
    # sys.stdin.read would hold a lock that Python wants when it exits
    while os.read(sys.stdin.fileno(), 1 << 12):
        pass


def _served(spool: Path) -> None:
    task, child = json.loads(sys.stdin.readline()), []
    _end_with(_input_ends, spool, child)
    _work(task, spool, child)


def _forked(task: dict[str, Any], spool: Path, log: Path) -> None:
    """The process of a job, as a fork of one that has imported everything."""
    os.setsid()  # Ctrl-C is for the process that started the jobs
    try:
        file = log.open("a", encoding="utf-8")
    except OSError as error:
        os._exit(DISK_FULL if error.errno in FULL else 1)
    with file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    server = multiprocessing.parent_process()
    assert server is not None
    _end_with(server.join, spool, [])
    _work(task, spool, [])


if __name__ == "__main__":
    _served(Path(sys.argv[1]))
