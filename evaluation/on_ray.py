"""Jobs of :mod:`evaluation.batch` as tasks of a Ray cluster."""

import io
import os
import re
import secrets
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packaging.version import Version

from evaluation.batch import CLAIM, STATE, BatchError, Job, Outcome
from evaluation.processes import Process

LEAST_RAY = "2.52.0"  # the first with token authentication
LOCAL = {"address": "local", "include_dashboard": False}  # not one that happens to run here
LOOPBACK = ("127.0.0.1", "::1")


def pack(folder: Path) -> bytes:
    """A job's files, without links and what the machine that gave the job writes itself."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name not in (STATE, CLAIM):
                tar.add(path, path.relative_to(folder))
    return file.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Raises ``tarfile.TarError`` for what is no such file, or has paths outside of ``folder``."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder, filter="data")


def run_elsewhere(task: dict[str, Any], packed: bytes = b"", token: str = "") -> dict[str, Any]:
    """The Ray task: the job's own process beside Ray's, so that it is the same as without Ray. A
    folder that this machine does not share has its files brought here and back."""
    folder, away = task["folder"], None
    if folder and not _same(Path(folder) / CLAIM, token):
        away = Path(tempfile.mkdtemp(prefix="job-"))
        unpack(packed, away)
        task = task | {"folder": str(away)}
    process = Process(task)
    try:
        while (outcome := process.outcome()) is None:
            time.sleep(0.1)
        return asdict(outcome) | {"files": pack(away) if away else b""}
    finally:
        if process.status() is None:
            process.end()
        if away:
            shutil.rmtree(away, ignore_errors=True)


def _same(claim: Path, token: str) -> bool:
    with suppress(OSError):
        return bool(token) and claim.read_text() == token
    return False


def _import_ray(local: bool) -> Any:
    """The module. ``local``: what it starts listens on the loopback interface, with a token."""
    if local:
        # Ray takes the machine's address for its own unless it is told that there is no cluster
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() == "token":
            # else Ray writes one to a file, which others on this machine may read
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        import ray
    except ImportError:
        raise BatchError(
            f"--ray needs the package ray, which {sys.executable} does not have: pip install "
            f"'ray>={LEAST_RAY}', on a cluster on all machines, next to this project's requirements"
        ) from None
    if Version(ray.__version__) < Version(LEAST_RAY):
        raise BatchError(
            f"Ray {ray.__version__} has no token authentication, so that who reaches it can run "
            f"code: pip install 'ray>={LEAST_RAY}'"
        )
    return ray


class OnRay:
    """Tasks of a Ray cluster, each with as many CPUs as a job has threads; as many at a time as the
    cluster has room for now, or ``workers``: more make one grow that can.

    Whoever reaches a Ray cluster can run code on it. Without ``address`` one is started that
    listens on the loopback interface only and asks for a token that this process makes up. A
    cluster at ``address`` is as its owner has set it up. Its machines need the same packages; they
    get copies of the packages in the folders ``ship``, or of ``working_dir`` without what
    ``excludes`` says (patterns of a .gitignore).
    """

    def __init__(
        self,
        address: str,
        threads: int,
        gpus: float,
        workers: int | None,
        working_dir: Path | None = None,
        excludes: Sequence[str] = (),
        ship: Sequence[Path] = (),
    ):
        self._ray = ray = _import_ray(local=not address)
        options = {"address": address} if address else LOCAL
        there: dict[str, Any] = {}
        if working_dir is not None:
            there = {"working_dir": str(working_dir), "excludes": [*excludes]}
        elif not address:  # on this machine everything is found where it is here
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            there = {"env_vars": {"PYTHONPATH": path}}
        elif ship:
            there = {"py_modules": [str(folder) for folder in ship]}
        try:
            ray.init(**options, runtime_env=there, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise BatchError(f"Ray at {address or 'this machine'}: {_line(error)}") from None
        if not address and ray.util.get_node_ip_address() not in LOOPBACK:
            ray.shutdown()
            raise BatchError(
                f"Ray {ray.__version__} would listen on {ray.util.get_node_ip_address()}, not on "
                "the loopback interface alone: start a cluster yourself and give its --ray ADDRESS"
            )
        if address and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            print(
                f"warning: the Ray cluster at {address} is used without a token: who reaches it "
                "can run code on it (RAY_AUTH_MODE=token, on all of its machines, asks for one)",
                flush=True,
            )
        has = ray.cluster_resources()
        room = [
            int(has.get("CPU", 0) / threads),
            *([int(has.get("GPU", 0) / gpus)] if gpus else []),
        ]
        self.slots = workers or max(1, min(room))
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=1)(run_elsewhere)
        self._going: dict[Any, Job] = {}

    def submit(self, job: Job) -> Any:
        packed, token = b"", ""
        if job.folder is not None:
            packed, token = pack(job.folder), (job.folder / CLAIM).read_text()
        handle = self._task.remote(job.task(), packed, token)
        self._going[handle] = job
        return handle

    def wait(self) -> list[tuple[Any, Outcome]]:
        ready, _ = self._ray.wait(list(self._going), num_returns=1)
        done = []
        for handle in ready:
            job = self._going.pop(handle)
            try:
                found: dict[str, Any] = self._ray.get(handle)
            except Exception as error:  # a lost machine, a worker that was killed
                found = {"error": f"Ray: {_line(error)}", "log": str(error)}
            if packed := found.pop("files", b""):
                try:
                    unpack(packed, job.kept)
                except tarfile.TarError as error:
                    found["error"] = f"the files of the job cannot be unpacked: {_line(error)}"
            done.append((handle, Outcome(**found)))
        return done

    def close(self) -> None:
        for handle in self._going:
            with suppress(Exception):
                self._ray.cancel(handle, force=True)
        self._going = {}
        self._ray.shutdown()


def _line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray colours its errors
    return " ".join(text.split())[:300]
