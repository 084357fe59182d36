"""The state of an edit: what it takes to go on, to the last bit."""

from pathlib import Path
from typing import Any

import torch
from lods.files import whole_file
from lods.learned.files import read_safetensors
from torch import Tensor, nn

STATE = "state.safetensors"
FORMAT = "lods-edit-state"
CPU, CUDA = "random.cpu", "random.cuda"
LATENTS, SOURCE, METHOD, OPTIMIZER = "latents", "source_latents", "method.", "optimizer."


def write_state(
    folder: Path,
    step: int,
    latents: Tensor,
    source: Tensor,
    method: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Write everything that changes, and the random states."""
    from safetensors.torch import save_file

    tensors = {LATENTS: latents, SOURCE: source, CPU: torch.get_rng_state()}
    if latents.device.type == "cuda":
        tensors[CUDA] = torch.cuda.get_rng_state(latents.device)
    tensors |= {METHOD + name: value for name, value in method.state_dict().items()}
    for number, values in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"{OPTIMIZER}{number}.{name}": value for name, value in values.items()}
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole_file(folder / STATE) as partial:
        save_file(whole, partial, metadata={"format": FORMAT, "step": str(step)})


def read_state(
    folder: Path,
    latents: Tensor,
    source: Tensor,
    method: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> int:
    """Put the state of a folder into these, and the random states back; returns the step. Raises
    ``ValueError``, one line, for a file that is none, or of something else."""
    path = folder / STATE
    if not path.is_file():
        raise ValueError(f"{folder} has no {STATE} to go on from")
    found, metadata = read_safetensors(path)
    step = metadata.get("step", "")
    if metadata.get("format") != FORMAT or not (step.isascii() and step.isdecimal()):
        raise ValueError(f"{path} is not the state of an edit")
    learned = {k.removeprefix(METHOD): v for k, v in found.items() if k.startswith(METHOD)}
    wanted = {LATENTS: latents, SOURCE: source, CPU: torch.get_rng_state()}
    own = method.state_dict()
    checked = {**wanted, **{METHOD + name: value for name, value in own.items()}}
    for name, value in checked.items():
        _check(path, name, found.get(name), value)
    extra = learned.keys() - own.keys()
    if extra:
        raise ValueError(f"{path} is of another method: it holds {min(extra)[:60]!r}")
    state = _optimizer_state(path, found, optimizer)
    with torch.no_grad():
        latents.copy_(found[LATENTS])
        source.copy_(found[SOURCE])
    method.load_state_dict(learned)
    if optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(found[CPU])
    if latents.device.type == "cuda" and CUDA in found:
        torch.cuda.set_rng_state(found[CUDA], latents.device)
    return int(step)


def _check(path: Path, name: str, found: Tensor | None, like: Tensor) -> None:
    if found is None:
        raise ValueError(f"{path} does not fit this edit: it holds no {name}")
    if found.shape != like.shape or found.dtype != like.dtype:
        said = f"{tuple(found.shape)} {found.dtype}, not {tuple(like.shape)} {like.dtype}"
        raise ValueError(f"{path} does not fit this edit: {name} is {said}".replace("torch.", ""))


def _optimizer_state(
    path: Path, found: dict[str, Tensor], optimizer: torch.optim.Optimizer | None
) -> dict[int, dict[str, Any]]:
    """``state`` of the optimizer's state dict: a number, or one for each of a parameter's."""
    params = [] if optimizer is None else [p for g in optimizer.param_groups for p in g["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in found.items():
        if not name.startswith(OPTIMIZER):
            continue
        number, _, part = name.removeprefix(OPTIMIZER).partition(".")
        if not number.isdecimal() or int(number) >= len(params):
            raise ValueError(f"{path} does not fit this edit: it holds {name[:60]!r}")
        if value.ndim:
            _check(path, name, value, params[int(number)])
        state.setdefault(int(number), {})[part] = value
    return state
