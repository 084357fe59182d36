"""What trainings share: pictures as tensors, states on disk, and a loop that trains a network:
resumable, exact, averaged.

Learning rate of the loop: linear from 0, then constant, then linear to 0 over the last fifth of the
steps. The state at the end of the constant part is kept in a file of its own, so that a finished
training can go on with more steps from there. Each step draws from generators seeded by its number,
so that an interrupted training that is taken up again gives the weights of one that was not.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from pocket.muon import MuonAndAdamW
from pocket.tools import say, whole_file

TAIL = 0.2  # of the steps, the last ones, in which the rate falls to 0
SAVE_S = 180  # seconds between two states on disk


def to_tensor(images: UInt8[np.ndarray, "N H W 3"]) -> Float[torch.Tensor, "N 3 H W"]:
    """Pictures of 0..255 as float32 in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def build_scheduler():
    """Stable Diffusion's table of noise, for a network that predicts v."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def save_state(path: Path, **state) -> None:
    """Write a training state in one piece: a reader sees the old file or the new one."""
    with whole_file(path) as tmp:
        torch.save(state, tmp)


def load_state(path: Path) -> dict:
    """A state that ``save_state`` wrote; raises ``ValueError`` if the file holds none."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to train again") from None


def cosine(step: int, steps: int, peak: float, warm: int = 100) -> float:
    """The learning rate at ``step`` of ``steps``: linear from 0 to ``peak`` in ``warm`` steps, then
    half a cosine down to 2 % of it."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.51 + 0.49 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def rate(step: int, steps: int, falls: int, warm: int) -> float:
    """The learning rate over its peak: rises for ``warm`` steps, falls from step ``falls``."""
    if step < falls:
        return min(1.0, (step + 1) / warm)
    return (steps - step) / (steps - falls) * min(1.0, (step + 1) / warm)


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Within the block, SIGTERM and SIGINT set the event instead of ending the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.signal(s, lambda *_: asked.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Training:
    """Trains the parameters of ``models`` that want a gradient, to the state in ``file``.

    ``loss(step)`` draws a batch and returns the loss to minimise. ``peaks`` are the rates of the
    parameter groups ``groups``, or of all parameters; with ``muon`` weight matrices are stepped by
    Muon (see :mod:`pocket.muon`), which has no groups. ``extra``, a dictionary of numbers by name,
    is the loss's own memory and is kept with the state.
    """

    def __init__(
        self,
        file: Path,
        models: torch.nn.Module,
        loss: Callable[[int], torch.Tensor],
        steps: int,
        *,
        peak: float,
        groups: list[dict] | None = None,
        warm: int = 200,
        decay: float = 0.999,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        extra: dict[str, float] | None = None,
        muon: bool = False,
        name: str = "",
    ):
        from diffusers.training_utils import EMAModel

        self.file, self.models, self.loss, self.steps = file, models, loss, steps
        self.warm, self.extra = warm, {} if extra is None else extra
        self.name = name or file.stem
        named = [(k, p) for k, p in models.named_parameters() if p.requires_grad]
        self.names, self.parameters = [k for k, _ in named], [p for _, p in named]
        self.optimizer: Any = (
            MuonAndAdamW(models, peak, betas, weight_decay)
            if muon
            else torch.optim.AdamW(
                groups or [{"params": self.parameters}],
                lr=peak,
                betas=betas,
                weight_decay=weight_decay,
                fused=True,
            )
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.average = EMAModel(self.parameters, decay=decay, foreach=True)
        self.step, self.falls = 0, int((1 - TAIL) * steps)
        self._load()

    @property
    def plateau(self) -> Path:
        """The state at the end of the constant part."""
        return self.file.with_name(f"{self.file.stem}_plateau{self.file.suffix}")

    def _load(self):
        if not self.file.exists():
            return
        state = load_state(self.file)
        whole = "optimizer" in state
        if whole and state["steps"] != self.steps and state["step"] > state["falls"]:
            if not self.plateau.exists():
                raise ValueError(
                    f"{self.file} was trained for {state['steps']} steps and {self.plateau.name}, "
                    f"from which it could go on to {self.steps}, is gone"
                )
            state = load_state(self.plateau)
        self.models.load_state_dict(state["model"])
        self.step = state["step"]
        if not whole:  # weights that came back from another machine
            with torch.no_grad():
                for mean, value in zip(self.average.shadow_params, self.parameters, strict=True):
                    mean.copy_(value)
            self.average.optimization_step = self.step
            self.falls = max(self.falls, self.step)
            return
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.parameters[0].device
        self.average.load_state_dict(state["average"])
        self.average.to(device)
        self.extra.update(state["extra"])
        if state["steps"] == self.steps:
            self.falls = state["falls"]
        else:  # a constant part that is longer than the new one's ends here
            self.falls = max(self.falls, self.step)
        if self.step > self.steps:
            raise ValueError(
                f"{self.file} has {self.step} steps already, more than the {self.steps} asked for"
            )

    def save(self, file: Path | None = None):
        save_state(
            file or self.file,
            model=self.models.state_dict(),
            average=self.average.state_dict(),
            parameters=self.names,
            optimizer=self.optimizer.state_dict(),
            extra=self.extra,
            step=self.step,
            steps=self.steps,
            falls=self.falls,
        )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the models have their averaged weights."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        self.models.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.average.restore(self.parameters)
            self.models.train()

    def run(
        self,
        watch: Callable[[int], None] | None = None,
        watch_s: float = 300,
        save_s: float = SAVE_S,
        say_every: int = 100,
        until: int | None = None,
    ):
        """Train to the last step, or to ``until``; ``watch(step)`` is called every ``watch_s``
        seconds and at the end, with the averaged weights in place. A SIGTERM or SIGINT saves the
        state after the step at hand and raises ``KeyboardInterrupt``."""
        self.models.train()
        running, began = None, self.step
        started = saved = watched = time.monotonic()
        end = self.steps if until is None else min(until, self.steps)
        with _signals() as asked:
            while self.step < end and not asked.is_set():
                if self.step == self.falls:
                    self.save(self.plateau)
                now = rate(self.step, self.steps, self.falls, self.warm)
                for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                    group["lr"] = peak * now
                loss = self.loss(self.step)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.average.step(self.parameters)
                self.step += 1
                if self.step % 10 == 0:
                    value = loss.item()
                    running = value if running is None else 0.9 * running + 0.1 * value
                if self.step % say_every == 0:
                    pace = (time.monotonic() - started) / (self.step - began)
                    say(
                        f"{time.strftime('%H:%M:%S')} {self.name} {self.step}/{self.steps} "
                        f"loss {running or loss.item():.4f} {pace:.3f} s a step"
                    )
                if time.monotonic() - saved > save_s or self.step == end:
                    self.save()
                    saved = time.monotonic()
                if watch and (time.monotonic() - watched > watch_s or self.step == self.steps):
                    with self.averaged():
                        watch(self.step)
                    watched = time.monotonic()
            if asked.is_set():
                self.save()
                raise KeyboardInterrupt(f"saved at step {self.step} of {self.steps}")
