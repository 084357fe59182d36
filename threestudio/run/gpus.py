"""Which GPUs a run sees, decided before anything starts CUDA."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from threestudio.utils.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# what this program has chosen, for the processes that Lightning starts by the same command line
CHOSEN = "THREESTUDIO_VISIBLE_DEVICES"
_ID = re.compile(r"(GPU|MIG)-[\w/-]+", re.ASCII)  # of a GPU or of a part of one


def visible_gpus(visible: str) -> list[str]:
    """The entries of ``CUDA_VISIBLE_DEVICES``, numbers or ids. CUDA ignores what follows the first
    that is neither, such as -1."""
    found: list[str] = []
    for entry in visible.split(","):
        entry = entry.strip()
        if not (entry.isascii() and entry.isdigit()) and not _ID.fullmatch(entry):
            break
        found.append(entry)
    return found


def installed_gpus() -> int | None:
    """How many GPUs have a device file here; None where the system has no such files."""
    if not Path("/dev/nvidiactl").exists():
        return None
    return sum(path.name[len("nvidia") :].isdigit() for path in Path("/dev").glob("nvidia*"))


def choose_gpus(wanted: str | None, visible: str | None, installed: int | None = None) -> list[str]:
    """The GPUs of a run, as ``CUDA_VISIBLE_DEVICES`` names them.

    `wanted` is the value of ``--gpu``, such as "0" or "0,2": places in the list `visible` (the
    variable's value), counted from 0, or entries of that list that are ids (GPU-..., MIG-...).
    Without a list they are the GPUs themselves, of which there are `installed`, if that is known.
    Without `wanted` all of the list is used, and GPU 0 where there is none.

    Raises :class:`UserError` for what is no such place, with one line.
    """
    listed = None if visible is None else visible_gpus(visible)
    shown = _short(visible or "")
    if wanted is None:
        return ["0"] if listed is None else listed
    chosen, said = [], _short(wanted)
    for word in (part.strip() for part in wanted.split(",")):
        if _ID.fullmatch(word) and (listed is None or word in listed):
            chosen.append(word)
        elif not (word.isascii() and word.isdigit() and len(word) < 10):
            hint = "numbers, such as 0 or 0,1 (trainer.accelerator=cpu is for the CPU)"
            if _ID.fullmatch(word):
                hint = f"one of {VISIBLE}={shown}"
            raise UserError(f"--gpu {said}: {_short(word)!r} is no GPU here; give {hint}")
        elif listed is not None and int(word) >= len(listed):
            here = f"the {len(listed)} that {VISIBLE}={shown} leaves" if listed else "any"
            remedy = "" if listed else f": {VISIBLE}={shown} hides all; leave --gpu out for a CPU"
            raise UserError(
                f"--gpu {said}: {int(word)} is not among {here}, counted from 0{remedy}"
            )
        elif listed is None and installed is not None and int(word) >= installed:
            raise UserError(f"--gpu {said}: this machine has {installed} GPU(s), counted from 0")
        else:
            chosen.append(str(int(word)) if listed is None else listed[int(word)])
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--gpu {said} names a GPU twice")
    return chosen


def _short(text: str) -> str:
    """A text as it stands in a message."""
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextlib.contextmanager
def seeing_gpus(wanted: str | None) -> Iterator[list[str]]:
    """Within this, CUDA sees the chosen GPUs only, in the order of their places on the bus."""
    before = {name: os.environ.get(name) for name in (VISIBLE, CHOSEN, "CUDA_DEVICE_ORDER")}
    visible = before[VISIBLE]
    if visible is not None and visible == before[CHOSEN] and "LOCAL_RANK" in os.environ:
        chosen = visible_gpus(visible)  # by the process that has started this one
    else:
        chosen = choose_gpus(wanted, visible, installed_gpus())
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ[VISIBLE] = os.environ[CHOSEN] = ",".join(chosen)
    try:
        yield chosen
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def count_gpus(chosen: list[str], wanted: str | None) -> int:
    """How many of the `chosen` GPUs CUDA has; 1, for one process on the CPU, where it has none.
    Raises :class:`UserError` if it lacks some that were asked for."""
    import torch

    if not torch.cuda.is_available():
        return 1
    there = torch.cuda.device_count()
    if wanted is not None and there < len(chosen):
        raise UserError(f"--gpu {wanted}: CUDA finds {there} of these {len(chosen)} GPUs")
    return max(1, min(there, len(chosen)))
