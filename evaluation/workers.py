"""Where runs are carried out: in processes of this machine (as tasks of Ray: ``on_ray``).

A backend has ``slots``, ``submit(job) -> handle``, ``wait() -> [(handle, result), ...]`` and
``close()``, which ends what is going on. A job is ``{"run", "threads", "commit"}``, a result
``{"row", "curves", "sheet", "log", "wall"}``: plain values, that cross to other machines; wall are
the seconds that the run's process took, 0 where they are not known.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from evaluation.grid import Run
from evaluation.machine import ROOT
from evaluation.table import begun
from threestudio.utils.typing import *

WORK = ROOT / "build" / "evaluation"
LOG = 20_000  # characters of a run's output that are kept, if it fails
LOG_FILE = "log.txt"
DISK_FULL = 74  # the exit status of a run that found the disk full (EX_IOERR of sysexits.h)


def make_job(run: Run, threads: int, commit: str) -> Dict[str, Any]:
    return {"run": asdict(run), "threads": threads, "commit": commit}


def failure(job: Dict[str, Any], status: str, log: str = "") -> Dict[str, Any]:
    """The result of a run whose process left none."""
    row = begun(Run.of(job["run"]), job["threads"], job["commit"]) | {"status": status}
    return {"row": row, "curves": [], "sheet": None, "log": log, "wall": 0.0}


def _environment(threads: int) -> Dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def _how(status: int, last: str) -> str:
    """Why a run has failed whose process left no result, from its exit status and the last line of
    its log."""
    if status == -signal.SIGKILL:
        return "the process was killed (signal 9), as is done when memory runs out"
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"the process ended with {how}: {last[:200] or 'it said nothing'}"


class Process:
    """A run in a process of its own, which ends when this one does."""

    def __init__(self, job: Dict[str, Any], device: Optional[str] = None):
        WORK.mkdir(parents=True, exist_ok=True)
        self.job, self._start = job, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="run-", dir=WORK))
        self._begin(device)

    def _begin(self, device: Optional[str]) -> None:
        env = os.environ | _environment(self.job["threads"])
        if device is not None:
            env["CUDA_VISIBLE_DEVICES"] = device
        with (self.folder / LOG_FILE).open("w") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "evaluation.run", str(self.folder)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,  # stays open: its end is the process's end
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for the process that started the runs
            )
        self.pid = self._popen.pid
        with suppress(BrokenPipeError):
            self._popen.stdin.write(json.dumps(self.job) + "\n")
            self._popen.stdin.flush()

    def status(self) -> Optional[int]:
        """The exit status, -N after signal N; None while it runs."""
        return self._popen.poll()

    def _release(self) -> None:
        """Wait for a process that was killed or has ended, and let go of it."""
        with suppress(BrokenPipeError):
            self._popen.stdin.close()
        self._popen.wait()

    def result(self) -> Optional[Dict[str, Any]]:
        """What came of it; None while it runs."""
        status = self.status()
        if status is None:
            return None
        file = self.folder / LOG_FILE
        log = file.read_text("utf-8", errors="replace")[-LOG:] if file.exists() else ""
        try:
            result = json.loads((self.folder / "result.json").read_text()) | {"log": log}
        except (OSError, ValueError):
            lines = [line for line in log.splitlines() if line.strip()]
            result = failure(self.job, _how(status, lines[-1] if lines else ""), log)
        self.end()
        if status == DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder.parent))
        return result | {"wall": time.monotonic() - self._start}

    def end(self) -> None:
        """Kill it and what it has started, and remove its files."""
        if self.status() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # it may not have a group of its own yet
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._release()
        shutil.rmtree(self.folder, ignore_errors=True)


class Forked(Process):
    """The same, as a fork of a server that has imported everything: the imports would be ten
    seconds of each run. The server has the threads of the first job, and ends when this process
    does. Not where CUDA is, which does not live through a fork."""

    def _begin(self, device: Optional[str]) -> None:
        from evaluation import run

        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["evaluation.preload"])
        env = _environment(self.job["threads"]) | {"PYTHONPATH": str(ROOT)}
        with _variables(env):  # for the server, which the first start starts
            arguments = (self.job, self.folder, self.folder / LOG_FILE)
            self._process = forks.Process(target=run.forked, args=arguments)
            self._process.start()
        self.pid = self._process.pid

    def status(self) -> Optional[int]:
        return self._process.exitcode

    def _release(self) -> None:
        self._process.join()


@contextmanager
def _variables(values: Dict[str, str]):
    """These environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Local:
    """Processes of this machine, one a slot; several visible GPUs are shared out to the slots."""

    def __init__(self, workers: int):
        self.slots = workers
        every = ",".join(map(str, range(max(1, torch.cuda.device_count()))))
        self._devices = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        self._going: Dict[int, Process] = {}  # by slot

    def submit(self, job: Dict[str, Any]) -> Process:
        slot = next(i for i in range(self.slots) if i not in self._going)
        kind = Process if torch.cuda.is_available() else Forked
        self._going[slot] = kind(job, self._devices[slot % len(self._devices)])
        return self._going[slot]

    def wait(self) -> List[Tuple[Process, Dict[str, Any]]]:
        done: List[Tuple[Process, Dict[str, Any]]] = []
        while self._going and not done:
            for slot, process in list(self._going.items()):
                result = process.result()
                if result is not None:
                    del self._going[slot]
                    done.append((process, result))
            if not done:
                time.sleep(0.1)
        return done

    def close(self) -> None:
        for process in self._going.values():
            process.end()
        self._going = {}
