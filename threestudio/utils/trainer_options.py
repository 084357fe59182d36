"""Ranges of the sections `trainer` and `checkpoint`: what Lightning's ``Trainer`` and
``ModelCheckpoint`` are given. Options that are not here are Lightning's to judge. Imports no torch.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypedDict

from omegaconf import DictConfig

from threestudio.utils.ranges import is_list, is_number, shown

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = (
    *(16, 32, 64, "16", "32", "64", "bf16"),
    *("16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16"),
)
MOST = "1e9]"  # steps, epochs or batches: more than any run reaches
Steps = Annotated[int | None, f"[-1, {MOST}"]
Share = Annotated[int | float | None, f"[0, {MOST}"]
Switch = bool | None


class TrainerOptions(TypedDict, total=False):
    """Arguments of ``pytorch_lightning.Trainer``."""

    accelerator: Annotated[str | None, ACCELERATORS]
    devices: Any  # see `contradictions`
    num_nodes: Annotated[int, "[1, 100000]"]
    precision: Annotated[Any, PRECISIONS]
    max_epochs: Steps
    min_epochs: Annotated[int | None, f"[0, {MOST}"]
    max_steps: Annotated[int, f"[-1, {MOST}"]
    min_steps: Annotated[int | None, f"[0, {MOST}"]
    # whole numbers are batches, fractions a part of them
    limit_train_batches: Annotated[int | float | None, f"(0, {MOST}"]
    limit_val_batches: Share
    limit_test_batches: Share
    limit_predict_batches: Share
    overfit_batches: Share
    val_check_interval: Any  # see `contradictions`
    callbacks: list | None  # see `_wrong_callbacks`
    check_val_every_n_epoch: Annotated[int | None, f"[1, {MOST}"]
    num_sanity_val_steps: Steps
    log_every_n_steps: Annotated[int | None, f"[0, {MOST}"]
    # a step holds on to nothing of its batches, but takes as long as all of them
    accumulate_grad_batches: Annotated[int, "[1, 100000]"]
    gradient_clip_val: Annotated[int | float | None, "[0, inf)"]
    gradient_clip_algorithm: Annotated[str | None, ("norm", "value")]
    reload_dataloaders_every_n_epochs: Annotated[int, f"[0, {MOST}"]
    enable_checkpointing: Switch
    enable_progress_bar: Switch
    enable_model_summary: Switch
    benchmark: Switch
    inference_mode: Switch
    use_distributed_sampler: Switch
    detect_anomaly: Switch
    barebones: Switch
    sync_batchnorm: Switch


class CheckpointOptions(TypedDict, total=False):
    """Arguments of ``pytorch_lightning.callbacks.ModelCheckpoint``."""

    save_top_k: Annotated[int, "[-1, 1e6]"]
    every_n_train_steps: Annotated[int | None, f"[0, {MOST}"]
    every_n_epochs: Annotated[int | None, f"[0, {MOST}"]
    mode: Annotated[str, ("min", "max")]
    verbose: Switch
    save_weights_only: Switch
    auto_insert_metric_name: Switch
    save_on_train_epoch_end: Switch
    enable_version_counter: Switch


_PARTS = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
    "val_check_interval",
)


def contradictions(trainer: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with the options of a trainer beyond single ranges: (option, text)."""
    for name in _PARTS:
        value = trainer.get(name)
        if isinstance(value, float) and value > 1:
            if value.is_integer():
                trainer[name] = int(value)
            else:
                yield name, f"must be a whole number or a part of 1, not {shown(value)}"
    if not _is_count_of_devices(trainer.get("devices", 1)):
        value = shown(trainer.devices)
        yield "devices", f"={value} is no number of devices: choose GPUs with --gpu 0,2"
    fast = trainer.get("fast_dev_run", False)
    if not isinstance(fast, bool) and not (isinstance(fast, int) and 0 <= fast <= 1e9):
        yield "fast_dev_run", f"must be true, false or a number of batches, not {shown(fast)}"
    every = trainer.get("val_check_interval")
    if is_number(every) and not 0 < every <= 1e9:
        yield "val_check_interval", f"must be above 0 and at most 1e9, not {shown(every)}"
    elif every is not None and not is_number(every) and not _is_time(every):
        yield "val_check_interval", f"must be a number of steps, not {shown(every)}"
    time = trainer.get("max_time")
    if time is not None and not _is_time(time):
        yield "max_time", f'must be a time such as "00:12:00:00" (12 hours), not {shown(time)}'
    yield from _wrong_callbacks(trainer.get("callbacks"))


def _wrong_callbacks(value: Any) -> Iterator[tuple[str, str]]:
    """Each entry is a name, or a mapping of ``name`` and the arguments. What the names mean is
    asked later: see :mod:`threestudio.run.named_callbacks`."""
    if value is None:
        return
    if not is_list(value):
        yield "callbacks", f"takes a list, [{shown(value)}], not a single value"
        return
    for i, entry in enumerate(value):
        mapping = isinstance(entry, (Mapping, DictConfig))
        name = entry.get("name") if mapping else entry
        if not isinstance(name, str) or not name:
            text = f"takes a name, or a mapping of name and arguments, not {shown(entry)}"
            yield f"callbacks[{i}]", text
        elif mapping and not all(isinstance(key, str) for key in entry):
            yield f"callbacks[{i}]", "takes arguments by their names"


def _is_count_of_devices(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"-1|[1-9]\d{0,5}|auto", value, re.ASCII))
    return isinstance(value, int) and value is not True and (value == -1 or 1 <= value <= 100000)


def _is_time(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"\d{1,5}:\d\d:\d\d:\d\d", value, re.ASCII))
    if isinstance(value, (Mapping, DictConfig)):
        names = {"days", "seconds", "minutes", "hours", "weeks"}
        return set(value) <= names and all(is_number(v) and 0 <= v <= 1e9 for v in value.values())
    return False


def never_ends(trainer: Any) -> bool:
    """Whether a training on data without an end would have none either."""
    batches, epochs = trainer.get("limit_train_batches"), trainer.get("max_epochs")
    by_epochs = isinstance(batches, int) and epochs != -1  # Lightning's own default is 1000 epochs
    ends = by_epochs or trainer.get("fast_dev_run") or trainer.get("max_time")
    return trainer.get("max_steps", -1) == -1 and not ends
