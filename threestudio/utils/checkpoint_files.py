"""Checkpoints as files: read without running code, and the good one of a folder found."""

import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from threestudio.utils.errors import UserError


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


_PARTS = {"state_dict": _is_state, "epoch": _is_count, "global_step": _is_count}


def _fits(content: Any, key: str, fits: Callable) -> bool:
    return isinstance(content, dict) and fits(content.get(key))


def is_whole(path) -> bool:
    """Whether the checkpoint's archive is complete and its checksums agree (``torch.load`` does
    not look at them, and would hand out the values of a flipped bit)."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(
                i.compress_type == zipfile.ZIP_STORED and i.file_size == i.compress_size
                for i in archive.infolist()
            )
            return stored and archive.testzip() is None
    except Exception:  # whatever the reader stumbles over, the file is not what was written
        return False


def _step_of(path: Path) -> int | None:
    """The ``global_step`` in a checkpoint, read without its tensors; None if that fails."""
    try:
        return int(torch.load(path, "cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:
        return None


def newest_checkpoint(folder, exclude: str = "") -> tuple[Path, int, str] | None:
    """The good checkpoint of the most steps in `folder` (a run's, or its ``ckpts``), its step, and
    why it was chosen; None if there is none. `exclude`: the name of a file that is not asked.

    Of two of the same step the one written last is taken.
    """
    folder = Path(folder)
    folder = folder / "ckpts" if (folder / "ckpts").is_dir() else folder
    steps = {p: _step_of(p) for p in folder.glob("*.ckpt") if p.is_file() and p.name != exclude}
    damaged = [p.name for p, step in steps.items() if step is None]
    readable = [p for p, step in steps.items() if step is not None]
    for path in sorted(readable, key=lambda p: (steps[p], p.stat().st_mtime_ns), reverse=True):
        if is_whole(path):
            reason = f"the newest of {len(steps)}" if len(steps) > 1 else "the only checkpoint"
            if damaged:
                verb = "is" if len(damaged) == 1 else "are"
                reason += f"; {', '.join(sorted(damaged))} {verb} truncated or damaged"
            return path, steps[path], reason
        damaged.append(path.name)
    return None


def find_checkpoint(path) -> str:
    """The checkpoint that ``resume=`` means: a file is itself; of a run's folder, or of its
    ``ckpts``, the newest good one, which one printed line names.

    Raises :class:`UserError` for a folder without any.
    """
    if not Path(path).is_dir():
        return str(path)
    found = newest_checkpoint(path)
    if found is None:
        raise UserError(
            f"no checkpoint can be read in {path}: start the run anew, without resume=, or name "
            "another folder"
        )
    print(f"using {found[0]} (step {found[1]}: {found[2]})", flush=True)
    return str(found[0])


def read_checkpoint(path, map_location=None) -> dict:
    """Load a checkpoint: tensors and plain values only, never code (``weights_only``), and only
    if its checksums agree.

    Raises :class:`UserError`, one line, for a missing or unreadable file; it names the newest
    readable checkpoint of the same folder, if there is one.
    """
    path = Path(path)
    if not path.is_file():
        problem = f"checkpoint {path} not found"
    elif not is_whole(path):
        problem = f"checkpoint {path} is truncated or damaged"
    else:
        try:
            content = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # the archive is as it was written: the contents are refused
            detail = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {path} cannot be loaded: {detail}") from error
        bad = [key for key, fits in _PARTS.items() if not _fits(content, key, fits)]
        if not bad:
            return content
        problem = f"{path} is no checkpoint of a run: it has no good {', '.join(bad)}"
    # of another folder than a run's the files are not looked at: it may be anyone's
    run = path.suffix == ".ckpt" and path.parent.is_dir()
    good = newest_checkpoint(path.parent, exclude=path.name) if run else None
    raise UserError(problem + (f": the newest good one beside it is {good[0]}" if good else ""))


def is_checkpoint_of(path, folder) -> bool:
    """Whether `path` is a regular ``.ckpt`` file, and no link, whose real path is in `folder`."""
    path, folder = Path(path), os.path.realpath(folder)
    try:
        regular = stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False
    inside = Path(os.path.realpath(path)).is_relative_to(folder)
    return regular and inside and path.suffix == ".ckpt"
