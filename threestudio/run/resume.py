"""Is a checkpoint laid out as the run that it shall be restored into? Asked before Lightning does.

Lightning and torch take a checkpoint's structure for granted: what is missing or of another type
ends deep inside of them, or later at some step, and what is left over is dropped without a word.
"""

import inspect
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from threestudio.utils.errors import UserError
from threestudio.utils.misc import capture_rng_state, restore_rng_state

MAX_COUNT = 2**53  # of steps, batches and epochs
LOOPS = {"train": "fit", "validate": "validate", "test": "test", "export": "predict"}
LOOPS["view"] = LOOPS["export"]
OLDEST = Version("2.0.0")  # of Lightning; before it the loops were others


class Misfit(Exception):
    """``where`` in a checkpoint something is not as it should be, and what."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where} {what}")


def _refuse(path: Any, misfit: Misfit, remedy: bool = True) -> UserError:
    more = f": take another, or begin anew with system.weights={path}" if remedy else ""
    return UserError(f"checkpoint {path} cannot be restored: {misfit}{more}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and bool(value.isfinite())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _take(content: Any, key: Any, kind: type, where: str) -> Any:
    """``content[key]``, which must be of this kind."""
    if key not in content:
        raise Misfit(where, f"has no {key}")
    if not isinstance(content[key], kind):
        raise Misfit(f"{where}.{key}" if where != "it" else key, f"is no {kind.__name__}")
    return content[key]


# --- what can be said without the run -------------------------------------------------------------


def check_structure(content: dict[str, Any], path: Any, mode: str) -> None:
    """Raise :class:`UserError`, one line, if the parts of a checkpoint (see
    :func:`~threestudio.utils.checkpoint_files.read_checkpoint`) are not what Lightning looks for in
    `mode`, "train", "validate", "test", "export" or "view"."""
    try:
        _check_parts(content, mode)
    except Misfit as misfit:
        raise _refuse(path, misfit, mode == "train") from None
    if mode == "train":
        check_random_states(content.get("rng_state"), path)


def _check_parts(content: dict[str, Any], mode: str) -> None:
    for key in ("epoch", "global_step"):
        if not _is_count(content[key]):
            raise Misfit(f"its {key} {content[key]!r:.40}", "is no count")
    version = _take(content, "pytorch-lightning_version", str, "it")
    try:
        old = Version(version) < OLDEST
    except InvalidVersion:
        raise Misfit("pytorch-lightning_version", f"{version!r:.40} is no version") from None
    if old:
        raise Misfit("it", f"is of Lightning {version}, and 2.0 is the oldest that can be")
    for states in ("callbacks", "loops"):
        if states in content or mode == "train":
            for name, state in _take(content, states, dict, "it").items():
                if not isinstance(state, dict) or not isinstance(name, str):
                    raise Misfit(f"{states}.{name!s:.60}", "is no dict of a name")
    if "loops" in content:
        loop = _take(content["loops"], f"{LOOPS[mode]}_loop", dict, "loops")
        if mode == "train":
            _check_counters(content, loop)
    steps = content.get("batch_steps", [])
    if not isinstance(steps, list) or not all(_is_count(step) for step in steps):
        raise Misfit("batch_steps", "is no list of counts")
    if mode == "train":
        for key in ("optimizer_states", "lr_schedulers"):
            if not all(isinstance(state, dict) for state in _take(content, key, list, "it")):
                raise Misfit(key, "is no list of dicts")
        for i, state in enumerate(content["optimizer_states"]):
            _take(state, "state", dict, f"optimizer_states[{i}]")
            _take(state, "param_groups", list, f"optimizer_states[{i}]")


def _check_counters(content: dict[str, Any], loop: dict[str, Any]) -> None:
    """The loops count the steps and epochs that the checkpoint says."""
    automatic = ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total")
    manual = ("epoch_loop.manual_optimization.optim_step_progress", "total")
    counted = [_at(loop, *keys, "completed") for keys in (automatic, manual)]
    if content["global_step"] not in counted:
        step = content["global_step"]
        raise Misfit("loops.fit_loop", f"is at step {counted[0]!s:.20}, and global_step is {step}")
    epoch = _at(loop, "epoch_progress", "current", "processed")
    if epoch != content["epoch"]:
        raise Misfit("loops.fit_loop", f"is in epoch {epoch!s:.20}, and epoch {content['epoch']}")


def _at(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def check_random_states(state: Any, path: Any) -> None:
    """Raise :class:`UserError` if the random states of a checkpoint cannot be restored. Those of
    now stay as they are."""
    if state is None:
        return
    now = capture_rng_state()
    try:
        restore_rng_state(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    finally:
        restore_rng_state(now)


# --- against the run ------------------------------------------------------------------------------


def conform(value: Any, live: Any, where: str, required: bool = True) -> None:
    """Raise :class:`Misfit` unless `value` is laid out as `live`: a dict with its keys (without
    `required` some may be missing), a list of its length, a number where it has one, and so on.
    None agrees with everything but a number, a dict and a list; a value of another class is not
    looked at."""
    if isinstance(live, dict):
        if not isinstance(value, dict):
            raise Misfit(where, "is no dict")
        for key in live:
            if key in value:
                conform(value[key], live[key], f"{where}.{key}", required)
            elif required:
                raise Misfit(where, f"has no {key}")
    elif isinstance(live, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(live):
            raise Misfit(where, f"is no list of {len(live)}")
        for i, (a, b) in enumerate(zip(value, live)):
            conform(a, b, f"{where}[{i}]", required)
    elif isinstance(live, bool):
        if not isinstance(value, bool):
            raise Misfit(where, "is neither true nor false")
    elif isinstance(live, (int, float)):
        if not _is_number(value):
            raise Misfit(where, f"is no finite number: {value!s:.40}")
    elif isinstance(live, str) and not isinstance(value, str) and value is not None:
        raise Misfit(where, "is no text")


def _counts(value: Any, live: Any, where: str) -> None:
    """The progress of a loop: counts, and nothing but what a loop has."""
    if isinstance(live, dict):
        conform(value, {}, where)
        for key in value:
            if key not in live:
                raise Misfit(where, f"has {key!s:.40}, which no loop has")
        for key in live:
            if key not in value:
                raise Misfit(where, f"has no {key}")
            _counts(value[key], live[key], f"{where}.{key}")
    elif isinstance(live, bool):
        conform(value, live, where)
    elif not _is_count(value):
        raise Misfit(where, f"is no count: {value!s:.40}")


def check_loop(state: dict[str, Any], live: dict[str, Any], where: str) -> None:
    """The states and the progress of a loop and its children; any of them may be missing."""
    for key in live.keys() & state.keys():
        if not key.endswith("state_dict"):
            _counts(state[key], live[key], f"{where}.{key}")
            continue
        conform(state[key], live[key], f"{where}.{key}", required=False)
        loaders = state[key].get("combined_loader", [])
        if not isinstance(loaders, list) or not all(isinstance(each, dict) for each in loaders):
            raise Misfit(f"{where}.{key}", "has a combined_loader that is no list of dicts")
        stepped = state[key].get("_batches_that_stepped", 0)
        if not _is_count(stepped):
            raise Misfit(f"{where}.{key}", "has _batches_that_stepped, which is no count")


def check_callback(state: dict[str, Any], callback: Callback, where: str) -> None:
    """What `callback` is to load: laid out as what it would save now."""
    live = callback.state_dict()
    for key in ("best_model_score", "best_model_path"):  # of Lightning's ModelCheckpoint
        if key in live and key not in state:
            raise Misfit(where, f"has no {key}")
    # those of others may have been written by an earlier version of them
    conform(state, live, where, required=type(callback).__module__.startswith("threestudio."))
    for key, value in state.items():
        scalar = value is None or _is_number(value) or _is_scalar(value)
        if re.search(r"(_score|_value)$", str(key)) and not scalar:
            raise Misfit(f"{where}.{key}", "is no number")


def _is_scalar(value: Any) -> bool:  # an infinite one too
    return isinstance(value, Tensor) and value.numel() == 1


@dataclass
class _Slot:
    """An entry that an optimizer keeps for a parameter: of its shape, or one number."""

    name: str
    shaped: bool


def _slots(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[_Slot] | None:
    """What `optimizer` keeps for each parameter of a group, learnt from one step of another such
    optimizer; None where that cannot be had."""
    takes = inspect.signature(type(optimizer).__init__).parameters
    options = {key: group[key] for key in optimizer.defaults if key in group and key in takes}
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.zeros(2, 3)
    try:
        probe = type(optimizer)([parameter], **options)
        probe.step()
    except Exception:  # an optimizer of others, which may want anything
        return None
    state = probe.state.get(parameter, {})
    if not all(isinstance(name, str) for name in state):
        return None
    slots = []
    for name, value in state.items():
        shaped = isinstance(value, Tensor) and value.shape == parameter.shape
        if shaped or _is_number(value):
            slots.append(_Slot(name, shaped))
    return slots


def check_optimizer(state: dict[str, Any], live: torch.optim.Optimizer, where: str) -> None:
    """Groups, options and states of an optimizer, against those of the run and the shapes of its
    parameters."""
    own, groups = live.param_groups, state["param_groups"]
    if len(groups) != len(own):
        raise Misfit(where, f"has {len(groups)} groups of parameters, and the run has {len(own)}")
    parameters: dict[Any, tuple[Any, str, list[_Slot] | None]] = {}
    for i, (group, mine) in enumerate(zip(groups, own)):
        here = f"{where}.param_groups[{i}]"
        conform(group, {}, here)
        name, wanted = group.get("name"), mine.get("name")
        if None not in (name, wanted) and name != wanted:
            raise Misfit(here, f"is {name!s:.60}, and the run's is {wanted}")
        ids = _take(group, "params", list, here)
        if len(ids) != len(mine["params"]):
            raise Misfit(here, f"has {len(ids)} parameters, and the run has {len(mine['params'])}")
        _check_options(group, mine, here)
        slots = _slots(live, mine)
        for number, parameter in zip(ids, mine["params"]):
            if not _is_count(number) or number in parameters:
                raise Misfit(f"{here}.params", "are no numbers of their own")
            parameters[number] = (parameter, str(wanted or number), slots)
    for number, kept in state["state"].items():
        if number not in parameters:
            raise Misfit(f"{where}.state", f"is of a parameter {number!s:.20} that no group has")
        parameter, name, slots = parameters[number]
        _check_slots(kept, parameter, slots, f"{where}.state of {name}")


def _check_options(group: dict[str, Any], mine: dict[str, Any], where: str) -> None:
    for key, value in mine.items():
        numeric = isinstance(value, (int, float, tuple, list)) and not isinstance(value, bool)
        if key == "params" or (key not in group and not numeric):
            continue  # torch fills in options that are newer than the file
        if key not in group:
            raise Misfit(where, f"has no {key}")
        conform(group[key], value, f"{where}.{key}")
        if key in ("lr", "eps", "weight_decay") and float(group[key]) < 0:
            raise Misfit(f"{where}.{key}", "is negative")
        if value is None and group[key] is not None and not isinstance(group[key], bool):
            raise Misfit(f"{where}.{key}", "is neither true nor false")
    betas = group.get("betas", ())
    if not all(0 <= float(beta) < 1 for beta in betas):
        raise Misfit(f"{where}.betas", "are not between 0 and 1")


def _check_slots(kept: Any, parameter: Tensor, slots: list[_Slot] | None, where: str) -> None:
    if not isinstance(kept, dict):
        raise Misfit(where, "is no dict")
    if slots is None or not kept:  # an optimizer begins anew where it has nothing
        return
    for slot in slots:
        if slot.name not in kept:
            raise Misfit(where, f"has no {slot.name}")
        value = kept[slot.name]
        if not slot.shaped:
            if not _is_number(value) or float(value) < 0:
                raise Misfit(f"{where}: {slot.name}", "is no number from 0")
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            raise Misfit(f"{where}: {slot.name}", "is no tensor of real numbers")
        elif value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)}, and the parameter {tuple(parameter.shape)}"
            raise Misfit(f"{where}: {slot.name}", f"has the shape {shapes}")


def check_scheduler(state: dict[str, Any], live: Any, where: str) -> None:
    """What a learning-rate scheduler takes over as its attributes."""
    own = live.state_dict()
    conform(state, own, where, required=False)
    for key in state:
        if not isinstance(key, str) or callable(getattr(type(live), key, None)):
            raise Misfit(where, f"has {key!s:.40}, which is no state")


class RestoreCheck(Callback):
    """Refuses, with one line that names the file, a checkpoint that the run cannot be continued
    from: what it holds of loops, callbacks, optimizers and schedulers is compared with those that
    are there. ``path``: the file, for the line."""

    def __init__(self, path: Any = "") -> None:
        self.path = path
        self._content: dict[str, Any] | None = None  # until the optimizers are there

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        try:
            self._check(trainer, checkpoint)
        except Misfit as misfit:
            raise _refuse(self.path, misfit, trainer.training) from None
        if trainer.training:
            self._content = checkpoint

    def _check(self, trainer, content: dict[str, Any]) -> None:
        for callback in trainer.callbacks:
            state = content["callbacks"].get(callback.state_key)
            if state:
                check_callback(state, callback, f"callbacks.{type(callback).__name__}")
        for name, state in content.get("loops", {}).items():
            loop = getattr(trainer, name, None)
            if hasattr(loop, "state_dict"):
                check_loop(state, loop.state_dict(), f"loops.{name}")
        plugin = trainer.precision_plugin
        for key in (type(plugin).__qualname__, "native_amp_scaling_state"):
            if key in content:
                conform(content[key], plugin.state_dict(), key)

    def on_fit_start(self, trainer, pl_module) -> None:
        content, self._content = self._content, None
        if content is None:
            return
        try:
            for key, live, check in (
                ("optimizer_states", trainer.optimizers, check_optimizer),
                (
                    "lr_schedulers",
                    [config.scheduler for config in trainer.lr_scheduler_configs],
                    check_scheduler,
                ),
            ):
                if len(content[key]) != len(live):
                    raise Misfit(key, f"are {len(content[key])}, and the run has {len(live)}")
                for i, (state, each) in enumerate(zip(content[key], live)):
                    check(state, each, f"{key}[{i}]")
        except Misfit as misfit:
            raise _refuse(self.path, misfit) from None
