"""The folder of a run: made for it alone, and held by one process at a time.

Locks are the kernel's (``flock`` of an open file): they go with the process that holds them,
however it ends, and a file that is left behind locks nothing. Where the system or the file system
has no such locks (Windows, some network disks), runs are told apart by their folders' names alone.
"""

import contextlib
import os
import shutil
import socket
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from threestudio.utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TRAINING, RESULTS = ".lock", ".lock-results"
_PLACE = ("exp_root_dir",)
_NAMES = (*_PLACE, "name", "tag", "use_timestamp", "timestamp")
_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class Lock:
    """The file `path`, locked by at most one process. Its text says by which."""

    def __init__(self, path) -> None:
        self.path = str(path)
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Whether this process holds it now; does not wait. Raises :class:`UserError` where `path`
        is a link, whose target would be emptied: the folder may be somebody else's."""
        while self._handle is None:
            if os.path.islink(self.path):
                raise UserError(f"{self.path} is a link instead of a lock: remove it")
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            handle = os.open(self.path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # the one who held it may have removed the file between these two lines
                current = os.path.samestat(os.stat(self.path), os.fstat(handle))
            except BlockingIOError:
                os.close(handle)
                return False
            except FileNotFoundError:
                current = False
            except OSError:  # this disk knows no locks
                current = True
            if not current:
                os.close(handle)
                continue
            self._handle = handle
            _held.add(self)
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return True

    def holder(self) -> str:
        """The process that has it, in words."""
        with contextlib.suppress(OSError, ValueError):
            text = Path(self.path).read_text(encoding="utf-8")[:200].strip()
            if text.startswith("process ") and text.isprintable():
                return text
        return "another process"

    def release(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._handle)
        self._handle = None
        _held.discard(self)


def _forget_all() -> None:
    """In a forked process, which would keep the locks of one that was killed."""
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def make_folder(path) -> tuple[str, list[str]]:
    """Make the folder `path`, or if that is taken ``path-002``, ``path-003``, ... (in the order in
    which ``LAST`` looks for the last), such that no two processes get the same one. Returns it, and
    what was made: it and the folders above it that were not there, the uppermost first."""
    path = str(path)
    parent = os.path.dirname(path) or "."
    made: list[str] = []
    n, vanished = 1, 0
    while True:
        made += [folder for folder in _missing(parent) if folder not in made]
        try:
            os.makedirs(parent, exist_ok=True)
        except FileNotFoundError:
            vanished += 1
        name = path if n == 1 else f"{path}-{n:03d}"
        try:
            os.mkdir(name)
            return name, [*made, name]
        except FileExistsError:
            n += 1
        except FileNotFoundError:  # another run has just removed the empty folder above
            vanished += 1
            if vanished > 100:
                raise


def _missing(folder: str) -> list[str]:
    """`folder` and those above it that do not exist, the uppermost first."""
    found: list[str] = []
    while folder and not os.path.lexists(folder):
        found.insert(0, folder)
        folder = os.path.dirname(folder)
    return found


class RunFolder:
    """The folders that a run writes into, as a context: made or locked at the start, released at
    the end. What it has not made itself it never removes. Of several processes of one run only the
    `first` does anything."""

    def __init__(self, first: bool = True) -> None:
        self._first = first
        self._locks: list[Lock] = []
        self._made: list[str] = []

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc) -> None:
        while self._locks:
            self._locks.pop().release()

    def make(self, path) -> str:
        """A new folder `path` (see :func:`make_folder`), held for training."""
        if not self._first:
            return str(path)
        path, made = make_folder(path)
        self._made += made
        self.hold(path, TRAINING)
        return path

    def hold(self, path, name: str) -> None:
        """Lock what is called `name` in the folder `path`, which is made if it is missing. Raises
        :class:`UserError` if another process has it."""
        if not self._first:
            return
        self._made += _missing(str(path))
        os.makedirs(path, exist_ok=True)
        lock = Lock(os.path.join(path, name))
        if not lock.acquire():
            doing = "training in" if name == TRAINING else "writing results into"
            raise UserError(
                f"{lock.holder()} is {doing} {path}: wait until it has ended, or choose another "
                "folder with exp_root_dir=..."
            )
        self._locks.append(lock)

    def hold_unused(self, path) -> bool:
        """Hold the folder `path` for training, unless another run has it or its checkpoints are
        there."""
        if not self._first:
            return True
        try:
            self.hold(path, TRAINING)
        except UserError:
            return False
        if not any(Path(path).glob("*.ckpt")):
            return True
        self._locks.pop().release()
        return False

    @contextlib.contextmanager
    def results(self, path):
        """Within this, no other process writes results (``--test``, ``--export``) into the folder
        `path`: one that does so is waited for."""
        if not self._first:
            yield
            return
        lock, told = Lock(os.path.join(path, RESULTS)), False
        while not lock.acquire():
            if not told:
                print(f"waiting: {lock.holder()} is writing results into {path}", flush=True)
            told = True
            time.sleep(0.1)
        try:
            yield
        finally:
            lock.release()

    def discard(self, results: Iterable[str]) -> None:
        """Remove the folders that were made for a run which has ended before it had any result (a
        file in one of the folders `results`), and those above them if nothing else is in there."""
        own = {Path(lock.path) for lock in self._locks}
        for folder in results:
            found = (path for path in Path(folder).rglob("*") if path not in own)
            if any(path.is_file() or path.is_symlink() for path in found):
                return
        held = {os.path.dirname(lock.path) for lock in self._locks}
        for folder in reversed(self._made):
            if folder in held:
                if not self._has_others(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # other runs are in it
                    os.rmdir(folder)
        self._made.clear()

    def _has_others(self, folder: str) -> bool:
        """Whether another run is, or was, in a folder within this one."""
        own = {os.path.realpath(lock.path) for lock in self._locks}
        for inner, folders, names in os.walk(folder):
            if inner == folder:
                folders[:] = [name for name in folders if name != "code"]  # a copy of any files
                continue
            for name in names:
                locked = name in (TRAINING, RESULTS)
                if locked and os.path.realpath(os.path.join(inner, name)) not in own:
                    return True
                if name.endswith(".ckpt") or (name.startswith("cmd") and name.endswith(".txt")):
                    return True
        return False


# --- which folder ---------------------------------------------------------------------------------


def checkpoint_folder(cfg: Any) -> str:
    """Where the run with this config keeps its checkpoints."""
    return cfg.checkpoint.get("dirpath") or os.path.join(cfg.trial_dir, "ckpts")


def last_checkpoint(cfg: Any) -> str:
    """Where it keeps the checkpoint of its last step."""
    return os.path.join(checkpoint_folder(cfg), "last.ckpt")


def folder_of(checkpoint) -> str:
    """The folder of the run that a checkpoint belongs to: its own, or that above ``ckpts``."""
    folder = os.path.dirname(str(checkpoint)) or "."
    if os.path.basename(os.path.abspath(folder)) == "ckpts":
        return os.path.normpath(os.path.join(folder, ".."))
    return folder


def resume_of_copy(cfg: Any, files: Sequence[str], overrides: Iterable[str], train: bool) -> str:
    """What ``resume`` means where it stands in the saved config of a run, and nothing else names
    one: that run's own checkpoints, also if it was copied or moved since. A training that the run
    has begun with a checkpoint of another run is begun with that again."""
    if len(files) != 1 or any(text.partition("=")[0] == "resume" for text in overrides):
        return cfg.resume
    home = os.path.normpath(os.path.join(os.path.dirname(files[0]), ".."))
    saved = os.path.realpath(files[0]) == os.path.realpath(f"{home}/configs/parsed.yaml")
    if (
        not saved
        or not any(Path(home, "ckpts").glob("*.ckpt"))
        or _same(folder_of(cfg.resume), home)
    ):
        return cfg.resume
    if train and not _same(os.path.dirname(cfg.resume), checkpoint_folder(cfg)):
        return cfg.resume
    return home


def settle(
    folder: RunFolder, cfg: Any, files: Sequence[str], overrides: Iterable[str], train: bool
) -> None:
    """Choose, make and lock the folder of a run, and write it into `cfg`.

    A run without ``resume`` gets a new folder. What is rendered or exported from a checkpoint goes
    beside it, wherever the config says that the run is or once was, unless an override says where
    (``exp_root_dir``). A training goes on in the run's own folder if the config names it, or lies
    in it (a copied or moved run) and no override names the run anew; otherwise it is a new run,
    which starts from that checkpoint.
    """
    if cfg.resume is not None:
        home, beside = folder_of(cfg.resume), os.path.dirname(cfg.resume) or "."
        naming = _NAMES if train else _PLACE
        named = any(text.partition("=")[0] in naming for text in overrides)
        inside = any(_is_inside(file, home) for file in files)
        if _same(checkpoint_folder(cfg), beside):
            pass
        elif not named and (inside or not train):
            _move(cfg, home, beside)
        else:
            _make(folder, cfg, train)
            return
        folder.hold(cfg.trial_dir, TRAINING if train else RESULTS)
        if train and not _is_inside(beside, cfg.trial_dir):
            folder.hold(beside, TRAINING)
        for inner in (os.path.join(cfg.trial_dir, "save"), *[checkpoint_folder(cfg)] * train):
            _refuse_link_to_a_run(inner)
    else:
        _make(folder, cfg, train)


def _make(folder: RunFolder, cfg: Any, train: bool) -> None:
    wanted, ckpts = cfg.trial_dir, cfg.checkpoint.get("dirpath")
    cfg.trial_dir = folder.make(wanted)
    if cfg.trial_dir != wanted:
        print(f"{wanted} exists: this run goes to {cfg.trial_dir}", flush=True)
        suffix = cfg.trial_dir[len(wanted) :]
        cfg.trial_name += suffix
        cfg.timestamp = (cfg.timestamp or "") + suffix  # so that the saved config leads here
    if not train or not ckpts:
        return
    if _is_inside(ckpts, wanted):
        cfg.checkpoint.dirpath = os.path.join(cfg.trial_dir, os.path.relpath(ckpts, wanted))
    elif _is_of_a_run(ckpts) or not folder.hold_unused(ckpts):
        root = _same(ckpts, cfg.exp_root_dir)  # beside it would be outside of it
        cfg.checkpoint.dirpath = folder.make(os.path.join(ckpts, "ckpts") if root else ckpts)
        print(f"{ckpts} is another run's: checkpoints go to {cfg.checkpoint.dirpath}", flush=True)


def _move(cfg: Any, home: str, beside: str) -> None:
    """The run is in the folder `home` now, its checkpoints are in `beside`."""
    old = Path(cfg.trial_dir).relative_to(cfg.exp_root_dir).parts
    cfg.trial_dir, cfg.exp_dir = home, os.path.normpath(os.path.join(home, ".."))
    cfg.trial_name = os.path.basename(os.path.abspath(home))
    parts = Path(home).parts
    same_name = parts[-len(old) :] == old
    cfg.exp_root_dir = str(Path(*parts[: -len(old)])) if same_name else cfg.exp_dir
    if cfg.checkpoint.get("dirpath") or not _same(os.path.join(home, "ckpts"), beside):
        cfg.checkpoint.dirpath = beside


def _refuse_link_to_a_run(folder: str) -> None:
    """Raise :class:`UserError` if `folder` is a link into another run, whose files would be
    replaced. A link to anywhere else is one to another disk."""
    if os.path.islink(os.path.normpath(folder)) and _is_of_a_run(folder):
        above = os.path.dirname(os.path.realpath(folder))
        raise UserError(
            f"{folder} is a link into the run in {above}, whose files would be replaced: name that "
            "run, or put a folder in the place of the link"
        )


def is_saved_config(file: str) -> bool:
    """Whether a config file is one that a run keeps beside its checkpoints, in ``configs``."""
    folder = os.path.dirname(os.path.realpath(file))
    ckpts = os.path.join(os.path.dirname(folder), "ckpts")
    return os.path.basename(folder) == "configs" and (_is_of_a_run(folder) or os.path.isdir(ckpts))


def _is_of_a_run(folder: str) -> bool:
    """Whether a run, which goes on or has ended, has the folder that `folder` really is in."""
    above = os.path.dirname(os.path.realpath(folder))
    return any(os.path.exists(os.path.join(above, name)) for name in ("cmd.txt", TRAINING))


def _same(a, b) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _is_inside(path, folder) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
