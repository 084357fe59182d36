"""A disk that is full at every kind of write, and one that may only be read.

A tmpfs of its own where the system lets one be mounted; elsewhere a limit on the size of each file
(RLIMIT_FSIZE) and a folder that is a file stand in for the two.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.faults.children import Child, command, ends_well, trial_of
from threestudio.utils.checkpoint_files import newest_checkpoint

CONFIG, SIZE = "gs-lora", 24 << 20


def _mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """`folder` as a file system of SIZE bytes; False if there cannot be one."""
    folder.mkdir(parents=True)
    mounted = _mount("-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(disk: Path, free: int) -> None:
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    left = shutil.disk_usage(disk).free
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(left - free, 1))


def _limit(size: int):
    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return before


def _full(
    n: int, mode: str, doublings: int, model, disk: Path, folder: Path, mounted: bool
) -> Iterator[str]:
    """The run of before goes on (or is tested, or exported) with `n` different amounts of space,
    from nothing to all that it needs; what was there before is there afterwards."""
    good, work = disk / "good", disk / "work"
    for i in range(n):
        shutil.rmtree(work, ignore_errors=True)
        (disk / "filler").unlink(missing_ok=True)
        shutil.copytree(good, work)
        trial = trial_of(CONFIG, work)
        before = {p: p.read_bytes() for p in (trial / "ckpts").iterdir()}
        before |= {p: p.read_bytes() for p in (trial / "save").rglob("*") if p.is_file()}
        step = newest_checkpoint(trial)[1]
        free = int(4096 * 2 ** (doublings * i / max(n - 1, 1))) if i else 0
        if mounted:
            _fill(disk, free)
        child = Child(
            command(CONFIG, model, work, 8, mode, f"resume={trial}"),
            folder / f"{mode}{i}.log",
            folder,
            None if mounted else _limit(free),
        )
        problem = ends_well(child)
        found = newest_checkpoint(trial)
        if not problem and (found is None or found[1] < step):
            problem = f"{free} bytes free: the checkpoint of step {step} is lost"
        for path, content in before.items():
            if not path.exists() or (path.suffix != ".ckpt" and not path.stat().st_size):
                problem = problem or f"{free} bytes free: {path.name} is lost"
            elif child.status == 2 and mode != "--train" and path.read_bytes()[:4] != content[:4]:
                problem = problem or f"{free} bytes free: {path.name} is broken"
        if not problem and mode == "--train" and found[1] < 8 and child.status == 0:
            problem = f"{free} bytes free: status 0, but only {found[1]} steps are saved"
        if not problem and list(trial.rglob(".*.tmp*")):
            problem = f"{free} bytes free: temporary files are left"
        yield problem


def _new(n: int, model, disk: Path, folder: Path, mounted: bool) -> Iterator[str]:
    """New runs, with different amounts of space."""
    for i in range(n):
        shutil.rmtree(disk / "new", ignore_errors=True)
        (disk / "filler").unlink(missing_ok=True)
        free = int(4096 * 2 ** (9 * i / max(n - 1, 1))) if i else 0
        if mounted:
            _fill(disk, free)
        argv = command(CONFIG, model, disk / "new", 2)
        child = Child(argv, folder / f"new{i}.log", folder, None if mounted else _limit(free))
        yield ends_well(child)


# what a run of 8 steps does when nothing can be written in one of its folders: the exit status,
# the step of the last checkpoint, and what it says
FOLDERS = {
    "configs": (2, 4, "parsed.yaml: No space left"),
    "code": (2, 4, "No space left"),
    "ckpts": (2, 0, "step=2.ckpt: No space left"),
    "csv_logs": (0, 8, "the log has gaps from here on"),
    "save": (2, 8, "a file is left out"),  # in training; then the test stops
    "../../.threestudio_cache": (0, 8, "text embeddings are not kept"),
}


def _each_folder(model, disk: Path, folder: Path) -> Iterator[str]:
    """A full file system of its own for each folder that a run writes to."""
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)  # else there is no snapshot
    for name, (status, step, said) in FOLDERS.items():
        work = folder / "each"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        shutil.copytree(disk / "good", work / "outputs")
        (work / "code.py").write_text("code")
        trial = trial_of(CONFIG, work / "outputs")
        full = work / ".threestudio_cache" if "cache" in name else trial / name
        if not step:  # a new run, which has a folder of its own but for this
            full = work / "outputs" / name
        full.mkdir(exist_ok=True)
        own = f"resume={trial}" if step else f"checkpoint.dirpath={full.relative_to(work)}"
        if not _mount("-t", "tmpfs", "-o", "size=64k", "none", str(full)):
            yield "a second tmpfs cannot be mounted"
            return
        try:
            # there is room for what says that a run is in a folder
            (full / "filler").write_bytes(bytes((64 << 10) if step else (48 << 10)))
            log = folder / f"each-{full.name}.log"
            child = Child(command(CONFIG, model, "outputs", 8, "--train", own), log, work)
            problem = ends_well(child)
            if not problem and (child.status != status or said not in child.output()):
                problem = f"{name}: status {child.status}: {child.output()[-200:]}"
            found = newest_checkpoint(trial if step else full)
            if not problem and (found[1] if found else 0) != step:
                problem = f"{name}: the newest checkpoint is {found}, not of step {step}"
            yield problem
        finally:
            subprocess.run(["umount", "-l", str(full)], check=True)


def _read_only(model, disk: Path, folder: Path, mounted: bool) -> Iterator[str]:
    if mounted:
        (disk / "filler").unlink(missing_ok=True)
        if not _mount("-o", "remount,ro", str(disk)):
            yield "the disk cannot be made read-only"
            return
        root = disk / "good"
    else:
        root = disk / "file" / "outputs"
        (disk / "file").write_text("")
    resume = f"resume={trial_of(CONFIG, disk / 'good')}"
    for mode in ("--train", "--test", "--export", "--validate"):
        child = Child(
            command(CONFIG, model, root, 8, mode, resume), folder / f"ro{mode}.log", folder
        )
        problem = ends_well(child)
        if not problem and (child.status == 0 or "choose a folder" not in child.output()):
            problem = f"{mode}: {child.output()[-200:]}"
        yield problem


def rows(n: int, model, folder: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Names and trials for the table."""
    disk = folder / "disk"
    with small_disk(disk) as mounted:
        first = Child(command(CONFIG, model, disk / "good", 4), folder / "good.log", folder)
        problem = ends_well(first, may_fail=False)
        if problem:
            raise RuntimeError(f"the run before the faults failed: {problem}")
        kind = "full disk" if mounted else "limited file size"
        yield f"{kind}, new runs", _new(n // 2, model, disk, folder, mounted)
        for mode, share, doublings in (("--train", 1, 12), ("--test", 2, 8), ("--export", 4, 8)):
            trials = _full(max(n // share, 3), mode, doublings, model, disk, folder, mounted)
            yield f"{kind}, {mode} of a run", trials
        if mounted:
            yield "full disk, for each folder of a run", _each_folder(model, disk, folder)
        kind = "read-only disk" if mounted else "a file for a folder"
        yield kind, _read_only(model, disk, folder, mounted)
