"""Many jobs, each in a process of its own: some at a time on this machine, or on a Ray cluster.

    jobs = [Job(text, [sys.executable, "-m", "..."], out / str(k)) for k, text in enumerate(texts)]
    finished = run(jobs, workers=2)      # or ray="auto"
    print(table(jobs))

A job is a command, or a function that can be imported. Its folder keeps ``log.txt``, what it
printed, and ``job.json``, what became of it, so that the same call goes on where a stopped or
killed one was: finished jobs are not repeated, and a job that was under way is started again in its
folder, where it may take up what it left. Several processes can work at the same jobs at once.

A study that keeps its results elsewhere gives :func:`carry_out` a :class:`Book` of its own. This
module, :mod:`evaluation.processes` and :mod:`evaluation.on_ray` import nothing else of the project.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

STATE, CLAIM = "job.json", ".claim"
MAX_STATE = 1 << 24  # bytes of a job.json that are read
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
STOP = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")

T = TypeVar("T")
Item = TypeVar("Item", contravariant=True)


class BatchError(ValueError):
    """What the user can change; its text is one line."""


@dataclass(frozen=True, eq=False)
class Job:
    """One piece of work.

    ``work`` is a command, run with ``folder`` as its current directory, or a function at the top of
    a module, called as ``work(argument, folder)``; ``argument`` and what it returns must be plain
    values (JSON), for both cross to other processes and machines. Without ``folder`` it gets a
    temporary one and leaves nothing but its outcome. ``threads`` are what OpenMP, MKL and numba are
    told to use. A finished job whose ``key`` has changed since is done again.
    """

    name: str
    work: Sequence[str] | Callable[[Any, Path], Any]
    folder: Path | None = None
    argument: Any = None
    threads: int = 1
    key: str = ""

    @property
    def kept(self) -> Path:
        """The folder of a job that has one. Raises :class:`BatchError`."""
        if self.folder is None:
            raise BatchError(f"{self.name}: this job needs a folder of its own")
        return self.folder

    def task(self) -> dict[str, Any]:
        """The job in plain values. Raises :class:`BatchError` for a function without a name."""
        task = {"name": self.name, "threads": self.threads, "argument": self.argument}
        task["folder"] = None if self.folder is None else os.path.abspath(self.folder)
        if callable(self.work):
            module, name = self.work.__module__, self.work.__qualname__
            if module == "__main__" or not name.isidentifier():
                raise BatchError(f"{self.name}: {name} must be a function at the top of a module")
            return task | {"call": [module, name]}
        # another machine may have its Python elsewhere
        argv = [None if k == 0 and a == sys.executable else a for k, a in enumerate(self.work)]
        return task | {"argv": argv}


@dataclass(frozen=True)
class Outcome:
    """What became of a job: what its function returned, one line about what went wrong (empty if
    nothing did), the end of its output, and the seconds it took (0 where they are not known)."""

    value: Any = None
    error: str = ""
    log: str = ""
    seconds: float = 0.0


class Claim(Protocol):
    def release(self) -> None: ...


class Backend(Protocol):
    """Where jobs are carried out, ``slots`` at a time."""

    slots: int

    def submit(self, job: Job) -> Any: ...
    def wait(self) -> list[tuple[Any, Outcome]]: ...
    def close(self) -> None: ...


class Book(Protocol[Item]):
    """Where it stands which items are done."""

    def start(self, item: Item, /) -> tuple[Job, Claim] | None:
        """The job of an item and the right to do it; None if it is done, or somebody is at it."""

    def record(self, item: Item, outcome: Outcome, /) -> None: ...


def carry_out(
    items: Iterable[T],
    backend: Backend,
    book: Book[T],
    tell: Callable[[T, Outcome | None, list[T]], None],
) -> None:
    """Do all items. ``tell(item, outcome, left)`` hears of each that is over; its outcome is None
    if it was not started here.

    Raises :class:`BatchError` where nothing can be written any more; what is recorded stays.
    """
    waiting = deque(items)
    going: dict[Any, tuple[T, Claim]] = {}
    try:
        while waiting or going:
            while waiting and len(going) < backend.slots:
                item = waiting.popleft()
                started = book.start(item)
                if started is None:
                    tell(item, None, [*waiting, *(i for i, _ in going.values())])
                    continue
                job, claim = started
                try:
                    handle = backend.submit(job)
                except BaseException:
                    claim.release()
                    raise
                going[handle] = item, claim
            for handle, outcome in backend.wait() if going else ():
                item, claim = going[handle]
                book.record(item, outcome)
                del going[handle]
                claim.release()
                tell(item, outcome, [*waiting, *(i for i, _ in going.values())])
    except OSError as error:
        remedy = "make room; the" if error.errno in FULL else "the"
        raise BatchError(
            f"{error.filename or 'the next file'} cannot be written ({error.strerror or error}): "
            f"{remedy} same command goes on with what is left"
        ) from None
    finally:
        for _, claim in going.values():
            claim.release()


# --- jobs whose folders say how they stand --------------------------------------------------------


class Lock:
    """The right to something, held until it is released or until its process ends (flock)."""

    def __init__(self, path: Path, handle: int):
        self._path, self._handle = path, handle

    @classmethod
    def take(cls, path: Path) -> "Lock | None":
        """The lock, or None if another process has it. Raises ``OSError`` where ``path`` is a link,
        whose target would be emptied: the folder may be somebody else's."""
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another may have removed the file between these two lines
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return cls(path, handle)
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(handle)
        return None

    def write(self, text: str) -> None:
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text.encode(), 0)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._handle)


class Folders:
    """A book of jobs, each with a folder of its own. ``retry``: failed ones are due again."""

    def __init__(self, jobs: Sequence[Job], retry: bool = False):
        folders = Counter(os.path.abspath(job.kept) for job in jobs)
        for folder, count in folders.items():
            if count > 1:
                raise BatchError(f"{count} jobs have the folder {folder}: give each one of its own")
        self.retry = retry

    def state(self, job: Job) -> dict[str, Any]:
        """``{"state": "done" | "failed" | "begun" | "new", "seconds", "error", "value"}``; what is
        no such file counts as none."""
        try:
            with (job.kept / STATE).open("rb") as file:
                found = json.loads(file.read(MAX_STATE))
            kept = {name: found[name] for name in ("state", "key", "seconds", "error", "value")}
            if kept["state"] in ("done", "failed", "begun") and kept["key"] == job.key:
                return kept | {"seconds": float(kept["seconds"]), "error": str(kept["error"])}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {"state": "new", "seconds": 0.0, "error": "", "value": None}

    def due(self, job: Job) -> bool:
        over = ("done",) if self.retry else ("done", "failed")
        return self.state(job)["state"] not in over

    def start(self, job: Job) -> tuple[Job, Lock] | None:
        job.kept.mkdir(parents=True, exist_ok=True)
        claim = Lock.take(job.kept / CLAIM)
        if claim is None:
            return None
        if not self.due(job):
            claim.release()
            return None
        claim.write(secrets.token_hex(16))  # by which Ray's machines tell whether they see it
        self._write(job, "begun", Outcome())
        return job, claim

    def record(self, job: Job, outcome: Outcome) -> None:
        self._write(job, "failed" if outcome.error else "done", outcome)

    def _write(self, job: Job, state: str, outcome: Outcome) -> None:
        about = {"name": job.name, "key": job.key, "state": state, "value": outcome.value}
        about |= {"error": outcome.error, "seconds": round(outcome.seconds, 3)}
        partial = job.kept / f".{STATE}.{secrets.token_hex(4)}"
        try:
            partial.write_text(json.dumps(about))
            partial.replace(job.kept / STATE)
        finally:
            partial.unlink(missing_ok=True)


def run(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    ray: str | None = None,
    gpus: float = 0.0,
    retry: bool = False,
    preload: Sequence[str] = (),
    ship: Sequence[Path] = (),
    tell: Callable[[str], None] = print,
) -> bool:
    """Do what is left of ``jobs``; whether all of them are done now.

    ``workers`` at a time (default: 1; on Ray, what fits). ``ray``: an address ("" starts a cluster
    on this machine); ``gpus`` are those of a job there. ``preload``: modules that the functions of
    the jobs need, imported once where jobs can be forks; ``ship``: folders of packages that a
    cluster gets copies of. ``tell`` gets a line for each job that is over.
    Signals that ask for an end raise ``KeyboardInterrupt``, after the jobs under way were stopped.
    """
    book = Folders(jobs, retry)
    left = [job for job in jobs if book.due(job)]
    if left:
        with (
            stoppable(),
            contextlib.closing(backend(workers, ray, left, gpus, preload, ship)) as where,
        ):
            carry_out(left, where, book, lambda *over: tell(_line(len(left), *over)))
    return all(book.state(job)["state"] == "done" for job in jobs)


def backend(
    workers: int | None,
    ray: str | None,
    jobs: Sequence[Job],
    gpus: float,
    preload: Sequence[str],
    ship: Sequence[Path],
) -> Backend:
    from evaluation.on_ray import OnRay  # both import this module
    from evaluation.processes import Local

    if ray is None:
        return Local(workers or 1, preload)
    return OnRay(ray, max(job.threads for job in jobs), gpus, workers, ship=ship)


def _line(total: int, job: Job, outcome: Outcome | None, left: list[Job]) -> str:
    said = "left to another process"
    if outcome is not None:
        said = f"FAILED: {outcome.error}" if outcome.error else f"done in {outcome.seconds:.0f} s"
    return f"[{total - len(left)}/{total}] {job.name}: {said}"


def table(jobs: Sequence[Job]) -> str:
    """How the jobs stand, a line each: done, failed, running, stopped or waiting."""
    book, rows = Folders(jobs), [("job", "state", "seconds", "")]
    for job in jobs:
        found = book.state(job)
        state = "waiting" if found["state"] == "new" else str(found["state"])
        if state == "begun":
            claim = Lock.take(job.kept / CLAIM)
            state = "running" if claim is None else "stopped"
            if claim is not None:
                claim.release()
        seconds = f"{found['seconds']:.0f}" if found["state"] in ("done", "failed") else ""
        rows.append((" ".join(job.name.split())[:60], state, seconds, found["error"]))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return "\n".join(
        f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]}".rstrip()
        for r in rows
    )


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within this, all signals that ask for an end raise ``KeyboardInterrupt``, but for those that
    the process was started to ignore (``nohup``); shells make a background job ignore the first two
    without being asked."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in STOP if hasattr(signal, name)):
            asked = number in (signal.SIGINT, signal.SIGTERM)
            if asked or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
