"""Runs as tasks of a Ray cluster: a backend like those of :mod:`evaluation.workers`."""

import os
import re
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path

from packaging.version import Version

from evaluation.machine import ROOT
from evaluation.workers import Process, failure
from threestudio.run.git import NoGit, untracked_files
from threestudio.run.snapshot import CODE
from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

LEAST_RAY = "2.52.0"  # the first with token authentication
LOCAL = {"address": "local", "include_dashboard": False}  # not one that happens to run here
LOOPBACK = ("127.0.0.1", "::1")
# of the copy of this project that Ray takes to other machines; of what is hidden, nothing
NOT_NEEDED = [".?*", "build", "outputs", "docs"]


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


def not_for_others() -> List[str]:
    """What Ray does not take to other machines, as patterns of a .gitignore: what a run does not
    need, and what may be secret. Of files that git does not track, that is all but code."""
    try:
        new = untracked_files(ROOT)
    except NoGit:
        new = []
    links = []
    for folder, inner, names in os.walk(ROOT):
        paths = [Path(folder, name).relative_to(ROOT) for name in [*inner, *names]]
        links += [str(path) for path in paths if (ROOT / path).is_symlink()]
        inner[:] = [name for name in inner if not name.startswith(".") and name not in NOT_NEEDED]
    secret = [name for name in new if Path(name).suffix not in {*CODE, ".yaml", ".yml"}] + links
    return [*NOT_NEEDED, *("/" + re.sub(r"([\\\[*?!# ])", r"\\\1", name) for name in secret)]


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
        raise UserError(
            f"--ray needs the package ray, which {sys.executable} does not have: pip install "
            f"'ray>={LEAST_RAY}', on a cluster on all machines, next to this project's requirements"
        ) from None
    if Version(ray.__version__) < Version(LEAST_RAY):
        raise UserError(
            f"Ray {ray.__version__} has no token authentication, so that who reaches it can run "
            f"code: pip install 'ray>={LEAST_RAY}'"
        )
    return ray


class OnRay:
    """Tasks of a Ray cluster, each with as many CPUs as a run has threads; as many at a time as the
    cluster has room for now, or ``workers``: more make one grow that can.

    Whoever reaches a Ray cluster can run code on it. Without ``address`` one is started that
    listens on the loopback interface only and asks for a token that this process makes up. A
    cluster at ``address`` is as its owner has set it up.
    """

    def __init__(self, address: str, threads: int, gpus: float, workers: Optional[int]):
        self._ray = ray = _import_ray(local=not address)
        options = {"address": address} if address else LOCAL
        try:
            ray.init(
                **options,
                runtime_env={"working_dir": str(ROOT), "excludes": not_for_others()},
                log_to_driver=False,
            )
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UserError(f"Ray at {address or 'this machine'}: {_line(error)}") from None
        if not address and ray.util.get_node_ip_address() not in LOOPBACK:
            ray.shutdown()
            raise UserError(
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
