"""What is changed while a run is trained: the prompt, the guidance scale, the learning rates.

A change is made between two steps, is part of the checkpoints from then on, and is written to
``interventions.jsonl`` in the run's folder, a line for each::

    {"step": 120, "what": "prompt", "old": "a hamburger", "new": "a snowman"}

``step`` is the number of steps taken before the change. ``--replay FILE`` makes the changes of such
a file again at the same steps, so that the same command with it, and without anyone who steers,
gives the same object.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

import threestudio
from threestudio.run.snapshot import PlainFiles
from threestudio.utils.errors import UserError
from threestudio.utils.files import disk_advice, disk_error, whole_file
from threestudio.utils.misc import capture_rng_state, restore_rng_state

FILE = "interventions.jsonl"
MAX_BYTES = 1 << 22
PROMPT, SCALE, RATE = "prompt", "guidance_scale", "learning_rate_factor"
RANGES = {SCALE: (1e-3, 1e4), RATE: (0.0, 100.0)}  # both ends included
MAX_PROMPT = 1000  # characters


@dataclass(frozen=True)
class Change:
    """``what`` becomes ``new`` before step ``step``."""

    step: int
    what: str
    old: Any
    new: Any


def checked(what: str, value: Any) -> Any:
    """`value` as `what` takes it. Raises :class:`UserError` for one that it does not take."""
    if what == PROMPT:
        text = " ".join(value.split()) if isinstance(value, str) else ""
        if not text or len(text) > MAX_PROMPT or not text.isprintable():
            raise UserError(f"a prompt is a text of 1 to {MAX_PROMPT} printable characters")
        if "${" in text or text == "???":  # it would be looked up in this machine's environment
            raise UserError(
                "a prompt neither holds '${', which configs take for a reference, nor "
                "is '???', their missing value"
            )
        return text
    if what not in RANGES:
        raise UserError(f"{what!r} cannot be changed: {PROMPT}, {', '.join(RANGES)} can")
    low, high = RANGES[what]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        raise UserError(f"{what} is a number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def read(path) -> list[Change]:
    """The changes of a file, in their order. Raises :class:`UserError`, with the line, for a file
    that is none."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe can be read once only
        raise UserError(f"{path} is not a file: give the {FILE} of a run")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text in UTF-8") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
    changes: list[Change] = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            changes.append(_change(json.loads(line), changes[-1].step if changes else 0))
        except (ValueError, RecursionError) as error:
            why = error if isinstance(error, UserError) else "it is not JSON"
            raise UserError(f"{path}, line {n}: {why}") from None
    return changes


def _read_or_set_aside(path: Path) -> list[Change]:
    """The changes of a run that goes on. A log that is damaged must not keep it from that: it gets
    another name."""
    try:
        return read(path)
    except UserError as error:
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        threestudio.warn(f"{error}; it is now {aside}, and the run goes on with a new one")
        return []


def _why_not(error: Exception) -> str:
    """Why a change was not made, in one line."""
    if isinstance(error, OSError) and (known := disk_error(error)) is not None:
        return disk_advice(known)
    return shorten(str(error), 300, placeholder=" …") or type(error).__name__


def _change(found: Any, least: int) -> Change:
    if not isinstance(found, dict) or set(found) != {"step", "what", "old", "new"}:
        raise UserError("it needs the keys step, what, old and new, and no others")
    step, what = found["step"], found["what"]
    if type(step) is not int or not least <= step <= 10**12:
        raise UserError(f"its step is {step!r}, not a whole number of at least {least}")
    return Change(step, what, found["old"], checked(str(what), found["new"]))


class Interventions(Callback):
    """Makes the changes that are asked for, and those to be made again, at the start of a step.
    Without any of them it does nothing."""

    def __init__(self, folder=None, replay: Iterable[Change] = ()) -> None:
        self.folder = None if folder is None else Path(folder)
        self.replay = list(replay)
        self.changed: dict[str, Any] = {}  # what was changed -> its value now
        self.made: list[Change] = []
        self._asked: dict[str, tuple[Any, Callable[[str | None], None]]] = {}
        self._lock = threading.Lock()
        self._restored = False
        self._hooked: list[Any] = []
        self._rates: list[tuple[Any, list[float]]] = []

    # --- from any thread --------------------------------------------------------------------------

    def ask(self, what: str, value: Any, done: Callable[[str | None], None] = lambda why: None):
        """Change `what` before the next step. `done` is then called with None, or with why it could
        not be changed. A second request before that takes the place of the first."""
        with self._lock:
            self._asked[what] = value, done

    # --- hooks ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return dict(self.changed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.changed = {what: checked(what, value) for what, value in state.items()}
        self._restored = bool(self.changed)

    def on_train_start(self, trainer, pl_module) -> None:
        step = trainer.global_step
        self.replay = [change for change in self.replay if change.step >= step]
        path = self._path()
        if path is not None and FILE in PlainFiles(path.parent):  # of the run that goes on
            self.made = [change for change in _read_or_set_aside(path) if change.step < step]
            self._write(self.made)
        if self._restored:
            for what, value in self.changed.items():
                self._set(trainer, pl_module, what, value)
            self._restored = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not (self.replay or self._asked) or batch_idx % trainer.accumulate_grad_batches:
            return
        while self.replay and self.replay[0].step <= trainer.global_step:
            change = self.replay.pop(0)
            self._make(trainer, pl_module, change.what, change.new)
        with self._lock:
            asked, self._asked = self._asked, {}
        for what, (value, done) in asked.items():
            try:
                self._make(trainer, pl_module, what, checked(what, value))
            except Exception as error:  # whatever a visitor wishes, it must not end the run
                why = _why_not(error)
                threestudio.warn(f"the {what.replace('_', ' ')} was not changed: {why}")
                done(why)
            else:
                done(None)

    def on_train_end(self, trainer, pl_module) -> None:
        if self.replay:
            threestudio.warn(
                f"{len(self.replay)} of the changes to replay were for step "
                f"{self.replay[0].step} or later, and were not made"
            )
        self._unhook()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._unhook()

    # --- changes ----------------------------------------------------------------------------------

    def _make(self, trainer, system, what: str, new: Any) -> None:
        old = current(system, what, self.changed)
        if new == old:
            return
        change = Change(trainer.global_step, what, old, new)
        made = [*self.made, change]
        # first, for a change that is not in the log could not be made again
        self._write(made)
        try:
            self._set(trainer, system, what, new)
        except BaseException:
            with contextlib.suppress(OSError):
                self._write(self.made)
            raise
        self.made, self.changed[what] = made, new
        threestudio.info(f"from step {change.step} on the {what.replace('_', ' ')} is {new}")

    def _path(self) -> Path | None:
        return None if self.folder is None else self.folder / FILE

    def _write(self, changes: list[Change]) -> None:
        path = self._path()
        if path is None:
            return
        text = "".join(f"{json.dumps(asdict(change))}\n" for change in changes)
        if len(text) > MAX_BYTES:  # the run could not go on from it
            raise UserError(f"{FILE} holds {MAX_BYTES >> 20} MiB: this run cannot be changed again")
        with whole_file(path) as tmp:
            tmp.write_text(text)

    def _set(self, trainer, system, what: str, value: Any) -> None:
        if what == PROMPT:
            _set_prompt(system, value)
        elif what == SCALE:
            _set_scale(system, value)
        else:
            self._set_rate(trainer, value)

    def _set_rate(self, trainer, factor: float) -> None:
        """Multiply the learning rates while an optimizer steps, and only then: what a schedule has
        set, or will set from them, stays as it is."""
        self._unhook()
        if factor == 1:
            return

        def before(optimizer, args, kwargs) -> None:
            self._rates.append((optimizer, [group["lr"] for group in optimizer.param_groups]))
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

        def after(optimizer, args, kwargs) -> None:
            _, rates = self._rates.pop()
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate

        for optimizer in trainer.optimizers:
            self._hooked.append(optimizer.register_step_pre_hook(before))
            self._hooked.append(optimizer.register_step_post_hook(after))

    def _unhook(self) -> None:
        while self._hooked:
            self._hooked.pop().remove()
        while self._rates:  # of a step that failed
            optimizer, rates = self._rates.pop()
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate


def current(system: Any, what: str, changed: dict[str, Any] | None = None) -> Any:
    """The value of `what` now; None for what this system does not have."""
    if what in (changed or {}):
        return (changed or {})[what]
    if what == PROMPT:
        return getattr(getattr(system, "prompt_processor", None), "prompt", None)
    if what == RATE:
        return 1.0
    value = getattr(_scale_of(system), "guidance_scale", None)
    return float(value) if isinstance(value, (int, float)) else None


def _scale_of(system: Any) -> Any:
    """What has the attribute ``guidance_scale`` that counts: the guidance, or its config."""
    guidance = getattr(system, "guidance", None)
    if isinstance(getattr(type(guidance), "guidance_scale", None), property):
        return guidance
    return getattr(guidance, "cfg", None)


def _set_scale(system: Any, value: float) -> None:
    owner = _scale_of(system)
    if getattr(owner, "guidance_scale", None) is None:
        raise UserError(f"{type(system).__name__} has no guidance_scale")
    owner.guidance_scale = value


def _set_prompt(system: Any, prompt: str) -> None:
    """Embed another prompt in the place of the system's."""
    processor = getattr(system, "prompt_processor", None)
    if processor is None or not hasattr(system, "prompt_utils"):
        raise UserError(f"{type(system).__name__} has no prompt that can be changed")
    random = capture_rng_state()  # a text encoder that is made may draw
    try:
        with torch.no_grad():
            made = type(processor)({**dict(system.cfg.prompt_processor), "prompt": prompt})
            utils = made()
    finally:
        restore_rng_state(random)
    system.prompt_processor, system.prompt_utils = made, utils
