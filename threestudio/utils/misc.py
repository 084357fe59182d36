"""Devices, random states, checkpoint weights and small process helpers."""

import contextlib
import functools
import gc
import os
import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from packaging import version

from threestudio.utils.errors import UserError, nearest
from threestudio.utils.schedules import C, schedule_knots  # noqa: F401 (extensions look here)
from threestudio.utils.typing import *


def parse_version(ver: str) -> version.Version:
    """`ver` as a comparable version."""
    return version.parse(ver)


def get_rank() -> int:
    """Rank of this process, from the launcher's environment variables; 0 without a launcher."""
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if key in os.environ:
            return int(os.environ[key])
    return 0


def is_first_process() -> bool:
    """Whether this is the process of rank 0; with Lightning's own launcher, that of the first
    machine."""
    return get_rank() == 0 and ("RANK" in os.environ or os.environ.get("NODE_RANK", "0") == "0")


_device_type: Optional[str] = None


def set_device_type(device_type: Optional[str]) -> None:
    """Fix the kind of device that :func:`get_device` answers ("cpu", "cuda", "mps"); None: the
    best there is. ``launch.py`` sets it from the trainer's accelerator."""
    global _device_type
    _device_type = device_type


def get_device() -> torch.device:
    """The device of this process: ``cuda:<local rank>`` where CUDA can be used, else the CPU."""
    kind = _device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", get_rank()))
        return torch.device("cuda", int(local))
    return torch.device(kind)


def choose_device(trainer_args: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of a Trainer with `accelerator` and `devices` (and a precision that the device
    has) filled in; fixes :func:`get_device`."""
    args = dict(trainer_args)
    if not str(args.get("devices", 1)).lstrip("-").isdigit() and args["devices"] != "auto":
        raise UserError(
            f"trainer.devices={args['devices']} is not a number: choose GPUs with --gpu 0,2"
        )
    accelerator = args.get("accelerator") or "auto"
    if accelerator in ("auto", "gpu", "cuda"):
        if torch.cuda.is_available():
            args["accelerator"], kind = "gpu", "cuda"
            args.setdefault("devices", -1)  # all that --gpu makes visible
        else:
            print("no CUDA device: running on the CPU", flush=True)
            args["accelerator"], args["devices"], kind = "cpu", 1, "cpu"
    else:
        if accelerator == "mps" and not torch.backends.mps.is_available():
            raise UserError("trainer.accelerator=mps: there is no such device here: leave it out")
        kind = accelerator
        args.setdefault("devices", 1)
    if kind == "cpu" and str(args.get("precision")) in ("16", "16-mixed", "16-true"):
        print(f"precision {args['precision']} needs a GPU: using 32 on the CPU", flush=True)
        args["precision"] = "32-true"
    set_device_type(kind)
    return args


# --- random state -------------------------------------------------------------------------------


def capture_rng_state() -> Dict[str, Any]:
    """States of the global generators of torch, CUDA, numpy and Python, as tensors and numbers,
    which ``torch.load(weights_only=True)`` reads back."""
    name, keys, pos, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global one)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, gauss],
        "python": random.getstate(),
    }


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Undo everything drawn since :func:`capture_rng_state`. Raises :class:`UserError` for a
    `state` that is none."""
    try:
        _restore_rng_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        detail = " ".join(str(error).split())[:160]
        raise UserError(
            f"the checkpoint's random states cannot be restored ({detail}): start a new run from "
            "it with system.weights=path/to.ckpt"
        ) from error


def _restore_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), device)
    name, keys, pos, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, gauss))  # noqa: NPY002
    python_version, numbers, gauss = state["python"]
    random.setstate((python_version, tuple(numbers), gauss))


# --- checkpoints --------------------------------------------------------------------------------


def load_module_weights(
    path,
    module_name: Optional[str] = None,
    ignore_modules: Optional[List[str]] = None,
    map_location=None,
) -> Tuple[Dict[str, Tensor], int, int]:
    """Weights in a checkpoint, with its counters: ``(state_dict, epoch, global_step)``.

    With `module_name` only the keys under ``module_name.``, with that prefix removed; with
    `ignore_modules` all keys but those under these names. The two exclude each other.
    """
    from threestudio.utils.checkpoint_files import read_checkpoint

    if module_name is not None and ignore_modules is not None:
        raise ValueError("module_name and ignore_modules exclude each other: give one of them")
    checkpoint = read_checkpoint(path, map_location=map_location)
    state = checkpoint["state_dict"]
    if module_name is not None:
        prefix = module_name + "."
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if not state:
            raise UserError(f"{path} holds no weights of a module called {module_name!r}")
    if ignore_modules is not None:
        ignored: set = set()
        for name in ignore_modules:
            named = {k for k in state if k == name or k.startswith(name + ".")}
            if not named:
                raise UserError(
                    f"{path} holds no weights called {name!r}, which are to be ignored"
                    f"{nearest(name, {k.rsplit('.', 1)[0] for k in state})}"
                )
            ignored |= named
        state = {k: v for k, v in state.items() if k not in ignored}
    return state, checkpoint["epoch"], checkpoint["global_step"]


def _kind(tensor: Tensor) -> str:
    kinds = ((tensor.is_floating_point(), "real"), (tensor.is_complex(), "complex"))
    return next((name for true, name in kinds if true), "whole")


@contextlib.contextmanager
def loading_weights(module: torch.nn.Module, state: Mapping[str, Any], source: str):
    """Within this, ``module.load_state_dict(state)`` fails with one line, a :class:`UserError`
    that names `source` and the first keys that do not fit. Values of another kind than the
    module's (real, complex, whole) are refused too, which torch would convert."""
    own = module.state_dict()
    wrong = [
        f"{key} holds {_kind(value)} numbers, not {_kind(own[key])}"
        for key, value in state.items()
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor)
        if _kind(value) != _kind(own[key])
    ]
    try:
        if wrong:
            raise RuntimeError("\n".join(["", *wrong]))
        yield
    except torch.cuda.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        no_tensor = r'.*parameter named "(.*?)", expected torch.Tensor or Tensor-like object.*'
        lines = [re.sub(no_tensor, r"\1 is no tensor", line) for line in lines]
        problems = [line for line in lines[1:] or lines if line]
        shown = "; ".join(p if len(p) <= 200 else p[:200] + "..." for p in problems[:3])
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            f"{source} does not fit {type(module).__name__}: {shown}{more}; "
            "use the config that it was made with"
        ) from error


def _names(keys: Iterable[str]) -> str:
    """The first of these keys, shortly."""
    keys = list(keys)
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(key if len(key) <= 60 else key[:60] + "..." for key in keys[:3]) + more


def load_matching(
    module: torch.nn.Module,
    state: Mapping[str, Any],
    source: str,
    ignored: Iterable[str] = (),
) -> None:
    """Load what of `state` has a name in `module`, and log what was loaded, what is missing and
    what was left over; names under those `ignored` need not be there.

    Raises :class:`UserError`, one line that names `source`, where nothing of it has, or where
    something has another shape.
    """
    import threestudio

    own = list(module.state_dict())
    with loading_weights(module, state, source):
        missing, unexpected = module.load_state_dict(state, strict=False)
    loaded = [key for key in state if key not in set(unexpected)]
    what = type(module).__name__
    if not loaded:
        raise UserError(
            f"{source} holds nothing of {what}: {_names(state) or 'no weights'} there, and "
            f"{_names(own) or 'no weights'} here"
        )
    missing = [k for k in missing if not any(k == n or k.startswith(n + ".") for n in ignored)]
    line = f"{source}: {len(loaded)} of {len(state)} tensors loaded into {what}"
    line += f"; missing there, as they were: {_names(missing)}" if missing else ""
    line += f"; not used: {_names(unexpected)}" if unexpected else ""
    (threestudio.warn if missing or unexpected else threestudio.info)(line)


def find_last_path(path: str) -> str:
    """Replace the ``LAST`` in `path`: the part before it is a prefix, and the last sibling folder
    (in sorted order) that begins with it is meant. Spaces become underscores, as in the tag of a
    run. A path without ``LAST`` is returned as it is. Raises ``FileNotFoundError``.
    """
    if path is None or "LAST" not in str(path):
        return path
    path = str(path).replace(" ", "_")
    before, after = path.split("LAST", 1)
    folder, prefix = Path(before).parent, Path(before).name
    if before.endswith(os.sep):
        folder, prefix = Path(before), ""
    found = sorted(p for p in folder.glob("*") if p.is_dir() and p.name.startswith(prefix))
    if not found:
        raise FileNotFoundError(
            f"no folder begins with {before!r}: {path} has nothing to resolve to"
        )
    return f"{found[-1]}{after}"


# --- processes and memory -----------------------------------------------------------------------


def cleanup() -> None:
    """Collect garbage and give cached CUDA memory back, tiny-cuda-nn's too where it is in use."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if "tinycudann" in sys.modules:
        sys.modules["tinycudann"].free_temporary_memory()


def finish_with_cleanup(func: Callable) -> Callable:
    """Decorator: :func:`cleanup` after every call."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        out = func(*args, **kwargs)
        cleanup()
        return out

    return wrapper


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier() -> None:
    """Wait for all processes; nothing with one process."""
    if _distributed():
        torch.distributed.barrier()


def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """The tensor of process `src` on every process (in place); itself with one process."""
    if _distributed():
        torch.distributed.broadcast(tensor, src=src)
    return tensor


def enable_gradient(model: torch.nn.Module, enabled: bool = True) -> None:
    """Switch ``requires_grad`` of all parameters of `model`."""
    for parameter in model.parameters():
        parameter.requires_grad_(enabled)
