"""Where runs are carried out: in processes of this machine, or as tasks of a Ray cluster.

Both backends have ``slots``, ``submit(job) -> handle``, ``wait() -> [(handle, result), ...]`` and
``close()``, which ends what is going on. A job is ``{"run", "threads", "commit"}``, a result
``{"row", "curves", "sheet", "log", "wall"}``: plain values, that cross to other machines; wall are
the seconds that the run's process took, 0 where they are not known.
"""

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
from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

WORK = ROOT / "build" / "evaluation"
LOG = 20_000  # characters of a run's output that are kept, if it fails
LOG_FILE = "log.txt"
# of the copy of this project that Ray takes to other machines
NOT_FOR_OTHERS = [".git", ".venv*", "build", "outputs", "docs", ".threestudio_cache"]


def make_job(run: Run, threads: int, commit: str) -> Dict[str, Any]:
    return {"run": asdict(run), "threads": threads, "commit": commit}


def failure(job: Dict[str, Any], status: str, log: str = "") -> Dict[str, Any]:
    """The result of a run whose process left none."""
    row = begun(Run.of(job["run"]), job["threads"], job["commit"]) | {"status": status}
    return {"row": row, "curves": [], "sheet": None, "log": log, "wall": 0.0}


def _environment(threads: int) -> Dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


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
            how = f"signal {-status}" if status < 0 else f"status {status}"
            last = ([""] + [line for line in log.splitlines() if line.strip()])[-1]
            result = failure(self.job, f"the process ended with {how}: {last[:200]}", log)
        self.end()
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


def run_elsewhere(job: Dict[str, Any]) -> Dict[str, Any]:
    """The Ray task: the run's own process beside Ray's, so that it is the same as without Ray."""
    process = Process(job)
    try:
        while True:
            result = process.result()
            if result is not None:
                return result
            time.sleep(0.1)
    finally:
        if process.status() is None:
            process.end()


class OnRay:
    """Tasks of a Ray cluster, each with as many CPUs as a run has threads; as many at a time as the
    cluster has room for now, or ``workers``: more make one grow that can."""

    def __init__(self, address: str, threads: int, gpus: float, workers: Optional[int]):
        try:
            import ray
        except ImportError:
            raise UserError(
                f"--ray needs the package ray, which {sys.executable} does not have: pip install "
                "ray, on a cluster on all machines, next to this project's requirements"
            ) from None
        self._ray = ray
        try:
            ray.init(
                address=address or None,
                runtime_env={"working_dir": str(ROOT), "excludes": NOT_FOR_OTHERS},
                log_to_driver=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"Ray at {address or 'this machine'}: {_line(error)}") from None
        has = ray.cluster_resources()
        room = [
            int(has.get("CPU", 0) / threads),
            *([int(has.get("GPU", 0) / gpus)] if gpus else []),
        ]
        self.slots = workers or max(1, min(room))
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=1)(run_elsewhere)
        self._going: Dict[Any, Dict[str, Any]] = {}

    def submit(self, job: Dict[str, Any]) -> Any:
        handle = self._task.remote(job)
        self._going[handle] = job
        return handle

    def wait(self) -> List[Tuple[Any, Dict[str, Any]]]:
        ready, _ = self._ray.wait(list(self._going), num_returns=1)
        done = []
        for handle in ready:
            job = self._going.pop(handle)
            try:
                done.append((handle, self._ray.get(handle)))
            except Exception as error:  # a lost machine, a worker that was killed
                done.append((handle, failure(job, f"Ray: {_line(error)}", str(error))))
        return done

    def close(self) -> None:
        for handle in self._going:
            with suppress(Exception):
                self._ray.cancel(handle, force=True)
        self._going = {}
        self._ray.shutdown()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
