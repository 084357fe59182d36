"""Checkpoints that are whole or absent, and a last checkpoint that is the last step."""

import pickle
import zipfile
from pathlib import Path

import torch

from threestudio.utils.errors import UserError
from threestudio.utils.typing import *

_UNREADABLE = (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError)


def _is_whole(path: Path) -> bool:
    """Whether the checkpoint's archive is complete and its checksums agree."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _newest_good_sibling(path: Path) -> Optional[Path]:
    others = [p for p in path.parent.glob("*.ckpt") if p.name != path.name]
    by_age = sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)
    return next((p for p in by_age if _is_whole(p)), None)


def read_checkpoint(path, map_location=None) -> dict:
    """Load a checkpoint: tensors and plain values only, never code (``weights_only``).

    Raises :class:`UserError`, one line, for a missing or unreadable file; it names the newest
    readable checkpoint of the same folder, if there is one.
    """
    path = Path(path)
    if not path.is_file():
        problem = f"checkpoint {path} not found"
    else:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except _UNREADABLE as error:
            if _is_whole(path):  # then it is the contents that are refused
                detail = " ".join(str(error).split())[:300]
                raise UserError(f"checkpoint {path} cannot be loaded: {detail}") from error
            problem = f"checkpoint {path} is truncated or damaged"
    good = _newest_good_sibling(path) if path.parent.is_dir() else None
    raise UserError(problem + (f": the newest good one beside it is {good}" if good else ""))
